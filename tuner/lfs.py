"""Git LFS pointers: the few lines of text that stand for a large file which a clone has not fetched."""

from __future__ import annotations

from pathlib import Path

_HEAD = b"version https://git-lfs.github.com/spec/"
ADVICE = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it again"


def is_pointer(source: Path | bytes) -> bool:
    """Whether a file, or the bytes of one, is such a pointer; False where there is no file to read."""
    if isinstance(source, bytes):
        return source.startswith(_HEAD)
    try:
        with source.open("rb") as file:
            return file.read(len(_HEAD)) == _HEAD
    except (OSError, ValueError):
        return False
