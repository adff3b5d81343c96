"""Text files that are whole or as they were before: written under a temporary name, renamed last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file, encoded as UTF-8."""
    staged = path.with_name(path.name + ".tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
