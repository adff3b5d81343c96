"""Manifests: which recordings there are and what their captions say. Reads text and columns, never audio.

A manifest is JSON Lines, JSON, CSV or Parquet with the columns `audio` (a path, absolute or relative to the manifest's
folder or to an audio root) and `caption` (a text) or `captions` (a list of texts), and optionally `split`, `clip_id`
and `language`; or a Hugging Face dataset folder (see `tuner.data.tables`). Several rows may name one recording.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.data.columns import SPLIT_NAMES, check_columns
from tuner.data.tables import EmbeddedAudio, read_dataset_folder, read_parquet
from tuner.errors import DataError


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
    raw = list(_raw_rows(path))
    if not raw:
        raise DataError(f"{path}: holds no rows; give a manifest with at least one recording")
    check_columns(path, (name for _, values in raw for name in values))
    folder = audio_root or (path if path.is_dir() else path.parent)
    rows = [_clip_row(path, folder.absolute(), row, values) for row, values in raw]
    if audio_root is not None:
        _confine(path, rows, audio_root)
    return rows


def _confine(path: Path, rows: Sequence[ClipRow], root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"--audio-root {root}: no such folder; give the one that holds the recordings")
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


def _raw_rows(path: Path) -> Iterable[tuple[int, Mapping[str, object]]]:
    if path.is_dir():
        return read_dataset_folder(path)
    readers = {".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    suffix = path.suffix.lower()
    if suffix != ".parquet" and suffix not in readers:
        raise DataError(f"{path}: unknown kind of manifest; give .jsonl, .json, .csv, .parquet or a dataset folder")
    if not path.exists():
        raise DataError(f"{path}: no such file; give an existing manifest")
    return read_parquet(path) if suffix == ".parquet" else readers[suffix](path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the manifest as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    # Not splitlines(): JSON strings may hold U+2028, which that would cut.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]}")
        yield number, values


def _read_json(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
    for number, values in enumerate(rows, start=1):
        if not isinstance(values, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, got {json.dumps(values)[:40]}")
        yield number, values


def _read_csv(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {start}: not valid CSV ({error}); check the quotes") from None
        if not values:
            continue
        if header is None:
            header = [name.strip() for name in values]
        elif len(values) != len(header):
            raise DataError(
                f"{path}, line {start}: {len(values)} fields where the header has {len(header)}; "
                "quote fields that hold a comma"
            )
        else:
            yield start, dict(zip(header, values, strict=True))


def _clip_row(path: Path, folder: Path, row: int, values: Mapping[str, object]) -> ClipRow:
    where = f"{path}, row {row}"
    audio = values.get("audio")
    captions = _captions(where, values)
    embedded = audio if isinstance(audio, EmbeddedAudio) else None
    name = f"{embedded.file.name}#{embedded.row}" if embedded else _text(where, "audio", audio) or ""
    clip_id = values.get("clip_id")
    return ClipRow(
        row=row,
        audio=embedded.file if embedded else folder / name,
        captions=captions,
        clip_id=str(clip_id).strip() if clip_id is not None and str(clip_id).strip() else name,
        split=_split(where, values.get("split")),
        language=_text(where, "language", values.get("language")),
        embedded=embedded,
        problem="no audio" if not name else None if captions else "no caption",
    )


def _text(where: str, field: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` must be text, got {value!r:.60}")
    if "\0" in value:
        raise DataError(f"{where}: `{field}` holds a NUL character; remove it")
    return value.strip() or None


def _captions(where: str, values: Mapping[str, object]) -> tuple[str, ...]:
    listed = values.get("captions")
    if isinstance(listed, str):
        # A CSV cell holds a list as JSON; any other text there is one caption.
        listed = _json_list(where, listed) if listed.lstrip().startswith("[") else [listed]
    if listed is not None and not isinstance(listed, list):
        raise DataError(f"{where}: `captions` must be a list of texts, got {listed!r:.60}")
    texts = [_text(where, "caption", values.get("caption"))]
    texts += [_text(where, "captions", item) for item in listed or []]
    return tuple(dict.fromkeys(text for text in texts if text))


def _json_list(where: str, cell: str) -> object:
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: `captions` is not a valid JSON list ({error.msg})") from None


def _split(where: str, value: object) -> str | None:
    name = _text(where, "split", value)
    if name is None:
        return None
    if name.lower() not in SPLIT_NAMES:
        raise DataError(f"{where}: unknown split {name!r}; use train, validation or test, or leave it blank")
    return SPLIT_NAMES[name.lower()]
