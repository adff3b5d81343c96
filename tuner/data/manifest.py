"""Manifests: which recordings there are and what their captions say. Reads text and columns, never audio.

A manifest is JSON Lines, JSON, CSV, TSV or Parquet with the columns `audio` (a path or file:// URI, absolute or
relative to the manifest's folder or to an audio root) and `caption` (a text or a list of texts), `captions` or
`caption_1` and on, and optionally `split`, `clip_id` and `language`; or a folder as `datasets` knows it (see
`tuner.data.tables`). AudioCaps, Clotho and WavCaps are read as they are published. Several rows may name one recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.data.columns import (
    RECORDING_IDS,
    SPLIT_NAMES,
    audio_value,
    caption_names,
    check_columns,
    check_split_words,
)
from tuner.data.dataset_folder import read_dataset_folder
from tuner.data.file_names import name_files_by_id, names_files, recording_path
from tuner.data.tables import EmbeddedAudio, read_parquet
from tuner.data.text_files import SUFFIXES, read_text_rows
from tuner.errors import DataError, Field
from tuner.near import shown
from tuner.places import is_file, is_folder
from tuner.plain_json import parse_json

Row = tuple[int, Mapping[str, object]]


@dataclass(frozen=True)
class ClipRow:
    """One manifest row.

    Attributes:
        row: line of the file counted from 1 (the header of a CSV is line 1); row counted from 1 in columnar files,
            running on through the files of a dataset folder.
        audio: absolute path of the recording; for embedded audio, the file that holds it.
        captions: the texts that describe the recording, never blank.
        clip_id: the user's name of the recording; the audio value as written where the manifest has no `clip_id`.
        split: train, validation, test, or None where splits are to be drawn.
        language: as given.
        embedded: where the bytes are, if the dataset carries its audio inside.
        problem: why this row cannot be used (`no caption`, `no audio`), else None.
    """

    row: int
    audio: Path
    captions: tuple[str, ...]
    clip_id: str
    split: str | None = None
    language: str | None = None
    embedded: EmbeddedAudio | None = None
    problem: str | None = None


def read_manifest(path: Path, audio_root: Path | None = None) -> list[ClipRow]:
    """Read all rows of a manifest file or dataset folder, in order.

    A row whose audio or caption is blank is kept with its `problem`, so that it can be listed as a reject; broken
    syntax is an error, since nothing after it can be trusted.

    Args:
        audio_root: what relative paths of recordings are relative to, and outside of which none may be, links followed;
            files with embedded audio neither. None: the folder of the manifest, and no limit.

    Raises:
        DataError: missing file, unknown kind of file, broken syntax (names the line), a missing column (names the
            columns found), a value of the wrong type, an unknown split or a recording outside the audio root (names the
            row).
    """
    # Absolute, since rows of embedded audio name the file itself, and other processes read it.
    path = path.absolute()
    raw = list(_raw_rows(path))
    if not raw:
        raise DataError(f"{path}: holds no rows; give a manifest with at least one recording")
    folder = (audio_root or (path if path.is_dir() else path.parent)).absolute()
    raw = _with_files(path, folder, raw)
    check_split_words(path, (str(values["split"]) for _, values in raw if isinstance(values.get("split"), str)))
    rows = [_clip_row(path, folder, row, values) for row, values in raw]
    if audio_root is not None:
        _confine(path, rows, audio_root)
    return rows


def _with_files(path: Path, folder: Path, rows: list[Row]) -> list[Row]:
    names = dict.fromkeys(name for _, values in rows for name in values)
    by_id = any(name in names for name in RECORDING_IDS) and not names_files(rows)
    check_columns(path, names, by_id)
    named = name_files_by_id(path, folder, rows) if by_id else None
    check_columns(path, names, named is not None)
    return rows if named is None else named


def _confine(path: Path, rows: Sequence[ClipRow], root: Path) -> None:
    if not is_folder(root):
        raise DataError(Field("audio_root"), f" {root}: no such folder; give the one that holds the recordings")
    inside = root.resolve()
    for row in rows:
        if row.problem != "no audio" and not _leads_into(row.audio, inside):
            raise DataError(
                f"{path}, row {row.row}: {row.audio} is outside the audio root {root}; move the recording inside"
            )


def _leads_into(audio: Path, folder: Path) -> bool:
    try:
        return audio.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):
        # Links that lead in a circle lead nowhere.
        return False


def _raw_rows(path: Path) -> Iterable[Row]:
    _check_unicode(f"{path!s}", "the path of the manifest", str(path))
    if is_folder(path):
        return read_dataset_folder(path)
    suffix = path.suffix.lower()
    if suffix != ".parquet" and suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of manifest; give .jsonl, .json, .csv, .tsv, .parquet or a dataset folder"
        )
    if not is_file(path):
        raise DataError(f"{path}: no such file; give an existing manifest")
    return read_parquet(path) if suffix == ".parquet" else read_text_rows(path)


def _clip_row(path: Path, folder: Path, row: int, values: Mapping[str, object]) -> ClipRow:
    where = f"{path}, row {row}"
    audio = audio_value(values)
    captions = _captions(where, values)
    embedded = audio if isinstance(audio, EmbeddedAudio) else None
    name = _embedded_name(path, embedded) if embedded else _text(where, "audio", audio) or ""
    return ClipRow(
        row=row,
        audio=embedded.file if embedded else recording_path(folder, name),
        captions=captions,
        clip_id=_clip_id(where, values.get("clip_id")) or name,
        split=_split(where, values.get("split")),
        language=_language(values.get("language")),
        embedded=embedded,
        problem="no audio" if not name else None if captions else "no caption",
    )


def _embedded_name(path: Path, audio: EmbeddedAudio) -> str:
    """Files of all splits and configurations of a dataset have the same names, so the folders below it count too."""
    file = audio.file.relative_to(path) if audio.file.is_relative_to(path) and audio.file != path else audio.file.name
    return f"{file}#{audio.row}"


def _text(where: str, field: str, value: object) -> str | None:
    if _is_blank(value):
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` must be text, got {shown(value)}")
    if "\0" in value:
        raise DataError(f"{where}: `{field}` holds a NUL character; remove it")
    _check_unicode(where, f"`{field}`", value)
    return value.strip() or None


def _check_unicode(where: str, what: str, value: str) -> None:
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        where = where.encode("utf-8", "replace").decode()
        raise DataError(f"{where}: {what} holds half a character (a lone surrogate), so it is no text; write it again")


def _is_blank(value: object) -> bool:
    """Whether nothing was given: pandas writes NaN where a table has no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _clip_id(where: str, value: object) -> str | None:
    if _is_blank(value) or isinstance(value, str):
        return _text(where, "clip_id", value)
    if not isinstance(value, int | float):
        raise DataError(f"{where}: `clip_id` must be text or a number, got {shown(value)}")
    return str(value)


def _language(value: object) -> str | None:
    """Nothing depends on it, so what is no text is dropped."""
    if not isinstance(value, str) or "\0" in value or not value.isprintable():
        return None
    return value.strip() or None


def _captions(where: str, values: Mapping[str, object]) -> tuple[str, ...]:
    texts = [text for name in caption_names(values) for text in _texts(where, name, values[name])]
    return tuple(dict.fromkeys(text for text in texts if text))


def _texts(where: str, field: str, value: object) -> list[str | None]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        # A CSV cell holds a list as JSON. A caption alone may begin with a bracket too.
        value = _json_list(where, field, value)
    if field == "captions" and not isinstance(value, str | list) and not _is_blank(value):
        raise DataError(f"{where}: `captions` must be a list of texts, got {shown(value)}")
    return [_text(where, field, item) for item in (value if isinstance(value, list) else [value])]


def _json_list(where: str, field: str, cell: str) -> object:
    try:
        value = parse_json(cell)
    except ValueError as error:
        if field != "captions":
            return cell
        reason = getattr(error, "msg", error)
        raise DataError(f"{where}: `captions` is not a valid JSON list ({reason})") from None
    return value if field == "captions" or all(isinstance(item, str) for item in value) else cell


def _split(where: str, value: object) -> str | None:
    name = _text(where, "split", value)
    if name is None:
        return None
    if name.casefold() not in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {shown(name)}; use train, validation or test, or leave it blank")
    return SPLIT_NAMES[name.casefold()]
