"""Waiting out storage that is full or away for a moment, instead of ending a search that took hours.

Someone empties a disk, a file server comes back: most outages are shorter than what a restart costs. What lasts longer
than `PATIENCE_SECONDS` ends the search with a sentence, and `--resume` goes on from what was written last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tuner.errors import StudyError, first_line

# Shared with `tuner.storage`, which waits for buckets as this does for disks.
PATIENCE_SECONDS = float(os.environ.get("TUNER_STORAGE_PATIENCE", "120"))
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0

T = TypeVar("T")


class Patience:
    """Repeats what a full or absent disk made fail.

    Attributes:
        exhausted: the sentence that ended the search, once waiting was in vain. Some callers (Tune's loop) turn every
            exception into one of their own; this is where the reason is found.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is told when a wait begins and when it was worth it."""
        self.say = say
        self.exhausted: str | None = None

    def outlast(self, path: Path, attempt: Callable[[], T], troubles: tuple[type[Exception], ...] = (OSError,)) -> T:
        """Call `attempt` until it raises none of `troubles`; it must be safe to call again after one.

        Args:
            path: what is written or read, for the message.

        Raises:
            StudyError: it still fails after `PATIENCE_SECONDS`.
        """
        started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        waited = False
        while True:
            try:
                result = attempt()
            except troubles as error:
                reason = first_line(error)
                # Waited for in vain once, it is not waited for again while the search ends.
                if self.exhausted or time.monotonic() - started > PATIENCE_SECONDS:
                    self.exhausted = (
                        f"{path}: the storage has failed for {PATIENCE_SECONDS:.0f} s ({reason}); free space or mend it"
                    )
                    raise StudyError(self.exhausted) from error
                if not waited:
                    waited = True
                    self.say(f"{path}: {reason}; waiting up to {PATIENCE_SECONDS:.0f} s for the storage")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            if waited:
                self.say(f"{path}: the storage is back after {time.monotonic() - started:.0f} s")
            return result
