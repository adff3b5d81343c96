"""What is believed of complete trials after all of them: a posterior for each metric, and who belongs to the front.

The best of many noisy values is too good: it was chosen for its noise, too. So the front is selected by posterior
means. Neighbours in the space support or doubt a lucky value, a repeated configuration is averaged, and stopped trials
count with their predicted values. No Ray, no Optuna.

Shapes: N complete trials, K measured objectives, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.search.observations import Observation, observe, observed
from tuner.search.sampling.encoding import Encoding
from tuner.search.sampling.proposer import STARTUP
from tuner.search.sampling.surrogate import Surrogate
from tuner.space import SearchSpace
from tuner.study.history import Trial
from tuner.study.objectives import Objective
from tuner.study.pareto import front
from tuner.study.points import Belief

Array = NDArray[np.float64]
SAMPLES = 1000


def judge(
    trials: Sequence[Trial], space: SearchSpace, objectives: tuple[Objective, ...], standing: Trial | None = None
) -> dict[str, Belief]:
    """What is believed of each complete trial; nothing if there are too few trials for a model.

    Args:
        trials: of the study, by number.
        standing: one of them that stands at a rung; it is judged as if it went on to its end.
    """
    measured = [objective.name for objective in objectives if objective.kind == "measured"]
    costs = [objective.name for objective in objectives if objective.kind == "known"]
    seen = {name: each for name, each in observe(trials, measured).items() if each.values is not None}
    complete = [trial for trial in trials if trial.state == "complete" and trial.trial in seen]
    if len(complete) < STARTUP:
        return {}
    if standing is not None:
        if standing.trial not in seen:
            return {}
        complete.append(standing)
    encoding = Encoding(space, objectives)
    features = {name: encoding.features(each.config, each.known) for name, each in seen.items()}
    at_ND = np.stack([features[trial.trial] for trial in complete])
    random = np.random.default_rng(0)
    means, deviations, samples = [], [], []
    for index in range(len(measured)):
        mean_N, covariance_NN = _posterior(list(seen.values()), np.stack(list(features.values())), at_ND, index)
        means.append(mean_N)
        deviations.append(np.sqrt(np.maximum(np.diag(covariance_NN), 0.0)))
        samples.append(_draw(mean_N, covariance_NN, random))
    cost_NC = np.array([[trial.value(cost) for cost in costs] for trial in complete]).reshape(len(complete), -1)
    probability_N = _probabilities(np.stack(samples, axis=2), cost_NC, objectives)
    selected = set(front(np.column_stack([*means, cost_NC]), objectives))
    return {
        trial.trial: Belief(
            expected={name: float(mean[row]) for name, mean in zip(measured, means, strict=True)},
            deviation={name: float(each[row]) for name, each in zip(measured, deviations, strict=True)},
            probability=float(probability_N[row]),
            on_front=row in selected,
        )
        for row, trial in enumerate(complete)
    }


def _posterior(seen: Sequence[Observation], features_MD: Array, at_ND: Array, index: int) -> tuple[Array, Array]:
    model = Surrogate(features_MD, *observed(seen, index))
    return model.mean(at_ND), model.covariance(at_ND)


def _draw(mean_N: Array, covariance_NN: Array, random: np.random.Generator) -> Array:
    """Samples [S, N] of the true values."""
    values, vectors = np.linalg.eigh(covariance_NN)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.asarray(mean_N + random.standard_normal((SAMPLES, len(mean_N))) @ root.T)


def _probabilities(samples_SNK: Array, cost_NC: Array, objectives: Sequence[Objective]) -> Array:
    """Share of the samples in which each trial is on the front."""
    if samples_SNK.shape[2] == 1:
        return _probabilities_of_one(samples_SNK[:, :, 0], cost_NC)
    counts = np.zeros(samples_SNK.shape[1])
    for sample_NK in samples_SNK:
        counts[front(np.column_stack([sample_NK, cost_NC]), objectives)] += 1
    return counts / len(samples_SNK)


def _probabilities_of_one(samples_SN: Array, cost_NC: Array) -> Array:
    """The same for one metric to maximise and costs to minimise: no trial that costs as much or less is better."""
    rivals_NN: NDArray[np.bool_] = np.all(cost_NC[None, :, :] <= cost_NC[:, None, :], axis=2)
    best = (samples_SN[:, rivals_N].max(axis=1) for rivals_N in rivals_NN)
    return np.array([float(np.mean(samples_SN[:, row] >= each)) for row, each in enumerate(best)])
