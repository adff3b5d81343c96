"""The samplers of a search under one contract: draw a configuration that the study does not have, or none.

Each draw depends on the study's seed, the trial's number and the trials so far alone, so that a resumed study draws as
the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.config import TrialConfig
from tuner.search.observations import Observation
from tuner.search.sampling.library import OptunaKind, optuna_sampler
from tuner.search.sampling.proposer import Costs, Proposer
from tuner.space.draws import draw
from tuner.space.grid import grid
from tuner.space.search_space import SearchSpace
from tuner.study.config import SamplerName
from tuner.study.objectives import Objective

# How often a configuration that the study has is drawn again: by the sampler, then at random. A space in which so many
# random draws find nothing new is used up.
SAMPLER_DRAWS, RANDOM_DRAWS = 4, 200

Allowed = Callable[[TrialConfig], bool]
# A RUNNING trial that is in no study yet, and its configuration.
Drawn = tuple[FrozenTrial, TrialConfig]


@dataclass(frozen=True)
class Past:
    """The study so far.

    Attributes:
        trials: its trials as Optuna's samplers get them.
        observations: what each trial teaches a model, by number.
    """

    directions: tuple[StudyDirection, ...]
    trials: Callable[[], Sequence[FrozenTrial]]
    observations: Callable[[], Sequence[Observation]]


class Sampler(Protocol):
    """Draws from one space."""

    def draw(self, number: int, past: Past, allowed: Allowed) -> Drawn | None:
        """A new trial and its configuration; None if the space has no more.

        Args:
            number: of the new trial.
            allowed: whether a configuration may be drawn: not one that the study has, nor one above a limit.
        """
        ...


def make_sampler(
    name: SamplerName, space: SearchSpace, objectives: tuple[Objective, ...], costs: Costs, seed: int
) -> Sampler:
    """The sampler of this name.

    Args:
        costs: of a configuration, by name.
        seed: of the study.
    """
    match name:
        case "gp":
            return _Process(space, objectives, costs, seed)
        case "grid":
            return _Grid(space, seed)
        case _:
            return _Optuna(name, space, seed)


class _Optuna:
    def __init__(self, kind: OptunaKind, space: SearchSpace, seed: int) -> None:
        self._kind, self._space, self._seed = kind, space, seed

    def draw(self, number: int, past: Past, allowed: Allowed) -> Drawn | None:
        """Draw until there is a new one: all trials share seed and batches, so a repeat would be bit for bit the trial
        that is there."""
        study = optuna.create_study(directions=past.directions)
        if self._kind != "random":
            study.add_trials(past.trials())
        for attempt in range(SAMPLER_DRAWS + RANDOM_DRAWS):
            kind: OptunaKind = self._kind if attempt < SAMPLER_DRAWS else "random"
            study.sampler = optuna_sampler(kind, self._seed, number, attempt)
            trial = study.ask()
            config = self._space.sample(trial)
            if allowed(config):
                return study.get_trials(deepcopy=False)[trial.number], config
            # Failed trials teach the sampler nothing.
            study.tell(trial.number, state=TrialState.FAIL)
        return None


class _Grid:
    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space, self._seed = space, seed

    def draw(self, number: int, past: Past, allowed: Allowed) -> Drawn | None:
        """The first point of the grid that is new."""
        configs = map(self._space.build, grid(self._space, self._seed))
        config = next(filter(allowed, configs), None)
        return None if config is None else (trial_of(self._space, config, past.directions), config)


class _Process:
    def __init__(self, space: SearchSpace, objectives: tuple[Objective, ...], costs: Costs, seed: int) -> None:
        self._space, self._seed = space, seed
        self._proposer = Proposer(space, objectives, costs, seed)

    def draw(self, number: int, past: Past, allowed: Allowed) -> Drawn | None:
        """The proposal of the Gaussian process, or any new configuration if none of its candidates is new."""
        config = self._proposer.propose(past.observations(), number, allowed) or self._any(number, allowed)
        return None if config is None else (trial_of(self._space, config, past.directions), config)

    def _any(self, number: int, allowed: Allowed) -> TrialConfig | None:
        random = np.random.default_rng([self._seed, number, 1])
        drawn = (self._space.build(draw(self._space, random)) for _ in range(RANDOM_DRAWS))
        return next(filter(allowed, drawn), None)


def trial_of(space: SearchSpace, config: TrialConfig, directions: Sequence[StudyDirection]) -> FrozenTrial:
    """A RUNNING trial of a given configuration; without parameters if that is outside the space, so that samplers learn
    nothing from it."""
    study = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=0))
    params = space.params_of(config)
    if params is not None:
        study.enqueue_trial(params)
    trial = study.ask()
    if params is not None:
        space.sample(trial)
    return study.get_trials(deepcopy=False)[trial.number]
