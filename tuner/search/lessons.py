"""What a study's trials teach its sampler: final values, and predictions for trials that are not complete. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace

from optuna.trial import FrozenTrial, TrialState

from tuner.config import TrialConfig
from tuner.search.observations import Observation, observe
from tuner.study.events import EpochDone, State, trial_id
from tuner.study.history import History, Trial
from tuner.study.objectives import Objective

STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


class Lessons:
    """Of the trials in a study's database, with the epochs of its journal.

    Args:
        known: costs of a configuration by name.
        history: of the journal, whose epochs tell what a stopped trial would have reached; None: the database alone,
            which has final values.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        known: Callable[[TrialConfig], Mapping[str, float]],
        history: History | None = None,
    ) -> None:
        self._objectives, self._known, self._history = objectives, known, history
        self._measured = [objective.name for objective in objectives if objective.kind == "measured"]

    def observations(self, trials: Sequence[FrozenTrial]) -> dict[str, Observation]:
        """What each trial that has not failed teaches, by trial, in the order of `trials`.

        A stopped trial still teaches what it would probably have reached; so does a running one after its first epochs.
        """
        return observe(self.trials(trials), self._measured)

    def trials(self, trials: Sequence[FrozenTrial]) -> list[Trial]:
        """Trials of the database with their epochs."""
        return [self._told(trial) for trial in trials]

    def as_sampled(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Trials as Optuna's samplers get them: a stopped one is complete, with the values that are predicted for it.

        Optuna gives PRUNED trials no values in a study of several objectives, and counts them as bad.
        """
        observations = self.observations(trials)
        kept = (trial for trial in trials if trial.state != TrialState.FAIL)
        return [self._completed(trial, observations[trial_id(trial.number)]) for trial in kept]

    def _completed(self, trial: FrozenTrial, seen: Observation) -> FrozenTrial:
        if trial.state != TrialState.PRUNED or seen.values is None:
            return trial
        completed = copy(trial)
        completed.state = TrialState.COMPLETE
        costs = (seen.known[objective.name] for objective in self._objectives if objective.kind == "known")
        completed.values = [*seen.values, *costs]
        return completed

    def _told(self, trial: FrozenTrial) -> Trial:
        """A trial with its epochs. One that has only just been suggested is not in the journal yet."""
        name, config, state = trial_id(trial.number), config_of(trial), STATES[trial.state]
        known = self._history.get(name) if self._history is not None else None
        if known is not None and known.config == config:
            return replace(known, state=state)
        told = Trial(name, trial.user_attrs["origin"], config, dict(self._known(config)), state=state)
        if trial.state == TrialState.COMPLETE:
            metrics = dict(zip(self._measured, trial.values, strict=False))
            told.epochs[1] = EpochDone(trial=name, epoch=1, metrics=metrics)
        return told


def config_of(trial: FrozenTrial) -> TrialConfig:
    """The configuration of a trial in the database."""
    return TrialConfig.model_validate_json(trial.user_attrs["config"])
