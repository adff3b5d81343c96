"""What a running search shows: a live table in a terminal, plain lines in a log, or JSON lines for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from typing import Any, Literal, Protocol, TextIO

from tuner.report.progress import EpochRow, Progress, StudyHeader, describe_points, describe_time

Kind = Literal["auto", "rich", "plain", "json"]


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
