"""One driver per study: two drivers would corrupt its journal and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tuner.errors import StudyError


@contextmanager
def only_driver(run_dir: Path) -> Iterator[None]:
    """Keep other drivers of this machine away from a study. The kernel frees the lock of a killed driver.

    Raises:
        StudyError: another process is searching it.
    """
    # Next to the folder, not in it: a study that cannot start must leave the folder empty.
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_name(f".{run_dir.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(
            f"study {run_dir.name}: another process is running it in {run_dir}; wait for it, or end it first"
        ) from None
    try:
        yield
    finally:
        # Remove it while it is held: a process that opened it meanwhile sees that it is removed, and does not take it.
        path.unlink(missing_ok=True)
        lock.release()
