"""Ray Searcher over an Optuna study with one or two objectives.

Ray's own OptunaSearch tells Optuna every early-stopped trial as COMPLETE, leaves trials RUNNING for ever after a NaN,
and cannot go on with a multi-objective study. Here the study in its database is the only state: each trial carries its
id, origin and configuration as user attributes, so a search that was killed at any moment goes on from the database
alone, and needs no snapshot of the driver.

The sampler reads all trials several times for each suggestion, those that run anew each time. With 64 of them it took
170 ms in SQLite and takes 23 in memory, so it is asked in a copy there, and each trial is written down in one go.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from tuner.config import TrialConfig
from tuner.pareto import Direction
from tuner.space import SearchSpace

# Random points before TPE models anything; few, since a study of LoRA configurations has tens of trials, not thousands.
STARTUP_TRIALS = 6

Origin = str  # "projection_only" | "recommended" | "sampled"


@dataclass(frozen=True)
class Objective:
    """A metric of an epoch row and the direction in which it improves."""

    metric: str
    direction: Direction


def trial_id(number: int) -> str:
    """The name of a trial in every file and view: `t0007`."""
    return f"t{number:04d}"


class StudySearcher(Searcher):
    """Suggests first what was interrupted, then the fixed configurations, then what the sampler draws.

    Args:
        study: Optuna study; one direction per objective.
        space: where sampled configurations come from.
        objectives: metrics told to the study, in the order of its directions.
        fixed: configurations that every study starts with, by origin.
        trials: total number of trials of the study, counting finished ones.
        extra: keys added to every configuration that Tune hands to a trial.
        seed: of the sampler and of every trial's initialisation.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        objectives: tuple[Objective, ...],
        fixed: Mapping[Origin, TrialConfig],
        trials: int,
        extra: Mapping[str, Any],
        seed: int,
    ) -> None:
        # No metric: Tune would end the whole search at a failed trial, whose result has none.
        super().__init__()
        self.study, self.space, self.objectives = study, space, objectives
        self.trials, self.extra, self.seed = trials, dict(extra), seed
        self._numbers: dict[str, int] = {}
        self._interrupted = self._take_over()
        self._model = _copy_in_memory(study)
        self._drawn: FrozenTrial | None = None
        done = {trial.user_attrs["origin"] for trial in self._written_down()}
        self._fixed = [(origin, config) for origin, config in fixed.items() if origin not in done]

    def _take_over(self) -> list[FrozenTrial]:
        """Trials that a killed driver left RUNNING; those it had not yet written down are closed as failed."""
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            # Enqueued, and killed before it was asked for: the fixed configuration is enqueued again.
            self.study.tell(self.study.ask().number, state=TrialState.FAIL)
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if "config" not in trial.user_attrs:
                self.study.tell(trial.number, state=TrialState.FAIL)
        return [trial for trial in running if "config" in trial.user_attrs]

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for `Tuner.restore`, which nobody calls: the study's database is the state."""
        return {}

    @property
    def remaining(self) -> int:
        """How many trials are still to be started, continued, or under way."""
        trials = self._written_down()
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        return running + max(0, self.trials - len(trials))

    def suggest(self, tune_id: str) -> Any:
        """The next configuration for Tune, or FINISHED."""
        if not self._interrupted and not self._drawn and self._started() >= self.trials:
            return Searcher.FINISHED
        if self._interrupted:
            trial = self._interrupted.pop(0)
            number, attributes = trial.number, trial.user_attrs
        else:
            number, attributes = self._start()
        self._numbers[tune_id] = number
        return {
            "trial": trial_id(number),
            "origin": attributes["origin"],
            "config": json.loads(attributes["config"]),
            **self.extra,
        }

    def _started(self) -> int:
        return len(self._written_down())

    def _written_down(self) -> list[FrozenTrial]:
        """Trials that got as far as their configuration, whatever became of them."""
        return [trial for trial in self._model.get_trials(deepcopy=False) if "config" in trial.user_attrs]

    def _start(self) -> tuple[int, dict[str, Any]]:
        # Drawn once: where the database is full or away, the next call writes what this one could not.
        self._drawn = self._drawn or self._draw()
        self.study.add_trial(self._drawn)
        drawn, self._drawn = self._drawn, None
        return drawn.number, drawn.user_attrs

    def _draw(self) -> FrozenTrial:
        """Ask the sampler; the trial is RUNNING in memory, and not yet in the database."""
        study = self._model
        study.sampler = make_sampler(self.seed, len(study.get_trials(deepcopy=False)))
        if self._fixed:
            origin, config = self._fixed.pop(0)
            params = self.space.params_of(config)
            # Inside the space the sampler learns from it; outside it is only measured.
            if params is not None:
                study.enqueue_trial(params)
            trial = study.ask()
            if params is not None:
                self.space.sample(trial)
        else:
            origin, trial = "sampled", study.ask()
            config = self.space.sample(trial)
        config = config.model_copy(update={"seed": self.seed})
        trial.set_user_attr("origin", origin)
        trial.set_user_attr("config", config.model_dump_json())
        return study.get_trials(deepcopy=False)[trial.number]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Epochs are kept by the recorder; Optuna allows no intermediate values with several objectives."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study: COMPLETE only for a trial that ran to its end, PRUNED for a stopped one, else FAIL.

        A trial that met a fatal failure of the whole search stays RUNNING, so that resuming trains it.
        """
        number = self._numbers.get(trial_id)
        if number is None or (result or {}).get("fatal"):
            return
        values = [float((result or {}).get(objective.metric, math.nan)) for objective in self.objectives]
        if error or result is None or result.get("failed") or not all(map(math.isfinite, values)):
            self._tell(number, state=TrialState.FAIL)
        elif result.get("final"):
            self._tell(number, values)
        else:
            self._tell(number, state=TrialState.PRUNED)
        del self._numbers[trial_id]

    def _tell(self, number: int, values: list[float] | None = None, state: TrialState | None = None) -> None:
        """Tell the database and, once it knows, the model."""
        for study in (self.study, self._model):
            study.tell(number, values, state=state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study's database is the state."""


def _copy_in_memory(study: optuna.Study) -> optuna.Study:
    """The same trials without a database: what the sampler reads, several times for each suggestion."""
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(study.get_trials(deepcopy=False))
    return copy


def make_sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Multivariate, grouped TPE (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022, doi:10.1613/jair.1.13188).

    Its random numbers depend on the study's seed and the trial's number alone: a resumed study draws what the
    uninterrupted one would have drawn, and never the same startup points twice.
    """
    with warnings.catch_warnings():
        # Both options have been "experimental" since Optuna 2.2 and 2.8.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=STARTUP_TRIALS
        )
