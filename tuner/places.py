"""Paths as users type them: looked at without exceptions, and made absolute where they are first read."""

from __future__ import annotations

from pathlib import Path


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False for every path that cannot be one (too long, NUL, no permission)."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file is there; False for every path that cannot be one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """Whether anything is there; False for every path that cannot be one."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def expanded(source: str) -> Path:
    """A path with its home folder filled in; as it is where nobody has that home."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def absolute_source(source: str) -> str:
    """An encoder as it is kept: an existing folder by its absolute path, everything else (a hub id) as it is.

    A store, a study or a card is read by processes with other working directories, so a relative path means something
    else there. Links are kept: a link named `current` is meant to follow what it points to.
    """
    folder = expanded(source)
    return str(folder.absolute()) if source and is_folder(folder) else source
