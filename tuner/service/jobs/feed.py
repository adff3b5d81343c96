"""The events of a search somewhere else, told to a view here: `JsonView` read back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from tuner.redact import printable
from tuner.report.live import View
from tuner.report.progress import EpochRow, StudyHeader

# How Ray's own lines begin in a job's log: of its Python, of its C++, and the stack that this prints when stopped.
RAY_LINE = re.compile(
    r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(DEBUG|INFO|WARNING)\b|\[\d{4}-\d\d-\d\d .*\] \w+\.cc:\d+: |"
    r"\*\*\* SIG\w+ received at |PC: @ |@ +0x)"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class EventFeed:
    """Passes lines on: events to the view, words of the search to `say`, lines of Ray's to nobody.

    Args:
        say: told what the search said for people, such as the sentence that it ended with.
    """

    def __init__(self, view: View, say: Callable[[str], None]) -> None:
        self.view, self.say = view, say

    def line(self, line: str) -> None:
        """One line of the search's output, standard output and standard error alike."""
        text = COLOURS.sub("", line).strip()
        event = read_event(text)
        if event is not None:
            # What is shown came from another machine, where anybody may have had a hand in it.
            self._tell(**{name: printable(v) if isinstance(v, str) else v for name, v in event.items()})
        elif text and not RAY_LINE.match(text):
            self.say(printable(text))

    def _tell(self, event: str, **fields: Any) -> None:
        if event == "start":
            self.view.start(StudyHeader(**fields))
        elif event == "epoch":
            # JSON has no NaN: a loss that diverged is null there.
            missing = {name: math.nan for name, value in fields.items() if value is None}
            self.view.epoch(EpochRow(**fields | missing))
        elif event == "trial_started":
            self.view.trial_started(**fields)
        elif event == "trial_finished":
            self.view.trial_finished(**fields)
        elif event == "message":
            self.view.message(**fields)


def read_event(text: str) -> dict[str, Any] | None:
    """The event of a line, or None where the line is none."""
    if not text.startswith('{"event": '):
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        # A line of another process got into the middle of it.
        return None
    return values if isinstance(values, dict) else None
