"""Names of a manifest's columns, the same for every kind of file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tuner.errors import DataError
from tuner.near import nearest

COLUMNS = ("audio", "caption", "captions", "split", "clip_id", "language")
# As `datasets` names them in the metadata of an audio folder; read where our own names are absent.
AUDIO_NAMES = ("audio", "file_name")
OTHER_CAPTIONS = ("transcription",)
# Columns that say which recording is meant without naming its file: AudioCaps and WavCaps, as they are published.
RECORDING_IDS = ("youtube_id", "id")
ID_COLUMNS = (*RECORDING_IDS, "audiocap_id", "start_time")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "development": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_NUMBERED = re.compile(r"captions?_?(\d{1,4})", re.ASCII)
_LETTERS = re.compile(r"[^\W\d_]+")
LISTED = 20  # column names in a message


def is_read(name: str) -> bool:
    """Whether a column can be one of those that are read as audio, caption, split, clip id or language."""
    return name in COLUMNS or name in AUDIO_NAMES or name in OTHER_CAPTIONS or _NUMBERED.fullmatch(name) is not None


def caption_names(names: Iterable[str]) -> list[str]:
    """The columns that hold captions, in order: `caption`, `captions`, `caption_1` and on, else `transcription`."""
    names = list(names)
    numbered = {name: int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))}
    own = [name for name in ("caption", "captions") if name in names]
    found = [*own, *sorted(numbered, key=lambda name: (numbered[name], name))]
    return found or [name for name in OTHER_CAPTIONS if name in names][:1]


def split_word(name: str) -> str | None:
    """The word in a name that says which split it is, folded: `Train-00000` is `train`, `clotho_val` is `val`.

    Words are what digits and signs leave between them. The leading one decides; else all that are names of a split
    have to be of the same one.
    """
    words: list[str] = [word.casefold() for word in _LETTERS.findall(name)]
    known = [word for word in words if word in SPLIT_NAMES]
    if known and (words[0] == known[0] or len({SPLIT_NAMES[word] for word in known}) == 1):
        return known[0]
    return None


def check_split_words(path: Path, words: Iterable[str]) -> None:
    """Refuse `development` beside a split for validation: Clotho trains on it, others validate on it.

    Raises:
        DataError: says which two names there are.
    """
    there = {word.casefold() for word in words}
    validation = sorted(word for word in there if SPLIT_NAMES.get(word) == "validation" and word != "development")
    if "development" in there and validation:
        raise DataError(
            f"{path}: has a split `development` and a split `{validation[0]}`, so it is not clear which one is for "
            "training; rename `development` to train or validation"
        )


def check_repeated(path: Path, names: Iterable[str]) -> None:
    """Raises: DataError: two columns have one name, so one of them would be lost."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise DataError(
            f"{path}: has several columns `{twice[0][:60]}`; give each its own name "
            "(several captions of a clip are `caption_1`, `caption_2`, ...)"
        )


def check_columns(path: Path, found: Iterable[str], by_id: bool = False) -> None:
    """Make sure that a manifest says where the audio is and what it is.

    Args:
        by_id: a column of `RECORDING_IDS` will do, whose files are looked for.

    Raises:
        DataError: a needed column is missing; names the columns found and the nearest one.
    """
    found = list(dict.fromkeys(found))
    audio = (*AUDIO_NAMES, *(RECORDING_IDS if by_id else ()))
    needed = {("audio",): any(name in found for name in audio), ("caption", "captions"): bool(caption_names(found))}
    for names, there in needed.items():
        if there:
            continue
        others = [name for name in found if name not in COLUMNS]
        near = next((match for name in names if (match := nearest(name, others, 0.4))), None)
        hint = f"; should `{near}` be renamed?" if near else ""
        label = " or ".join(f"`{name}`" for name in names)
        raise DataError(f"{path}: needs a column {label}, found {_listed(found)}{hint}")


def audio_value(values: Mapping[str, object]) -> object:
    """Where a row's recording is, as written; None where the row does not say.

    WavCaps is published with the words `wav_path` in place of each path.
    """
    given = (values.get(name) for name in AUDIO_NAMES)
    return next((value for value in given if value is not None and value != "wav_path"), None)


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return ", ".join(name[:60] for name in names[:LISTED]) + more if names else "no columns"
