"""One driver a study: two that wrote the same journal and checkpoints would spoil both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tuner.errors import StudyError


@contextmanager
def only_driver(run_dir: Path) -> Iterator[None]:
    """Keep other drivers off a study. A driver that is killed holds nothing: the kernel keeps the lock.

    Raises:
        StudyError: another process is searching it.
    """
    # Beside the folder, which a study that cannot start leaves empty.
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_name(f".{run_dir.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(
            f"study {run_dir.name}: another process is searching it in {run_dir}; wait for it, or end it first"
        ) from None
    try:
        yield
    finally:
        # While it is held: whoever has opened it meanwhile finds that it has lost its name, and does not take it.
        path.unlink(missing_ok=True)
        lock.release()
