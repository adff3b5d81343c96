"""Exit codes, lines for people, and progress: what commands write to a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from tuner.redact import printable, redact

FAILED = 2
INTERRUPTED = 130  # as shells have it for SIGINT
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal

Progress = Callable[[int, int], None]  # called with the number done and the total


def tell(text: str) -> None:
    """A line of an answer that holds words of other people, on standard output."""
    typer.echo(printable(redact(text)))


def say(text: str) -> None:
    """A line for people, on standard error, so that standard output stays for programs."""
    print(printable(redact(text)), file=sys.stderr, flush=True)  # noqa: T201


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the program with one sentence."""
    sys.stdout.flush()
    say(f"tuner: {message}")
    sys.exit(code)


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
