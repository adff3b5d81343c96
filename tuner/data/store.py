"""The prepared store: features and text embeddings of all clips, memory-mapped. numpy and pyarrow only.

A store is a folder of uncompressed Arrow IPC files and `store.json`, which is written last and says what is inside,
what it was made from and how large each file is. Nothing is read but what is used: pages of features come from the
page cache, shared by all processes of a machine.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuner.arrow import check_plain
from tuner.config import EncoderRef
from tuner.data.splits import SPLITS
from tuner.errors import DataError

FORMAT = "tuner-store"
VERSION = 1
META_FILE = "store.json"
CLIPS_FILE = "clips.arrow"
CAPTIONS_FILE = "captions.arrow"
REJECTS_FILE = "rejects.jsonl"


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The contents of `store.json`, or None where the folder is no complete store."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


class Store:
    """Read access to a prepared store of N clips; open one with `Store.open`.

    Attributes:
        folder: where it lies.
        fingerprint: of everything the contents depend on.
        encoder: whose features these are.
        encoder_fingerprint: of that encoder when the store was made.
        text_encoder: source of the text encoder.
        text_fingerprint: of that text encoder when the store was made.
        text_dim: width D of the text embeddings.
        channels: feature channels C (mel bins, or 1 of a waveform).
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self.fingerprint: str = meta["fingerprint"]
        self.encoder = EncoderRef.parse(meta["encoder"], str(folder / META_FILE))
        self.encoder_fingerprint: str = meta["encoder_fingerprint"]
        self.text_encoder: str = meta["text_encoder"]
        self.text_fingerprint: str = meta["text_fingerprint"]
        self.text_dim: int = meta["text_dim"]
        self.channels: int = meta["feature_channels"]
        self._clips = _map(folder / CLIPS_FILE).read_all().combine_chunks()
        self._shards = [_map(folder / name) for name in meta["shards"]]
        self._shard_of, self._batch_of, self._slot_of = (self._column(name) for name in ("shard", "batch", "slot"))
        self._batches: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a complete store.

        Raises:
            DataError: not a store, not complete, of another version, or a file is missing or has another size.
        """
        folder = Path(folder).absolute()
        meta = read_meta(folder)
        if meta is None:
            raise DataError(f"{folder}: not a complete store (no valid {META_FILE}); make one with `tuner prepare`")
        if meta.get("version") != VERSION:
            raise DataError(
                f"{folder}: store version {meta.get('version')}, this program reads {VERSION}; prepare it again"
            )
        try:
            for name, size in meta["files"].items():
                path = folder / name
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                    raise DataError(f"{path}: {state}; the store is damaged, delete the folder and prepare it again")
            return cls(folder, meta)
        except (KeyError, TypeError, AttributeError, ValueError, pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{folder}: damaged store ({reason}); delete the folder and prepare it again") from None

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself instead of receiving their contents.
        return (Store.open, (self.folder,))

    def __len__(self) -> int:
        return int(self._clips.num_rows)

    @cached_property
    def frames(self) -> np.ndarray:
        """Real feature frames L of each clip, int32 [N]; `features` may hold more, which the encoder looks at."""
        return self._column("frames")

    @cached_property
    def seconds(self) -> np.ndarray:
        """Length of each recording in seconds, float32 [N]."""
        return self._column("seconds")

    @cached_property
    def clip_ids(self) -> list[str]:
        """The user's names of the recordings, [N]."""
        return self._texts("clip_id")

    @cached_property
    def audio(self) -> list[str]:
        """Where each recording came from, [N]: a path, or `FILE#ROW` for embedded audio."""
        return self._texts("audio")

    @cached_property
    def languages(self) -> list[str | None]:
        """Language of each clip where the manifest gave one, [N]."""
        languages: list[str | None] = self._clips.column("language").to_pylist()
        return languages

    @cached_property
    def captions(self) -> list[str]:
        """Distinct captions, [n_captions]; equal up to case and white space is one caption, in its first spelling."""
        captions: list[str] = self._caption_batch.column("text").to_pylist()
        return captions

    @cached_property
    def text_embeddings(self) -> np.ndarray:
        """L2-normalised embeddings of `captions`, float32 [n_captions, D], memory-mapped and read-only."""
        values: np.ndarray = self._caption_batch.column("embedding").values.to_numpy(zero_copy_only=True)
        return values.reshape(-1, self.text_dim)

    @property
    def split_names(self) -> list[str]:
        """Split of each clip, [N]."""
        return [SPLITS[position] for position in self._splits]

    def split(self, name: str) -> np.ndarray:
        """Clips of `train`, `validation` or `test` in manifest order, int64.

        Raises:
            DataError: no such split, or it is empty.
        """
        if name not in SPLITS:
            raise DataError(f"{self.folder}: no split {name!r}; there are {', '.join(SPLITS)}")
        clips = np.flatnonzero(self._splits == SPLITS.index(name)).astype(np.int64)
        if len(clips) == 0:
            raise DataError(
                f"{self.folder}: the {name} split is empty; give clips `split`: {name} in the manifest, or remove the "
                "column so that splits are drawn"
            )
        return clips

    def features(self, clip: int) -> np.ndarray:
        """Encoder features of one clip, float32 [C, F], read-only and without a copy.

        Raises:
            IndexError: no such clip.
        """
        if not 0 <= clip < len(self):
            raise IndexError(f"clip {clip} of {len(self)}")
        values, offsets = self._batch(int(self._shard_of[clip]), int(self._batch_of[clip]))
        slot = self._slot_of[clip]
        return values[offsets[slot] : offsets[slot + 1]].reshape(self.channels, -1)

    def clip_captions(self, clip: int) -> np.ndarray:
        """Indices into `captions` of one clip's captions, int64."""
        values, offsets = self._caption_lists
        return values[offsets[clip] : offsets[clip + 1]]

    def _batch(self, shard: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        if (shard, batch) not in self._batches:
            column = self._shards[shard].get_batch(batch).column("features")
            self._batches[shard, batch] = _list_arrays(column)
        return self._batches[shard, batch]

    def _column(self, name: str) -> np.ndarray:
        values: np.ndarray = self._clips.column(name).to_numpy()
        return values

    def _texts(self, name: str) -> list[str]:
        texts: list[str] = self._clips.column(name).to_pylist()
        return texts

    @cached_property
    def _splits(self) -> np.ndarray:
        return self._column("split")

    @cached_property
    def _caption_lists(self) -> tuple[np.ndarray, np.ndarray]:
        return _list_arrays(self._clips.column("captions").combine_chunks())

    @cached_property
    def _caption_batch(self) -> Any:
        return _map(self.folder / CAPTIONS_FILE).get_batch(0)


def _map(path: Path) -> Any:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    check_plain(reader.schema, path)
    return reader


def _list_arrays(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column without nulls."""
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True)
