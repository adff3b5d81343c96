"""Views of a running search: a live table in a terminal, plain lines in a log, or JSON lines for programs."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

from tuner.study.events import EpochDone, Event, Message, StudyStarted, TrialEnded, TrialStarted, View
from tuner.study.progress import Progress
from tuner.study.wording import ORIGINS, counted, decimals, describe_config, describe_points

Kind = Literal["auto", "rich", "plain", "json"]


def make_view(kind: Kind = "auto", stream: TextIO | None = None) -> View:
    """The view of that kind on `stream` (default standard output); `auto` is `rich` in a terminal, else `plain`."""
    out = sys.stdout if stream is None else stream
    if kind == "auto":
        kind = "rich" if out.isatty() and os.environ.get("TERM") != "dumb" else "plain"
    if kind == "json":
        return JsonView(out)
    if kind == "plain":
        return PlainView(out)
    # rich takes a tenth of a second to import, which logs and programs need not wait for.
    from tuner.report.terminal import RichView

    return RichView(out)


class PlainView:
    """One line for each event, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._progress = Progress()

    def show(self, event: Event) -> None:
        """Write the event's line."""
        self._progress.apply(event)
        match event:
            case StudyStarted():
                self._started(event)
            case TrialStarted():
                self._trial_started(event)
            case EpochDone():
                self._epoch(event)
            case TrialEnded():
                self._line(f"{event.trial} {event.state}" + (f": {event.reason}" if event.reason else ""))
            case Message():
                self._line(event.text)

    def close(self) -> None:
        """Nothing to restore."""
        self._out.flush()

    def _started(self, event: StudyStarted) -> None:
        plan = f"{counted(event.trials, 'trial')} of {counted(event.epochs, 'epoch')}"
        self._line(f"study {event.study}, space {event.space}: {plan}, results in {event.run_dir}")
        if event.dashboard_url:
            self._line(f"Ray dashboard at {event.dashboard_url}")

    def _trial_started(self, event: TrialStarted) -> None:
        config, origin = describe_config(event.config), ORIGINS.get(event.origin, event.origin)
        what = config if config == origin else f"{origin}: {config}"
        trial = self._progress.history.get(event.trial)
        size = f", {trial.parameters:,} trainable parameters" if trial and trial.parameters is not None else ""
        self._line(f"{event.trial} started, {what}{size}")

    def _epoch(self, event: EpochDone) -> None:
        progress = self._progress
        if progress.plan is None:
            # In a job's log, another process may have written into the line with the plan.
            self._line(f"{event.trial} epoch {event.epoch} loss {decimals(event.loss)} [{event.seconds:.1f} s]")
            return
        measured = f"loss {decimals(event.loss)} {progress.metric} {decimals(event.metric(progress.metric))}"
        outlook = f"{describe_points(len(progress.front()))}, {progress.outlook()}"
        epoch = f"epoch {event.epoch}/{progress.started.epochs}"
        self._line(f"{event.trial} {epoch} {measured} [{event.seconds:.1f} s] {outlook}")

    def _line(self, text: str) -> None:
        # A reason may have several lines, but a log has one event per line. Without flush, a pipe delays lines.
        print(" ".join(text.split()), file=self._out, flush=True)


class JsonView:
    """One JSON object for each event: `Event.to_json`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, event: Event) -> None:
        """Write the event."""
        print(event.to_json(), file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to restore."""
        self._out.flush()


class Tally:
    """A view that shows nothing and keeps the progress; `events` counts the events that change it."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.events = 0

    def show(self, event: Event) -> None:
        """Add the event."""
        self.progress.apply(event)
        self.events += not isinstance(event, Message)

    def close(self) -> None:
        """Nothing to restore."""
