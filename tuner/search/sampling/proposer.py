"""The next configuration by a Gaussian process on the metric, with costs that are known exactly.

The first points are random and cover the costs evenly: of many random configurations the one whose costs are farthest
from all that the study has. Later ones maximise the expected improvement of the hypervolume over random configurations
and neighbours of the front. A running trial counts as if it had its predicted value (Ginsbourger et al. 2010, "kriging
believer"), so that many lanes do not draw the same point. Everything depends on the study's seed, the trial's number
and the observations in the order of their trials alone.

Shapes: N observations, M candidates, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.config import TrialConfig
from tuner.search.observations import Observation, observed
from tuner.search.sampling.encoding import Encoding
from tuner.search.sampling.improvement import expected_improvement, expected_improvement_by_quantiles
from tuner.search.sampling.surrogate import Surrogate
from tuner.space.draws import draw, neighbour
from tuner.space.search_space import SearchSpace
from tuner.study.objectives import Objective
from tuner.study.pareto import front

Array = NDArray[np.float64]

# Observations before the model decides; the fixed configurations are among them.
STARTUP = 6
CANDIDATES, NEIGHBOURS = 384, 24


Costs = Callable[[TrialConfig], Mapping[str, float]]


class Proposer:
    """Proposes configurations of one study.

    Args:
        costs: of a configuration, by name.
        seed: of the study.
        pool: the only configurations that there are, if they are few; None: any of the space.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: tuple[Objective, ...],
        costs: Costs,
        seed: int,
        pool: Sequence[TrialConfig] | None = None,
    ) -> None:
        self._space, self._objectives, self._costs, self._seed = space, objectives, costs, seed
        self._measured = [objective for objective in objectives if objective.kind == "measured"]
        self._known = [objective for objective in objectives if objective.kind == "known"]
        self._encoding = Encoding(space, objectives)
        self._pool = None if pool is None else [(config, costs(config)) for config in pool]

    def propose(
        self, observations: Sequence[Observation], number: int, allowed: Callable[[TrialConfig], bool]
    ) -> TrialConfig | None:
        """The configuration of the next trial; None if no candidate is allowed.

        Args:
            observations: all trials of the study, in the order of their numbers.
            number: of the next trial.
            allowed: whether a configuration may be drawn.
        """
        random = np.random.default_rng([self._seed, number])
        measured = [each for each in observations if each.values is not None]
        good = [each for each in measured if each.complete] if len(measured) >= STARTUP else []
        candidates = self._candidates(random, good, allowed)
        if not candidates:
            return None
        features_MD = np.stack([self._encoding.features(config, known) for config, known in candidates])
        if len(measured) < STARTUP:
            scores = self._distances([known for _, known in candidates], observations)
        else:
            scores = self._improvements(features_MD, [known for _, known in candidates], observations)
        return candidates[int(np.argmax(scores))][0]

    def _candidates(
        self, random: np.random.Generator, good: Sequence[Observation], allowed: Callable[[TrialConfig], bool]
    ) -> list[tuple[TrialConfig, Mapping[str, float]]]:
        """The pool, or random configurations and neighbours of the front."""
        if self._pool is not None:
            return [(config, known) for config, known in self._pool if allowed(config)]
        drawn = [draw(self._space, random) for _ in range(CANDIDATES)]
        for row in front([self._row(each) for each in good], self._objectives) if good else ():
            params = self._space.params_of(good[row].config)
            if params is not None:
                drawn += [neighbour(self._space, random, params) for _ in range(NEIGHBOURS)]
        return [(config, self._costs(config)) for config in map(self._space.build, drawn) if allowed(config)]

    def _row(self, observation: Observation) -> list[float]:
        assert observation.values is not None
        return [*observation.values, *(observation.known[cost.name] for cost in self._known)]

    def _distances(self, known: Sequence[Mapping[str, float]], observations: Sequence[Observation]) -> Array:
        """Distance of each candidate's costs to those of the nearest trial, on the scales of the costs.

        Not of all features: the ends of a space, such as its largest learning rate, are rarely its best part.
        """
        if not observations or not self._known:
            return np.zeros(len(known))
        places_MC, taken_NC = (
            np.array([[cost.position(each[cost.name]) for cost in self._known] for each in costs])
            for costs in (known, [each.known for each in observations])
        )
        return np.asarray(np.min(np.linalg.norm(places_MC[:, None] - taken_NC[None], axis=2), axis=1))

    def _improvements(
        self, features_MD: Array, known: Sequence[Mapping[str, float]], observations: Sequence[Observation]
    ) -> Array:
        """Expected improvement of the hypervolume over the posterior's own front."""
        measured = [each for each in observations if each.values is not None]
        pending = [each for each in observations if each.values is None]
        seen_ND = np.stack([self._encoding.features(each.config, each.known) for each in [*measured, *pending]])
        predicted, posterior = [], []
        for index in range(len(self._measured)):
            values, extra = observed(measured, index)
            model = Surrogate(seen_ND[: len(measured)], values, extra)
            posterior.append(model.mean(seen_ND))
            if pending:
                # The model after running trials have got what it predicts.
                values = np.concatenate([values, posterior[-1][len(measured) :]])
                extra = np.concatenate([extra, np.zeros(len(pending))])
                model = Surrogate(seen_ND, values, extra, model.hyperparameters)
            predicted.append(model.predict(features_MD))
        costs_N = np.array([[each.known[cost.name] for cost in self._known] for each in [*measured, *pending]])
        points = np.column_stack([*posterior, costs_N.reshape(len(seen_ND), -1)])
        rows = np.zeros((len(known), len(self._objectives)))
        for column, cost in enumerate(self._known, len(self._measured)):
            rows[:, column] = [each[cost.name] for each in known]
        if (len(self._measured), len(self._known)) != (1, 1):
            means, deviations = (np.stack(parts, axis=1) for parts in zip(*predicted, strict=True))
            return expected_improvement_by_quantiles(means, deviations, rows, self._objectives, points)
        (mean, deviation), cost = predicted[0], self._known[0]
        positions = np.array([cost.position(value) for value in rows[:, 1]])
        points[:, 1] = [cost.position(value) for value in points[:, 1]]
        # The corner is close by: from the objective's own, one more decimal place would outweigh any saving.
        corner = (float(np.min(points[:, 0])), float(max(points[:, 1].max(), positions.max())) + 0.1)
        kept = points[front(np.column_stack([points[:, 0], 10 ** points[:, 1]]), self._objectives)]
        return expected_improvement(mean, deviation, positions, kept, corner)
