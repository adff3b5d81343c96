"""What the columns of a manifest are called, whatever kind of file it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from tuner.errors import DataError

COLUMNS = ("audio", "caption", "captions", "split", "clip_id", "language")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
}


def check_columns(path: Path, found: Iterable[str]) -> None:
    """Make sure that a manifest says where the audio is and what it is.

    Raises:
        DataError: a needed column is missing; names the columns found and the nearest one.
    """
    found = list(dict.fromkeys(found))
    for needed in (("audio",), ("caption", "captions")):
        if any(name in found for name in needed):
            continue
        others = [name for name in found if name not in COLUMNS]
        near = next((match for name in needed for match in difflib.get_close_matches(name, others, 1, 0.4)), None)
        hint = f"; should `{near}` be renamed?" if near else ""
        label = " or ".join(f"`{name}`" for name in needed)
        raise DataError(f"{path}: needs a column {label}, found {', '.join(found) or 'no columns'}{hint}")
