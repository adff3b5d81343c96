"""The known word that somebody probably meant, for hints in error messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

# Comparing takes the product of both lengths. Nobody mistypes a word of this length, but a damaged file may hold one.
LONGEST = 100
# A list may hold itself, or the same list so often that nobody can write it out.
_PARTS = reprlib.Repr()
_PARTS.maxlevel, _PARTS.maxstring, _PARTS.maxother = 3, 200, 200
_PARTS.maxtuple = _PARTS.maxlist = _PARTS.maxset = _PARTS.maxfrozenset = _PARTS.maxdict = 20


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The nearest of the known words, None where none is near or `word` is too long to be a word.

    Args:
        cutoff: smallest likeness that counts, 0 to 1.
    """
    if len(word) > LONGEST:
        return None
    matches = difflib.get_close_matches(word, [name for name in known if len(name) <= LONGEST], 1, cutoff)
    return matches[0] if matches else None


def shown(value: object, length: int = 60) -> str:
    """A value as Python writes it, cut to `length` characters: files hold values of any size and depth."""
    try:
        # A long text is cut first: its quoted form can be four times as long.
        text = repr(value[: length + 1]) if isinstance(value, str | bytes) else _PARTS.repr(value)
    except (RecursionError, ValueError):
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}..."
