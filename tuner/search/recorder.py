"""Turns Tune's events into events of the study, for the journal and the view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from tuner.redact import printable, redact
from tuner.study.events import EndState, EpochDone, FrontChanged, Message, TrialEnded, TrialStarted, View
from tuner.study.journal import Journal
from tuner.study.objectives import Objective

# Writing the table takes a few milliseconds; nobody reads it more often than this.
TABLE_SECONDS = 5.0


class Recorder(tune.Callback):
    """Journal and live view of one search.

    Args:
        settled: called at each epoch until it returns true.
        comes_again: whether a trial whose actor died will be suggested again.
        why_stopped: the reason why a trial was stopped, if there is one.

    Attributes:
        fatal: why the whole search ended, if it did.
    """

    def __init__(
        self,
        journal: Journal,
        view: View,
        objectives: Sequence[Objective],
        settled: Callable[[], bool],
        comes_again: Callable[[str], bool] = lambda trial: False,
        why_stopped: Callable[[str], str | None] = lambda trial: None,
    ) -> None:
        self.journal, self.view, self.objectives, self.settled = journal, view, objectives, settled
        self.comes_again, self.why_stopped = comes_again, why_stopped
        self.fatal: str | None = None
        self._started: set[str] = set()
        self._warned: set[str] = set()
        self._settled = False
        self._written = 0.0
        self._front: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, object]:
        """Empty: Tune pickles its callbacks for `Tuner.restore`, which is never called; the database is the state."""
        return {}

    def replay(self) -> None:
        """Show the past of a resumed study, from its journal."""
        if self.journal.fault:
            self.view.show(Message(text=self.journal.fault))
        for event in self.journal.history.events():
            self.view.show(event)
        self._show_front()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Write the configuration to the journal; Tune restarts a trial that was paused, or whose actor died."""
        event = started(trial)
        if event.trial in self._started:
            return
        self._started.add(event.trial)
        self.journal.start(event)
        self.view.show(event)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[TuneTrial],
        trial: TuneTrial,
        result: Mapping[str, object],
        **info: object,
    ) -> None:
        """Write an epoch to the journal, unless a resumed trial only reports its past again."""
        if result.get("failed") or result.get("fatal"):
            return
        self._settled = self._settled or self.settled()
        event = EpochDone.from_row(trial.config["trial"], result)
        if not self.journal.epoch(event):
            return
        if event.warning and event.trial not in self._warned:
            self._warned.add(event.trial)
            self.view.show(Message(text=f"{event.trial}: {event.warning}"))
        self.view.show(event)
        if time.monotonic() - self._written > TABLE_SECONDS:
            self.journal.write_parquet()
            self._written = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Write how it ended: complete, failed with its reason, or stopped by the scheduler."""
        result = trial.last_result or {}
        if result.get("fatal"):
            self.fatal = result["fatal"]
        elif result.get("failed"):
            self._end(trial, "failed", str(result["failed"]))
        else:
            stopped = not result.get("final")
            reason = self.why_stopped(trial.config["trial"]) if stopped else None
            self._end(trial, "stopped" if stopped else "complete", reason)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """The trial's own actor died, more often than Tune starts it again or before Tune had started it."""
        name = trial.config["trial"]
        if self.comes_again(name):
            self.view.show(Message(text=f"{name}: its trial actor died; the trial resumes from its last checkpoint"))
            return
        error = trial.get_error()
        self._end(trial, "failed", f"trial actor: {type(error).__name__}" if error else "trial actor died")

    def _end(self, trial: TuneTrial, state: EndState, reason: str | None) -> None:
        name = trial.config["trial"]
        if self.journal.history.get(name) is None:
            # Its actor died before Tune could start it.
            self.journal.start(started(trial))
        # The reason may come from a library and quote addresses and files; from here it goes into records and views.
        reason = printable(redact(reason)) if reason else None
        self.journal.end(name, state, reason)
        self.view.show(TrialEnded(trial=name, state=state, reason=reason))
        if state == "complete":
            self._show_front()

    def _show_front(self) -> None:
        front = tuple(trial.trial for trial in self.journal.history.front(self.objectives))
        if front != self._front:
            self._front = front
            self.view.show(FrontChanged(trials=front))


def started(trial: TuneTrial) -> TrialStarted:
    """The first event of a Tune trial, from the searcher's suggestion."""
    names = ("trial", "origin", "config", "known")
    return TrialStarted.model_validate({name: trial.config[name] for name in names})
