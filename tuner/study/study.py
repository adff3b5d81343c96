"""A study on disk, finished or running: record, trials and front, read once and typed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tuner.study.config import StudyRecord
from tuner.study.events import BASELINE
from tuner.study.folder import StudyFolder
from tuner.study.history import Cell, History, Trial
from tuner.study.journal import read_history
from tuner.study.objectives import Objective
from tuner.study.points import ConfirmedFront


@dataclass(frozen=True)
class Study:
    """Everything known about a study.

    Attributes:
        history: trials from the journal.
        front: None until it is confirmed on the test gallery for all trials that the study asks for.
        fault: a sentence about unusable lines of the journal, if there are any.
    """

    folder: StudyFolder
    record: StudyRecord
    history: History
    front: ConfirmedFront | None
    fault: str | None = None

    @classmethod
    def open(cls, path: Path) -> Study:
        """Read a study's folder without changing it, also while a search writes there.

        Raises:
            StudyError: there is no study in the folder, or one of its files is damaged.
        """
        folder = StudyFolder(path)
        record = StudyRecord.read(folder)
        history, fault = read_history(folder)
        front = ConfirmedFront.read(folder)
        if front is not None and front.trials is not None and front.trials < record.trials:
            # Until an extended study is confirmed again, its file has the front of fewer trials.
            front = None
        return cls(folder, record, history, front, fault)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.record.study

    @property
    def metric(self) -> Objective:
        """The first objective, which the report shows."""
        return self.record.metric

    @property
    def trials(self) -> list[Trial]:
        """Trials that have started, by number."""
        return self.history.trials

    @cached_property
    def measured(self) -> list[Trial]:
        """Trials with a value and a parameter count that did not fail."""
        name = self.metric.name
        shown = (trial for trial in self.trials if trial.parameters and trial.state != "failed")
        return [trial for trial in shown if not math.isnan(trial.value(name))]

    @cached_property
    def complete(self) -> list[Trial]:
        """Trials that ran all their epochs."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @cached_property
    def on_front(self) -> set[str]:
        """Trials on the confirmed front or, before there is one, on the front of the complete trials so far."""
        if self.front is not None:
            return {point.trial for point in self.front.on_front}
        return {trial.trial for trial in self.history.front(self.record.objectives)}

    @cached_property
    def baseline(self) -> Trial | None:
        """The complete trial without LoRA."""
        return next((trial for trial in self.complete if trial.origin == BASELINE), None)

    @cached_property
    def searched(self) -> list[str]:
        """Dotted paths of the configuration that have at least two values."""
        settings = [trial.settings() for trial in self.measured]
        paths = dict.fromkeys(path for each in settings for path in each)
        return [path for path in paths if len({each.get(path) for each in settings} - {None}) > 1]

    def setting(self, trial: Trial, path: str) -> Cell:
        """A value of a trial's configuration; for target modules, the shorter name of their target set."""
        value = trial.settings().get(path)
        return self._target_names.get(str(value), value) if path == "lora.targets" else value

    @cached_property
    def _target_names(self) -> dict[str, str]:
        return {",".join(modules): name for name, modules in self.record.space.target_sets.items()}
