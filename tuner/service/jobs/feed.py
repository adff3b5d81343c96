"""The events of a search somewhere else, shown in a view here: `JsonView` read back."""

from __future__ import annotations

import re
from collections.abc import Callable

from tuner.redact import printable
from tuner.study.events import View, parse_line, read_event

# How Ray's own lines begin in a job's log: of its Python, of its C++, and the stack that this prints when stopped.
RAY_LINE = re.compile(
    r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(DEBUG|INFO|WARNING)\b|\[\d{4}-\d\d-\d\d .*\] \w+\.cc:\d+: |"
    r"\*\*\* SIG\w+ received at |PC: @ |@ +0x)"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class EventFeed:
    """Passes lines on: events to the view, other words of the search to `say`, lines of Ray's to nobody.

    Args:
        say: called with what the search printed for people, such as the sentence that it ended with.
    """

    def __init__(self, view: View, say: Callable[[str], None]) -> None:
        self.view, self.say = view, say

    def line(self, line: str) -> None:
        """One line of the search's output, standard output and standard error alike."""
        text = COLOURS.sub("", line).strip()
        # A line of another process may have got into the middle of an event, which is then lost.
        values = parse_line(text) if text.startswith('{"event": ') else None
        if values is not None:
            # What is shown came from another machine, where anybody may have had a hand in it.
            event = read_event({name: _printable(value) for name, value in values.items()})
            if event is not None:
                self.view.show(event)
        elif text and not RAY_LINE.match(text):
            self.say(printable(text))


def _printable(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(str(name)): _printable(item) for name, item in value.items()}
    return value
