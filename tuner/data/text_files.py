"""Rows of manifests that are text: JSON Lines, JSON, and tables separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.data.columns import check_repeated, is_read
from tuner.errors import DataError
from tuner.lfs import ADVICE, is_pointer
from tuner.near import shown
from tuner.plain_json import parse_json

Row = tuple[int, Mapping[str, object]]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon"}


def read_text_rows(path: Path) -> Iterator[Row]:
    """Rows of a file that ends in one of `SUFFIXES`, with their line counted from 1 (their place in a JSON list).

    Raises:
        DataError: the file cannot be read, is not UTF-8 or has broken syntax (names the line), or says something twice.
    """
    text = _read_text(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _table_rows(path, text)
    return _json_rows(path, text) if suffix == ".json" else _json_lines(path, text)


def _read_text(path: Path) -> str:
    if is_pointer(path):
        raise DataError(f"{path}: {ADVICE}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the manifest as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028, which that would cut.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json_object(_parse(path, line, number), f"{path}, line {number}")


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """A list of objects, or one below the one key of an object that holds such a list, as WavCaps has it (`data`)."""
    try:
        value = _parse(path, text, 1)
    except DataError:
        if text.lstrip().startswith("["):
            raise
        # Lines of JSON are no JSON document.
        yield from _json_lines(path, text)
        return
    rows = _rows_below(value)
    if rows is None:
        yield from _json_lines(path, text)
        return
    for number, row in enumerate(rows, start=1):
        yield number, _json_object(row, f"{path}, row {number}")


def _rows_below(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or "audio" in value:
        return None
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return parse_json(text, unique_keys=True)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise DataError(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise DataError(f"{path}, line {line}: {error}; correct this row") from None


def _json_object(value: Any, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {shown(value, 40)}")
    return value


def _table_rows(path: Path, text: str) -> Iterator[Row]:
    separator = _separator(path, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
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
            check_repeated(path, header)
        elif len(values) != len(header):
            raise DataError(
                f"{path}, line {start}: {len(values)} fields where the header has {len(header)}; "
                f"quote fields that hold {_SEPARATORS[separator]}"
            )
        else:
            yield start, dict(zip(header, values, strict=True))


def _separator(path: Path, text: str) -> str:
    """The one that gives the header most of the columns that are known; where none does, what the suffix says."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","

    def known(separator: str) -> tuple[int, bool]:
        names = [name.strip().strip('"') for name in header.split(separator)]
        return sum(is_read(name) for name in names), separator == usual

    return max(_SEPARATORS, key=known)
