"""What a running search shows: a live table in a terminal, plain lines in a log, or JSON lines for programs."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TextIO

from tuner.pareto import Direction, pareto_front

# Origin of the trial without LoRA, which every search begins with.
BASELINE = "projection_only"

Kind = Literal["auto", "rich", "plain", "json"]


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


class View(Protocol):
    """Told what happens in the order in which it happens; a resumed study tells its past first."""

    def start(self, header: StudyHeader) -> None: ...

    def trial_started(self, trial: str, origin: str, summary: str, parameters: int) -> None: ...

    def epoch(self, row: EpochRow) -> None: ...

    def trial_finished(self, trial: str, state: str, reason: str | None) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_view(kind: Kind = "auto", stream: TextIO | None = None) -> View:
    """The view of that kind on `stream` (default standard output); `auto` is `rich` in a terminal, else `plain`."""
    out = sys.stdout if stream is None else stream
    if kind == "auto":
        kind = "rich" if out.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    if kind == "json":
        return JsonView(out)
    if kind == "plain":
        return PlainView(out)
    from tuner.report.terminal import RichView

    return RichView(out)


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
    return f"front {count} point{'' if count == 1 else 's'}"


class PlainView:
    """One line for each event, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._progress: Progress | None = None

    def start(self, header: StudyHeader) -> None:
        """Say what is searched and where it goes."""
        self._progress = Progress(header)
        plan = f"{header.trials} trials of {header.epochs} epochs"
        self._line(f"study {header.study}, space {header.space}: {plan}, results in {header.run_dir}")
        if header.dashboard_url:
            self._line(f"Ray dashboard at {header.dashboard_url}")

    def trial_started(self, trial: str, origin: str, summary: str, parameters: int) -> None:
        """Announce a trial with its size."""
        self._state.started(trial, origin, summary, parameters)
        self._line(f"{trial} started, {origin.replace('_', ' ')}: {summary}, {parameters:,} trainable parameters")

    def epoch(self, row: EpochRow) -> None:
        """Report an epoch with the front so far and the time left."""
        state = self._state
        state.epoch(row)
        measured = f"loss {row.loss:.3f} {row.metric} {row.recall:.3f} [{row.seconds:.1f} s]"
        outlook = f"{describe_points(len(state.front()))}, {describe_time(state.seconds_left())}"
        self._line(f"{row.trial} epoch {row.epoch}/{row.epochs} {measured} {outlook}")

    def trial_finished(self, trial: str, state: str, reason: str | None) -> None:
        """Report the end of a trial and why."""
        self._state.finished(trial, state, reason)
        self._line(f"{trial} {state}" + (f": {reason}" if reason else ""))

    def message(self, text: str) -> None:
        """Pass a message on."""
        self._line(text)

    def close(self) -> None:
        """Nothing to put back."""
        self._out.flush()

    @property
    def _state(self) -> Progress:
        assert self._progress is not None, "start comes first"
        return self._progress

    def _line(self, text: str) -> None:
        # A reason may span lines, a log has one event a line. Flushed: a pipe would hold lines back for minutes.
        print(" ".join(text.split()), file=self._out, flush=True)


class JsonView:
    """One JSON object for each event, `event` naming its kind; the numbers are those of the dataclasses."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def start(self, header: StudyHeader) -> None:
        """Write the header's fields."""
        self._write("start", asdict(header))

    def trial_started(self, trial: str, origin: str, summary: str, parameters: int) -> None:
        """Write a trial's size and origin."""
        fields = {"trial": trial, "origin": origin, "summary": summary, "parameters": parameters}
        self._write("trial_started", fields)

    def epoch(self, row: EpochRow) -> None:
        """Write the row's fields."""
        self._write("epoch", asdict(row))

    def trial_finished(self, trial: str, state: str, reason: str | None) -> None:
        """Write how a trial ended."""
        self._write("trial_finished", {"trial": trial, "state": state, "reason": reason})

    def message(self, text: str) -> None:
        """Write a message."""
        self._write("message", {"text": text})

    def close(self) -> None:
        """Nothing to put back."""
        self._out.flush()

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        # JSON has no NaN: a loss that diverged is null, not a line that programs cannot read.
        clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}
        print(json.dumps({"event": event, **clean}, ensure_ascii=False), file=self._out, flush=True)


class Tally:
    """A view that shows nothing and counts; `progress` is None before the start."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.events = 0

    def start(self, header: StudyHeader) -> None:
        """Begin to count."""
        self.progress = Progress(header)
        self.events += 1

    def trial_started(self, trial: str, origin: str, summary: str, parameters: int) -> None:
        """Count a trial in."""
        self._state.started(trial, origin, summary, parameters)
        self.events += 1

    def epoch(self, row: EpochRow) -> None:
        """Move a trial on."""
        self._state.epoch(row)
        self.events += 1

    def trial_finished(self, trial: str, state: str, reason: str | None) -> None:
        """Note how a trial ended."""
        self._state.finished(trial, state, reason)
        self.events += 1

    def message(self, text: str) -> None:
        """Nothing to count."""

    def close(self) -> None:
        """Nothing to put back."""

    @property
    def _state(self) -> Progress:
        assert self.progress is not None, "start comes first"
        return self.progress
