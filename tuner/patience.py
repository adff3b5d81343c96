"""Patience with disks and buckets that are full or unreachable for a moment.

Someone frees space, or a file server comes back: most outages are shorter than a restart takes. A longer one ends the
search with one sentence, and `--resume` continues from the last state on disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tuner.errors import ConfigError, StudyError, first_line

PATIENCE_VARIABLE = "TUNER_STORAGE_PATIENCE"
DEFAULT_SECONDS, LONGEST_SECONDS = 120.0, 86400.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 10.0

T = TypeVar("T")


def patience_seconds() -> float:
    """How long to retry a failing disk or bucket: `$TUNER_STORAGE_PATIENCE`, else two minutes.

    Raises:
        ConfigError: the variable is not a number of seconds from 0 to a day.
    """
    given = os.environ.get(PATIENCE_VARIABLE)
    if not given:
        return DEFAULT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_SECONDS:  # true for NaN, too
        raise ConfigError(f"{PATIENCE_VARIABLE}={given}: give a number of seconds from 0 to {LONGEST_SECONDS:.0f}")
    return seconds


class Wait:
    """The pauses between attempts at one thing: each twice as long as the one before, `seconds` from the first to the
    last attempt.

    Attributes:
        paused: whether there has been a pause.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.paused = seconds, False
        self._started, self._next = time.monotonic(), FIRST_PAUSE_SECONDS

    @property
    def elapsed(self) -> float:
        """Seconds since the first attempt."""
        return time.monotonic() - self._started

    @property
    def over(self) -> bool:
        """Whether there is no time for another attempt."""
        return self.elapsed >= self.seconds

    def pause(self) -> None:
        """Sleep until the next attempt, which may be the last."""
        self.paused = True
        pause, before = max(0.0, min(self._next, self.seconds - self.elapsed)), time.monotonic()
        time.sleep(pause)
        # Where this process was stopped meanwhile, nobody was asked.
        self._started += max(0.0, time.monotonic() - before - pause)
        self._next = min(2 * self._next, LONGEST_PAUSE_SECONDS)


class Patience:
    """Retries what failed because a disk is full or unreachable.

    Attributes:
        exhausted: the sentence that ended the search, after waiting did not help. Some callers (Tune's loop) turn every
            exception into one of their own, so the reason is kept here.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is called when a wait begins and when the storage works again."""
        self.say = say
        self.exhausted: str | None = None

    def outlast(self, path: Path, attempt: Callable[[], T], troubles: tuple[type[Exception], ...] = (OSError,)) -> T:
        """Call `attempt` until it raises none of `troubles`; it must be safe to call again after one.

        Args:
            path: what is written or read, for the message.

        Raises:
            StudyError: it still fails after `patience_seconds()`.
            ConfigError: as `patience_seconds`; read at the first failure.
        """
        wait: Wait | None = None
        while True:
            try:
                result = attempt()
            except troubles as error:
                wait = wait or Wait(patience_seconds())
                reason = first_line(error)
                # After one wait that did not help there is no other while the search ends.
                if self.exhausted or wait.over:
                    self.exhausted = (
                        f"{path}: the storage has failed for {wait.seconds:.0f} s ({reason}); free space or repair it"
                    )
                    raise StudyError(self.exhausted) from error
                if not wait.paused:
                    self.say(f"{path}: {reason}; waiting up to {wait.seconds:.0f} s for the storage")
                wait.pause()
                continue
            if wait is not None:
                self.say(f"{path}: the storage is back after {wait.elapsed:.0f} s")
            return result
