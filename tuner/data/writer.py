"""Writing a store: features as they arrive in any order, then the tables, `store.json` last.

All files are written into a `.partial` folder beside the target, which takes the target's name at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from tuner.data.store import CAPTIONS_FILE, CLIPS_FILE, FORMAT, META_FILE, VERSION, read_meta
from tuner.data.store_tables import CLIP_SCHEMA, caption_schema
from tuner.errors import DataError, Field

SHARD_BYTES = 1 << 30
_DISK_FAULTS = {
    errno.ENOSPC: "the disk is full; free space or give another folder",
    errno.EDQUOT: "the disk quota is used up; free space or give another folder",
    errno.EACCES: "no permission to write here; give another folder",
    errno.EPERM: "no permission to write here; give another folder",
    errno.EROFS: "the disk is read-only; give another folder",
    errno.ENOTDIR: "a parent of this folder is a file; give another folder",
    errno.EEXIST: "a parent of this folder is a file; give another folder",
}
# These say nothing of the disk: they count only where they are about the very place that is written to.
_NAME_FAULTS = {
    errno.ENOENT: "there is no such place and it cannot be made; give another folder",
    errno.EISDIR: "is a folder; give another name",
    errno.ENAMETOOLONG: "this name is too long; give a shorter one",
    errno.ELOOP: "this is a link that leads in a circle; give another folder",
    errno.EINVAL: "the disk does not take this name; give another one",
}


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn a full or forbidden disk, or a place that no file can have, into one sentence.

    Raises:
        DataError: names the folder and what to do.
    """
    try:
        yield
    except OSError as error:
        faults = _DISK_FAULTS | (_NAME_FAULTS if _is_about(error, folder) else {})
        if error.errno not in faults:
            raise
        raise DataError(f"{folder}: {faults[error.errno]}") from None


def _is_about(error: OSError, place: Path) -> bool:
    if not isinstance(error.filename, str | bytes | Path):
        return False
    path = Path(os.fsdecode(error.filename)).absolute()
    return path.is_relative_to(place.absolute().parent) or place.absolute().is_relative_to(path)


def check_new_file(target: Path) -> None:
    """Make sure that a file can be written as `target`, before work is put into its contents; its folder is made.

    Raises:
        DataError: `target` is a folder, or its folder cannot be made or written to.
    """
    with disk_faults(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = _staged(target)
        staged.touch()
        staged.unlink()


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file to write in place of `target`, which it replaces at the end; removed again if anything fails.

    Raises:
        DataError: it cannot be written, see `check_new_file`.
    """
    check_new_file(target)
    staged = _staged(target)
    with disk_faults(target):
        try:
            yield staged
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)


def _staged(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp")


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Wait until no other process writes `target`; nothing is left of the lock."""
    path = target.with_name(f".{target.name}.lock")
    with FileLock(path):
        try:
            yield
        finally:
            # Removed while it is held: whoever waits for it sees that it is gone, and makes a new one.
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill in place of `target`, which it replaces at the end; removed again if anything fails.

    The caller holds a lock on `target`: a folder left by a killed process is emptied.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Make sure that nothing but a store, or nothing at all, would be replaced.

    Raises:
        DataError: `target` is a file, or a folder with other contents.
    """
    if target.is_dir() and (read_meta(target) is not None or not any(target.iterdir())):
        return
    if target.exists():
        raise DataError(f"{target}: exists and is not a store; give a new folder with ", Field("out"))


def _replace_folder(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)


class FeatureWriter:
    """Appends batches of features to Arrow shards and remembers where each clip went."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shards: list[str] = []
        self._shard_bytes = shard_bytes
        self._places: dict[int, tuple[int, int, int]] = {}
        self._file: Any = None
        self._writer: Any = None
        self._batch = 0

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, clips: Sequence[int], features: pa.Array[Any]) -> None:
        """Append features of some clips: a list of C x F float32 values each."""
        batch = pa.record_batch({"features": features})
        if self._writer is None or self._file.tell() + batch.nbytes > self._shard_bytes:
            self._next_shard(batch.schema)
        self._writer.write_batch(batch)
        for slot, clip in enumerate(clips):
            self._places[clip] = (len(self.shards) - 1, self._batch, slot)
        self._batch += 1

    def places(self, clips: Sequence[int]) -> np.ndarray:
        """Shard, batch and slot of each of N clips, int32 [N, 3]."""
        return np.array([self._places[clip] for clip in clips], dtype=np.int32).reshape(-1, 3)

    def close(self) -> None:
        """Finish the open shard."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._file:
                writer.close()

    def _next_shard(self, schema: pa.Schema) -> None:
        self.close()
        name = f"features-{len(self.shards):05d}.arrow"
        self._file = (self.folder / name).open("wb")
        self._writer = pa.ipc.new_file(self._file, schema)
        self.shards.append(name)
        self._batch = 0


def write_clips(folder: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Write one row a clip with the columns of `CLIP_SCHEMA`, in the order of the store."""
    _write_table(folder / CLIPS_FILE, pa.table(dict(columns), schema=CLIP_SCHEMA))


def write_captions(folder: Path, texts: Sequence[str], embeddings: np.ndarray) -> None:
    """Write n captions and their embeddings, float32 [n, D]."""
    values = pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1))
    width = embeddings.shape[1]
    column = pa.FixedSizeListArray.from_arrays(values, width)
    columns: list[Any] = [pa.array(texts, pa.string()), column]
    _write_table(folder / CAPTIONS_FILE, pa.Table.from_arrays(columns, schema=caption_schema(width)))


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Seal the folder: `store.json` with the size of every file in it, after all of them are on disk."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name in files:
        _flush(folder / name)
    temporary = folder / f".{META_FILE}.partial"
    content = {"format": FORMAT, "version": VERSION, **meta, "files": files}
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.replace(folder / META_FILE)


def _write_table(path: Path, table: pa.Table) -> None:
    # One record batch a file, so that each column is one contiguous memory-mapped array.
    with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _flush(path: Path) -> None:
    """A sealed store must survive a power cut, so its files reach the disk before its name does."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
