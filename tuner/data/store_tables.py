"""The tables of a store: their columns, and whether what they hold can be true.

A file may be damaged where its size does not show it, and Arrow reads a wrong offset as an address. So types, offsets
and numbers of clips, captions and batches are checked when a store is opened; the features themselves are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuner.arrow import check_plain
from tuner.data.splits import SPLITS

_CLIP_COLUMNS: list[tuple[str, Any]] = [
    ("clip_id", pa.string()),
    ("audio", pa.string()),
    ("language", pa.string()),
    ("split", pa.int8()),  # position in SPLITS
    ("frames", pa.int32()),
    ("seconds", pa.float32()),
    ("captions", pa.list_(pa.int64())),
    ("shard", pa.int32()),
    ("batch", pa.int32()),
    ("slot", pa.int32()),
]
CLIP_SCHEMA = pa.schema(_CLIP_COLUMNS)
_MAY_BE_NULL = ("language",)


def caption_schema(text_dim: int) -> pa.Schema:
    """Columns of the captions: their texts, and their embeddings of this width."""
    return pa.schema([pa.field("text", pa.string()), pa.field("embedding", pa.list_(pa.float32(), text_dim))])


def feature_schema() -> pa.Schema:
    """The column of a shard: the features of each clip, flat."""
    return pa.schema([pa.field("features", pa.list_(pa.float32()))])


def map_file(path: Path, schema: pa.Schema) -> Any:
    """A reader of a memory-mapped file.

    Raises:
        DataError: reading its values would run code.
        ValueError: it has other columns.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    check_plain(reader.schema, path)
    if not reader.schema.equals(schema):
        found = ", ".join(f"{field.name} ({field.type})" for field in reader.schema)
        raise ValueError(f"{path.name} has the columns {found[:200]}")
    return reader


def read_captions(path: Path, text_dim: int) -> pa.RecordBatch:
    """All captions; raises as `map_file`, and where they are not whole."""
    reader = map_file(path, caption_schema(text_dim))
    if reader.num_record_batches != 1:
        raise ValueError(f"{path.name} has {reader.num_record_batches} batches instead of one")
    batch: pa.RecordBatch = reader.get_batch(0)
    batch.validate(full=True)
    _check_present(path, batch)
    return batch


def read_clips(path: Path, captions: int, batches: Sequence[int]) -> pa.Table:
    """All clips; raises as `map_file`, and where a number leads nowhere.

    Args:
        captions: number of captions.
        batches: number of batches of each shard.
    """
    clips: pa.Table = map_file(path, CLIP_SCHEMA).read_all().combine_chunks()
    clips.validate(full=True)
    _check_present(path, clips)
    if not len(clips):
        return clips
    _check_range(path, "split", _numbers(clips, "split"), len(SPLITS))
    _check_range(path, "shard", _numbers(clips, "shard"), len(batches))
    _check_range(path, "batch", _numbers(clips, "batch"), np.asarray(batches)[_numbers(clips, "shard")])
    _check_range(path, "slot", _numbers(clips, "slot"), np.iinfo(np.int32).max)
    _check_range(path, "frames", _numbers(clips, "frames") - 1, np.iinfo(np.int32).max)
    lists: Any = clips.column("captions").combine_chunks()
    if int(np.diff(lists.offsets.to_numpy()).min()) < 1:
        raise ValueError(f"{path.name} has a clip without captions")
    _check_range(path, "captions", lists.values.to_numpy(), captions)
    return clips


def _numbers(clips: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = clips.column(name).to_numpy()
    return values


def _check_present(path: Path, table: pa.Table | pa.RecordBatch) -> None:
    for name in table.schema.names:
        column: Any = table.column(name)
        inner = column.combine_chunks().values if name in ("captions",) else column
        if name not in _MAY_BE_NULL and (column.null_count or inner.null_count):
            raise ValueError(f"{path.name} has no value of {name} in some row")


def _check_range(path: Path, name: str, values: np.ndarray, end: int | np.ndarray) -> None:
    if bool(np.any((values < 0) | (values >= end))):
        raise ValueError(f"{path.name} has a {name} that does not exist")
