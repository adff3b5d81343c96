"""Exit codes, lines for people, and progress: what commands write to a terminal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from tuner.redact import printable, redact

FAILED = 2
INTERRUPTED = 130  # as shells have it for SIGINT
# Characters of one word, such as a path, and of a whole sentence; of one that is longer, its end is shown too.
LONGEST_WORD, LONGEST_LINE, LAST_PART = 400, 2_000, 500
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal

Progress = Callable[[int, int], None]  # called with the number done and the total


def tell(text: str) -> None:
    """A line of an answer that holds words of other people, on standard output."""
    typer.echo(printable(redact(text)))


def say(text: str) -> None:
    """A line for people, on standard error, so that standard output stays for programs."""
    print(printable(redact(text)), file=sys.stderr, flush=True)  # noqa: T201


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the program with one sentence on one line, however long the words are that it quotes."""
    sys.stdout.flush()
    say(f"tuner: {_readable(message)}")
    sys.exit(code)


def _readable(message: str) -> str:
    line = " ".join(message.splitlines())
    line = _LONG_WORD.sub(lambda word: f"{word[0][:LONGEST_WORD]}...", line)
    # What to do comes last.
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - LAST_PART]} ... {line[-LAST_PART:]}"


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar in a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_progress(label)
        return
    # Slow to import, and needed in a terminal alone.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(label: str) -> Progress:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            say(f"{label}: {done} of {total}")

    return show
