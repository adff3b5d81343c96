"""JSON of other people, whatever it holds: everything that cannot be read is a `ValueError` with a short reason."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes, unique_keys: bool = False) -> Any:
    """The value that one JSON document holds.

    Args:
        unique_keys: refuse an object that has a key twice; else the last one wins, as JSON parsers do.

    Raises:
        json.JSONDecodeError: broken syntax, with its line and column.
        ValueError: what Python cannot hold (nested too deeply, a number of thousands of digits), text that is not
            UTF-8, or a key that is written twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        # Python's own limit says how to lift it, which is of no use to the owner of the file.
        if "integer string conversion" in str(error):
            raise ValueError("holds a whole number of more than 4300 digits") from None
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} is written twice")
    return values
