"""Whether a place on the command line can be read or written, found out before any work.

Each function raises `ConfigError` with the option in its one sentence. Nothing is left behind.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from tuner.errors import ConfigError, Field, disk_reason

LONGEST_NAME = 255  # bytes, on all usual file systems
# Outputs are written beside their place under longer names, such as `.NAME.partial`.
LONGEST_NEW_NAME = LONGEST_NAME - 15


def check_input(field: str, path: Path) -> None:
    """A file or folder that is there."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        raise _refusal(field, path, error) from None


def check_output_file(field: str, path: Path) -> None:
    """A file to write or to replace, in a folder that exists."""
    _check_names(field, path)
    try:
        mode = path.stat().st_mode if path.exists() else None
        if mode is not None and stat.S_ISDIR(mode):
            raise _refused(field, path, "is a folder; give a file")
        if mode is not None and not stat.S_ISREG(mode):
            raise _refused(field, path, "is not an ordinary file; give another one")
        folder = path.absolute().parent
        if not folder.exists():
            raise _refused(field, path, f"there is no folder {path.parent}; make it first or give another place")
        _try_writing(folder)
    except (OSError, ValueError) as error:
        raise _refusal(field, path, error) from None


def check_output_folder(field: str, path: Path) -> None:
    """A folder to make or to fill; folders above it may be missing, too."""
    _check_names(field, path)
    try:
        path = path.absolute()
        there = next(place for place in (path, *path.parents) if place.exists())
        if there == path and not path.is_dir():
            raise _refused(field, path, "is a file; give a folder")
        _try_writing(there)
    except (OSError, ValueError) as error:
        raise _refusal(field, path, error) from None


def check_new_folder(field: str, path: Path) -> None:
    """A folder to make, where nothing is yet."""
    check_output_folder(field, path)
    if path.exists():
        raise _refused(field, path, "exists; give a new folder")


def _check_names(field: str, path: Path) -> None:
    if any(len(os.fsencode(name)) > LONGEST_NEW_NAME for name in path.parts):
        shown = Path(*(name if len(name) < 60 else f"{name[:40]}..." for name in path.parts))
        raise _refused(field, shown, f"a name in it has over {LONGEST_NEW_NAME} bytes; give a shorter one")


def _try_writing(folder: Path) -> None:
    """Permissions do not tell all: a mount may be read-only, a server may refuse. So make a file, without a name."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileNotFoundError:
        # Of a folder that is there: /proc and the like.
        raise PermissionError(errno.EACCES, "no files can be made here") from None


def _refusal(field: str, path: Path, error: OSError | ValueError) -> ConfigError:
    reason = disk_reason(error) if isinstance(error, OSError) else None
    said = error.strerror if isinstance(error, OSError) else str(error)
    shown = str(path) if len(str(path)) < 300 else f"{str(path)[:300]}..."
    return _refused(field, Path(shown), reason or f"cannot be used ({said}); give another place")


def _refused(field: str, path: Path, reason: str) -> ConfigError:
    return ConfigError(Field(field), f" {path}: {reason}")
