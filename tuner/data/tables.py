"""Columnar manifests by pyarrow: Parquet files, and dataset folders as Hugging Face's `datasets` writes them.

Two kinds of folder are read: what `save_to_disk` leaves (Arrow streams with `state.json`, or `dataset_dict.json` and
a folder per split), and Parquet shards as they lie in a hub repository (`train-00000-of-00002.parquet`). An `audio`
column of struct{bytes, path} stays where it is: rows refer to it by file and row, and whoever decodes reads it there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuner.arrow import check_plain
from tuner.data.columns import COLUMNS, SPLIT_NAMES, check_columns
from tuner.errors import DataError

Row = Mapping[str, object]


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
    return enumerate(_rows(path, _parquet_columns(path), split=None), start=1)


def read_dataset_folder(folder: Path) -> Iterator[tuple[int, Row]]:
    """Rows of all files of a dataset folder, counted from 1 through all files.

    The split comes from a `split` column, else from the folder's split or the shard's name.

    Raises:
        DataError: the folder holds no dataset, or one of its files is damaged.
    """
    return enumerate((row for file, split in _files(folder) for row in _file_rows(file, split)), start=1)


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
    try:
        return read(file, *arguments)
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as a {file.suffix} table ({reason}); copy it again") from None


def _files(folder: Path) -> list[tuple[Path, str | None]]:
    if (folder / "dataset_dict.json").exists():
        splits = _json_field(folder / "dataset_dict.json", "splits")
        return [(file, name) for name in splits for file, _ in _files(_below(folder, name))]
    if (folder / "state.json").exists():
        entries = _json_field(folder / "state.json", "_data_files")
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
        return [(_below(folder, name), None) for name in names]
    shards = sorted(file for file in folder.rglob("*.parquet") if not file.name.startswith("."))
    if not shards:
        raise DataError(
            f"{folder}: not a dataset folder (no state.json, dataset_dict.json or .parquet files); "
            "give the folder that save_to_disk wrote, or a manifest file"
        )
    return [(shard, _split_of_name(shard, folder)) for shard in shards]


def _below(folder: Path, name: object) -> Path:
    """A split or file that the folder's own JSON names: it was downloaded too, and could name any place."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise DataError(f"{folder}: names the file {name!r} outside its folder; the dataset is damaged, save it again")
    return folder / name


def _json_field(path: Path, field: str) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[field]
    except (OSError, ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, list):
        raise DataError(f"{path}: no list `{field}`; the dataset folder is damaged, save it again")
    return value


def _split_of_name(shard: Path, folder: Path) -> str | None:
    # Hub repositories name shards `train-00000-of-00002.parquet`, or keep each split in a folder of that name.
    names = (shard.stem.split("-")[0], *(part.name for part in shard.relative_to(folder).parents))
    return next((name for name in names if name in SPLIT_NAMES), None)


def _file_rows(file: Path, split: str | None) -> Iterator[Row]:
    table = _parquet_columns(file) if file.suffix == ".parquet" else _stream_columns(file)
    return _rows(file, table, split)


def _rows(file: Path, table: pa.Table, split: str | None) -> Iterator[Row]:
    for position, values in enumerate(table.to_pylist()):
        if "embedded" in table.column_names and values.pop("embedded"):
            values["audio"] = EmbeddedAudio(file, position)
        elif isinstance(values.get("audio"), dict):
            values["audio"] = values["audio"].get("path")
        if split is not None and values.get("split") is None:
            values["split"] = split
        yield values


def _parquet_columns(path: Path) -> pa.Table:
    table: pa.Table = _readable(path, _parquet_table)
    return table


def _parquet_table(path: Path) -> pa.Table:
    """The manifest columns of a file without audio bytes, and `embedded` [rows] where the file can hold them."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        check_columns(path, schema.names)
        check_plain(_used(schema), path)
        names = [name for name in schema.names if name in COLUMNS]
        if not _has_bytes(schema):
            return file.read(columns=names)
        names.remove("audio")
        if schema.field("audio").type.get_field_index("path") >= 0:
            names.append("audio.path")
        flags = [_embedded_flags(file, group) for group in range(file.num_row_groups)]
        return file.read(columns=names).append_column("embedded", pa.chunked_array(flags, pa.bool_()))


def _used(schema: pa.Schema) -> pa.Schema:
    """The columns that are read; what the others hold does not matter."""
    return pa.schema([field for field in schema if field.name in COLUMNS])


def _has_bytes(schema: pa.Schema) -> bool:
    index = schema.get_field_index("audio")
    kind = schema.field(index).type if index >= 0 else None
    return kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _embedded_flags(file: pq.ParquetFile, group: int) -> Any:
    """Which rows of a row group carry bytes: from the statistics if they decide it, else by reading the bytes."""
    meta = file.metadata.row_group(group)
    columns = (meta.column(index) for index in range(meta.num_columns))
    column = next(column for column in columns if column.path_in_schema == "audio.bytes")
    if column.statistics is not None:
        if column.statistics.null_count == 0:
            return pa.array([True] * meta.num_rows)
        if column.statistics.null_count == meta.num_rows:
            return pa.array([False] * meta.num_rows)
    table = file.read_row_group(group, columns=["audio.bytes"])
    return pa.array([value is not None for value in _bytes_column(table)], pa.bool_())


def _stream_columns(path: Path) -> pa.Table:
    table: pa.Table = _readable(path, _stream_table)
    check_columns(path, table.column_names)
    check_plain(_used(table.schema), path)
    columns = {name: table.column(name) for name in table.column_names if name in COLUMNS}
    if _has_bytes(table.schema):
        audio: Any = table.column("audio")
        embedded: list[Any] = [pc.is_valid(chunk.field("bytes")) for chunk in audio.chunks]
        columns["embedded"] = pa.chunked_array(embedded, pa.bool_())
        has_path = audio.type.get_field_index("path") >= 0
        columns["audio"] = pa.chunked_array(
            [chunk.field("path") if has_path else pa.nulls(len(chunk), pa.string()) for chunk in audio.chunks],
            pa.string(),
        )
    return pa.table(columns)


@lru_cache(maxsize=4)
def _stream_table(path: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _bytes_column(table: pa.Table) -> list[bytes | None]:
    audio: Any = table.column("audio")
    return [value for chunk in audio.chunks for value in chunk.field("bytes").to_pylist()]


def _parquet_bytes(path: Path, rows: Sequence[int]) -> list[bytes | None]:
    """Bytes of sorted rows; each row group is read once."""
    found: dict[int, bytes | None] = {}
    with pq.ParquetFile(path) as file:
        check_plain(_used(file.schema_arrow), path)
        first = 0
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            here = [row for row in rows if first <= row < after]
            if here:
                values = _bytes_column(file.read_row_group(group, columns=["audio.bytes"]))
                found.update((row, values[row - first]) for row in here)
            first = after
    if len(found) < len(set(rows)):
        raise IndexError(f"row {max(rows)} of {first}")
    return [found[row] for row in rows]


def _stream_bytes(path: Path, rows: Sequence[int]) -> list[bytes | None]:
    table: pa.Table = _stream_table(path).select(["audio"])
    check_plain(table.schema, path)
    return _bytes_column(table.take(rows))
