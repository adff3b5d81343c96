"""Columnar files by pyarrow: Parquet, and the Arrow streams of `datasets`.

An `audio` column that holds recordings (bytes, or struct{bytes, path}) stays where it is: rows refer to it by file and
row, and whoever decodes reads it there. Text and bytes may be of any of Arrow's types for them (large, view,
dictionary), since pandas, polars and `datasets` each have their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuner.arrow import check_plain
from tuner.data.columns import check_columns, check_repeated, is_read
from tuner.errors import DataError
from tuner.lfs import ADVICE, is_pointer

Row = Mapping[str, object]
_EMBEDDED = "embedded"
# Text that is none, dates that Python has no year for, times of zones that nobody knows.
_UNREADABLE = (ValueError, OverflowError, LookupError)
_BYTES_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)


@dataclass(frozen=True)
class EmbeddedAudio:
    """A recording inside a columnar file: its row there, counted from 0."""

    file: Path
    row: int


def read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of one Parquet file, counted from 1.

    Raises:
        DataError: the file is not Parquet.
    """
    return enumerate(read_table(path), start=1)


def read_table(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file, or of an Arrow stream of any other suffix.

    Raises:
        DataError: the file is damaged, holds text that is none, or lacks a needed column.
    """
    table = _readable(file, _parquet_columns if file.suffix == ".parquet" else _stream_columns)
    columns = {name: _values(file, name, table.column(name)) for name in table.column_names}
    embedded = columns.pop(_EMBEDDED, None)
    for position in range(table.num_rows):
        row = {name: values[position] for name, values in columns.items()}
        if embedded is not None and embedded[position]:
            row["audio"] = EmbeddedAudio(file, position)
        elif isinstance(row.get("audio"), dict):
            row["audio"] = row["audio"].get("path")
        yield row


def read_audio_bytes(audio: Sequence[EmbeddedAudio]) -> list[bytes]:
    """Bytes of N embedded recordings, in the order asked for.

    Raises:
        DataError: a file is damaged or no longer holds the row.
    """
    found: dict[EmbeddedAudio, bytes] = {}
    for file in dict.fromkeys(item.file for item in audio):
        rows = sorted(item.row for item in audio if item.file == file)
        read = _parquet_bytes if file.suffix == ".parquet" else _stream_bytes
        found.update(zip((EmbeddedAudio(file, row) for row in rows), _readable(file, read, rows), strict=True))
    return [found[item] for item in audio]


def _readable(file: Path, read: Callable[..., Any], *arguments: object) -> Any:
    if is_pointer(file):
        raise DataError(f"{file}: {ADVICE}")
    try:
        return read(file, *arguments)
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as a {file.suffix} table ({reason}); copy it again") from None


def _values(file: Path, name: str, column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (pa.ArrowException, *_UNREADABLE) as error:
        row = next(row for row in range(len(column)) if _is_broken(column[row]))
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        raise DataError(f"{file}, row {row + 1}: `{name}` {reason}; write this value again") from None


def _is_broken(value: Any) -> bool:
    try:
        value.as_py()
    except (pa.ArrowException, *_UNREADABLE):
        return True
    return False


def _parquet_columns(path: Path) -> pa.Table:
    """The manifest columns of a file without audio bytes, and `embedded` [rows] where the file can hold them."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        read = _used(path, schema)
        names, held = read.names, _holds_bytes(schema)
        if held is None:
            return file.read(columns=names)
        names.remove("audio")
        if held != "audio" and schema.field("audio").type.get_field_index("path") >= 0:
            names.append("audio.path")
        flags = [_embedded_flags(file, group, held) for group in range(file.num_row_groups)]
        return file.read(columns=names).append_column(_EMBEDDED, pa.chunked_array(flags, pa.bool_()))


def _used(path: Path, schema: pa.Schema) -> pa.Schema:
    """The columns that are read; what the others hold does not matter, and no more does a language that is no text."""
    check_columns(path, schema.names)
    check_repeated(path, (name for name in schema.names if is_read(name)))
    used = [field for field in schema if is_read(field.name) and (field.name != "language" or _is_text(field.type))]
    found = pa.schema(used)
    check_plain(found, path)
    return found


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_bytes(schema: pa.Schema) -> str | None:
    """The path of the column that holds the bytes of recordings, None where `audio` holds none."""
    index = schema.get_field_index("audio")
    kind = schema.field(index).type if index >= 0 else None
    if kind is None:
        return None
    if pa.types.is_struct(kind):
        return "audio.bytes" if kind.get_field_index("bytes") >= 0 else None
    if isinstance(kind, pa.DictionaryType):
        kind = kind.value_type
    return "audio" if any(of_type(kind) for of_type in _BYTES_TYPES) else None


def _embedded_flags(file: pq.ParquetFile, group: int, held: str) -> Any:
    """Which rows of a row group carry bytes: from the statistics if they decide it, else by reading the bytes."""
    meta = file.metadata.row_group(group)
    columns = (meta.column(index) for index in range(meta.num_columns))
    column = next(column for column in columns if column.path_in_schema == held)
    if column.statistics is not None:
        if column.statistics.null_count == 0:
            return pa.array([True] * meta.num_rows)
        if column.statistics.null_count == meta.num_rows:
            return pa.array([False] * meta.num_rows)
    return _bytes_column(file.read_row_group(group, columns=[held])).is_valid()


def _stream_columns(path: Path) -> pa.Table:
    table = _stream_table(path)
    used = _used(path, table.schema)
    columns: dict[str, Any] = {name: table.column(name) for name in used.names}
    if _holds_bytes(table.schema) is not None:
        columns[_EMBEDDED] = _bytes_column(table).is_valid()
        audio = columns.pop("audio")
        if pa.types.is_struct(audio.type) and audio.type.get_field_index("path") >= 0:
            columns["audio"] = _field(audio, "path")
    return pa.table(columns)


@lru_cache(maxsize=4)
def _stream_table(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _bytes_column(table: pa.Table) -> Any:
    audio: Any = table.column("audio")
    return _field(audio, "bytes") if pa.types.is_struct(audio.type) else audio


def _field(column: Any, name: str) -> Any:
    """A field of a struct column; null where the struct is."""
    index = column.type.get_field_index(name)
    # flatten(), unlike field(), heeds the validity of the struct itself.
    chunks = [chunk.flatten()[index] for chunk in column.chunks]
    return pa.chunked_array(chunks, column.type.field(index).type)


def _parquet_bytes(path: Path, rows: Sequence[int]) -> list[bytes | None]:
    """Bytes of sorted rows; each row group is read once."""
    found: dict[int, bytes | None] = {}
    with pq.ParquetFile(path) as file:
        check_plain(pa.schema([file.schema_arrow.field("audio")]), path)
        held, first = _holds_bytes(file.schema_arrow), 0
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            here = [row for row in rows if first <= row < after]
            if here:
                values = _bytes_column(file.read_row_group(group, columns=[held]))
                found.update((row, values[row - first].as_py()) for row in here)
            first = after
    if len(found) < len(set(rows)):
        raise IndexError(f"row {max(rows)} of {first}")
    return [found[row] for row in rows]


def _stream_bytes(path: Path, rows: Sequence[int]) -> list[bytes | None]:
    table = _stream_table(path)
    check_plain(pa.schema([table.schema.field("audio")]), path)
    # Row by row, since Arrow cannot take() from all types.
    values = _bytes_column(table)
    return [values[row].as_py() for row in rows]
