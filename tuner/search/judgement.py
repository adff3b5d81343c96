"""What is believed of complete trials after all of them: a posterior for each metric, and who belongs to the front.

The best of many noisy values is too good: it was chosen for its noise, too. So the front is selected by posterior
means. Neighbours in the space support or doubt a lucky value, a repeated configuration is averaged, and stopped trials
count with their predicted values. No Ray, no Optuna.

Shapes: N complete trials, K measured objectives, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
# Complete trials before expected values select better than measured ones (`benchmarks.search_quality`).
ENOUGH = 16
SAMPLES = 1000
RIVALS = 40


def judge(trials: Sequence[Trial], space: SearchSpace, objectives: tuple[Objective, ...]) -> dict[str, Belief]:
    """What is believed of each complete trial; nothing if there are too few trials for a model.

    Args:
        trials: of the study, by number.
    """
    study = _Study.of(trials, space, objectives)
    if study is None or len(study.complete) < ENOUGH:
        return {}
    names = [trial.trial for trial in study.complete]
    means, covariances = study.posterior(names)
    cost_NC = study.costs(names)
    probability_N = _probabilities(_draw(means, covariances), cost_NC, objectives)
    selected = set(front(np.column_stack([*means, cost_NC]), objectives))
    deviations = [np.sqrt(np.maximum(np.diag(each), 0.0)) for each in covariances]
    return {
        name: Belief(
            expected={metric: float(mean[row]) for metric, mean in zip(study.measured, means, strict=True)},
            deviation={metric: float(each[row]) for metric, each in zip(study.measured, deviations, strict=True)},
            probability=float(probability_N[row]),
            on_front=row in selected,
        )
        for row, name in enumerate(names)
    }


def chance_of(
    standing: Trial, trials: Sequence[Trial], space: SearchSpace, objectives: tuple[Objective, ...]
) -> float | None:
    """The probability that a trial at a rung, trained to its end, is on the front; None while there is no model.

    Only complete trials are its rivals, and of those that cost as much or less the `RIVALS` with the best expected
    values of each metric: others hardly ever beat it.

    Args:
        trials: of the study with this one, by number.
    """
    study = _Study.of(trials, space, objectives)
    if study is None or standing.trial not in study.seen:
        return None
    costs = study.costs([standing.trial])[0]
    names = [trial.trial for trial in study.complete]
    names = [name for name, each in zip(names, study.costs(names), strict=True) if (each <= costs).all()]
    kept = {standing.trial}
    for mean_N in study.means(names) if names else ():
        kept |= {names[row] for row in np.argsort(-mean_N, kind="stable")[:RIVALS]}
    chosen = [name for name in study.seen if name in kept]
    samples = _draw(*study.posterior(chosen))
    return float(_probabilities(samples, study.costs(chosen), objectives)[chosen.index(standing.trial)])


@dataclass(frozen=True)
class _Study:
    """Observations, and a model for each measured objective."""

    measured: tuple[str, ...]
    cost_names: tuple[str, ...]
    complete: list[Trial]
    seen: dict[str, Observation]
    features: dict[str, Array]
    models: list[Surrogate]

    @classmethod
    def of(cls, trials: Sequence[Trial], space: SearchSpace, objectives: tuple[Objective, ...]) -> _Study | None:
        """None if too few trials are complete."""
        measured = tuple(objective.name for objective in objectives if objective.kind == "measured")
        seen = {name: each for name, each in observe(trials, measured).items() if each.values is not None}
        complete = [trial for trial in trials if trial.state == "complete" and trial.trial in seen]
        if len(complete) < STARTUP:
            return None
        encoding = Encoding(space, objectives)
        features = {name: encoding.features(each.config, each.known) for name, each in seen.items()}
        stacked, values = np.stack(list(features.values())), list(seen.values())
        models = [Surrogate(stacked, *observed(values, index)) for index in range(len(measured))]
        costs = tuple(objective.name for objective in objectives if objective.kind == "known")
        return cls(measured, costs, complete, seen, features, models)

    def costs(self, names: Sequence[str]) -> Array:
        """Costs [N, C] of trials."""
        rows = [[self.seen[name].known[cost] for cost in self.cost_names] for name in names]
        return np.array(rows, dtype=np.float64).reshape(len(names), len(self.cost_names))

    def means(self, names: Sequence[str]) -> list[Array]:
        """Expected values [N] of trials, for each measured objective."""
        return [model.mean(np.stack([self.features[name] for name in names])) for model in self.models]

    def posterior(self, names: Sequence[str]) -> tuple[list[Array], list[Array]]:
        """Expected values [N] of trials and their covariances [N, N], for each measured objective."""
        at_ND = np.stack([self.features[name] for name in names])
        return self.means(names), [model.covariance(at_ND) for model in self.models]


def _draw(means: Sequence[Array], covariances: Sequence[Array]) -> Array:
    """Samples [S, N, K] of the true values, the same for the same study."""
    random, samples = np.random.default_rng(0), []
    for mean_N, covariance_NN in zip(means, covariances, strict=True):
        values, vectors = np.linalg.eigh(covariance_NN)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        samples.append(mean_N + random.standard_normal((SAMPLES, len(mean_N))) @ root.T)
    return np.stack(samples, axis=2)


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
