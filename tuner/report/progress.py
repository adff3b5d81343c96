"""Where a search is: its trials, the front so far, epochs and time left. What every live view draws from."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from tuner.pareto import Direction, pareto_front

# Origin of the trial without LoRA, which every search begins with.
BASELINE = "projection_only"


@dataclass(frozen=True)
class StudyHeader:
    """What is known before the first trial; `trials` is the planned total."""

    study: str
    space: str
    metric: str
    trials: int
    epochs: int  # of each trial
    dashboard_url: str | None
    run_dir: str
    direction: Direction = "maximize"


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one trial: training loss, validation metric, wall time."""

    trial: str
    epoch: int  # counted from 1
    epochs: int
    loss: float
    recall: float
    metric: str
    seconds: float
    parameters: int  # trainable


@dataclass
class TrialProgress:
    """Where one trial is."""

    trial: str
    origin: str
    summary: str
    parameters: int
    state: str = "running"
    reason: str | None = None
    last: EpochRow | None = None


@dataclass
class Progress:
    """The state that every view draws from: trials, the front so far, epochs and time left."""

    header: StudyHeader
    trials: dict[str, TrialProgress] = field(default_factory=dict)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def started(self, trial: str, origin: str, summary: str, parameters: int) -> None:
        """A trial that starts again after its worker died keeps its last epoch."""
        known = self.trials.get(trial)
        self.trials[trial] = TrialProgress(trial, origin, summary, parameters, last=known.last if known else None)

    def epoch(self, row: EpochRow) -> None:
        """Record an epoch. Its duration counts towards the time left if the trial has LoRA: without it, one is so
        short that it says nothing of those to come."""
        if row.trial not in self.trials:
            self.started(row.trial, "", "", row.parameters)
        self.trials[row.trial].last = row
        if self.trials[row.trial].origin != BASELINE:
            self._seconds.append(row.seconds)

    def finished(self, trial: str, state: str, reason: str | None) -> None:
        """Record the end of a trial, whatever the reason."""
        if trial not in self.trials:
            self.started(trial, "", "", 0)
        self.trials[trial].state, self.trials[trial].reason = state, reason

    @property
    def epochs_total(self) -> int:
        return max(self.header.trials, len(self.trials)) * self.header.epochs

    @property
    def epochs_settled(self) -> int:
        """Epochs that are done or, of a trial that ended early, never will be."""
        return sum(
            self.header.epochs if trial.state != "running" else trial.last.epoch if trial.last else 0
            for trial in self.trials.values()
        )

    def front(self) -> list[TrialProgress]:
        """Trials that no other beats in metric and parameters, by their latest epoch, smallest first."""
        rated = [trial for trial in self.trials.values() if trial.state != "failed" and trial.last]
        values = [[trial.last.recall, trial.parameters] for trial in rated if trial.last]
        chosen = [rated[i] for i in pareto_front(values, [self.header.direction, "minimize"])]
        return sorted(chosen, key=lambda trial: trial.parameters)

    def seconds_left(self) -> float | None:
        """Median of recent epochs with LoRA, by the epochs left, over the trials side by side; None without one."""
        left = self.epochs_total - self.epochs_settled
        if not self._seconds or left <= 0:
            return None if left > 0 else 0.0
        side_by_side = sum(trial.state == "running" for trial in self.trials.values())
        return statistics.median(self._seconds) * left / max(1, side_by_side)


def describe_time(seconds: float | None) -> str:
    """`about 4 min left`, rounded as coarsely as the estimate deserves."""
    if seconds is None:
        return "time left unknown"
    if seconds < 90:
        return f"about {max(0, round(seconds / 10) * 10)} s left"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"


def describe_points(count: int) -> str:
    """`front 1 point`, `front 3 points`."""
    return f"front {counted(count, 'point')}"


def counted(number: int, noun: str) -> str:
    """`1 point`, `3 points`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
