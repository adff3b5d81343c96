"""The progress of a search, for all live views."""

from __future__ import annotations

import statistics
from collections import Counter, deque

from tuner.study.events import BASELINE, EpochDone, Event, State, StudyStarted
from tuner.study.history import History, Trial
from tuner.study.objectives import Objective, choose_objectives
from tuner.study.wording import counted, describe_points, describe_time


class Progress:
    """Trials, the front so far, epochs and time left, after the events that were applied.

    Attributes:
        plan: None before the search has started.
    """

    def __init__(self) -> None:
        self.plan: StudyStarted | None = None
        self.history = History()
        self._seconds: deque[float] = deque(maxlen=20)

    def apply(self, event: Event) -> None:
        """Add one event."""
        if isinstance(event, StudyStarted):
            self.plan = event
        self.history.apply(event)
        if isinstance(event, EpochDone):
            trial = self.history.get(event.trial)
            # An epoch without LoRA is far shorter, so it says nothing about later ones.
            if trial is not None and trial.origin != BASELINE:
                self._seconds.append(event.seconds)

    @property
    def started(self) -> StudyStarted:
        """The plan, from the first event of a search."""
        assert self.plan is not None, "StudyStarted comes first"
        return self.plan

    @property
    def trials(self) -> list[Trial]:
        """Trials that have started, by number."""
        return self.history.trials

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The study's objectives."""
        return choose_objectives(self.started.objectives)

    @property
    def metric(self) -> str:
        """The metric that views show."""
        return self.objectives[0].name

    @property
    def states(self) -> Counter[State]:
        """Number of trials in each state."""
        return Counter(trial.state for trial in self.trials)

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return sum(trial.state != "running" for trial in self.trials)

    @property
    def epochs_total(self) -> int:
        """Number of epochs if no trial ends early."""
        return max(self.started.trials, len(self.trials)) * self.started.epochs

    @property
    def epochs_settled(self) -> int:
        """Number of epochs that are done, or that will not run because their trial ended early."""
        return sum(
            self.started.epochs if trial.state != "running" else max(trial.epochs, default=0) for trial in self.trials
        )

    def front(self) -> list[Trial]:
        """The front of the complete trials, by increasing number of parameters."""
        return sorted(self.history.front(self.objectives), key=lambda trial: trial.parameters or 0)

    def seconds_left(self) -> float | None:
        """Median of recent epochs with LoRA, times the epochs left, divided by the running trials; None without one."""
        left = self.epochs_total - self.epochs_settled
        if not self._seconds or left <= 0:
            return None if left > 0 else 0.0
        return statistics.median(self._seconds) * left / max(1, self.states["running"])

    def outlook(self) -> str:
        """The time left in words; of a search with limited time, when it ends."""
        if self.started.until is not None:
            return f"ends by {self.started.until.astimezone():%H:%M}"
        return describe_time(self.seconds_left())

    def describe(self) -> str:
        """`5 of 7 trials ended, 14 of 21 epochs, front 3 points, about 2 min left`."""
        if self.epochs_settled >= self.epochs_total:
            outlook = "the front is being confirmed on the test gallery"
        else:
            outlook = f"{describe_points(len(self.front()))}, {self.outlook()}"
        epochs = f"{self.epochs_settled} of {counted(self.epochs_total, 'epoch')}"
        return f"{self.ended} of {counted(self.started.trials, 'trial')} ended, {epochs}, {outlook}"


def progress_of(plan: StudyStarted, history: History) -> Progress:
    """The progress of a study that was read from its files."""
    progress = Progress()
    progress.apply(plan)
    for event in history.events():
        progress.apply(event)
    return progress
