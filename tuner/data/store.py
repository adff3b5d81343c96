"""The prepared store: features and text embeddings of all clips, memory-mapped. numpy and pyarrow only.

A store is a folder of uncompressed Arrow IPC files and `store.json`, which is written last and says what is inside,
what it was made from and how large each file is. Nothing is read but what is used: pages of features come from the
page cache, shared by all processes of a machine.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tuner.config import EncoderRef, describe_validation
from tuner.data.splits import SPLITS
from tuner.data.store_tables import feature_schema, map_file, read_captions, read_clips
from tuner.errors import DataError
from tuner.plain_json import parse_json

FORMAT = "tuner-store"
VERSION = 1
META_FILE = "store.json"
CLIPS_FILE = "clips.arrow"
CAPTIONS_FILE = "captions.arrow"
REJECTS_FILE = "rejects.jsonl"


def _plain(name: str) -> str:
    """They become names of files and folders here, and the store may be somebody else's."""
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise ValueError("is not the name of a file")
    return name


FileName = Annotated[str, AfterValidator(_plain)]


class StoreMeta(BaseModel):
    """What is read of `store.json`; the other fields are for people."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    fingerprint: FileName
    encoder: EncoderRef
    encoder_fingerprint: str
    text_encoder: str
    text_fingerprint: str
    text_dim: int = Field(ge=1)
    feature_channels: int = Field(ge=1)
    shards: list[FileName]
    files: dict[FileName, int]
    rows: int | None = None
    clips: int | None = None
    rejects: int | None = None

    @classmethod
    def parse(cls, meta: dict[str, Any]) -> StoreMeta:
        """Raises: ValueError: names the fields that are wrong."""
        try:
            return cls.model_validate(meta)
        except ValidationError as error:
            raise ValueError(describe_validation(error)) from None


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The contents of `store.json`, or None where the folder is no complete store."""
    try:
        meta = parse_json((folder / META_FILE).read_bytes())
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
        known = StoreMeta.parse(meta)
        self.fingerprint = known.fingerprint
        self.encoder = known.encoder
        self.encoder_fingerprint = known.encoder_fingerprint
        self.text_encoder = known.text_encoder
        self.text_fingerprint = known.text_fingerprint
        self.text_dim = known.text_dim
        self.channels = known.feature_channels
        self._shards = [map_file(folder / name, feature_schema()) for name in known.shards]
        self._captions = read_captions(folder / CAPTIONS_FILE, self.text_dim)
        batches = [shard.num_record_batches for shard in self._shards]
        self._clips = read_clips(folder / CLIPS_FILE, len(self._captions), batches)
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
            for name, size in StoreMeta.parse(meta).files.items():
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
        captions: list[Any] = self._captions.column("text").to_pylist()
        return captions

    @cached_property
    def text_embeddings(self) -> np.ndarray:
        """L2-normalised embeddings of `captions`, float32 [n_captions, D], memory-mapped and read-only."""
        column: Any = self._captions.column("embedding")
        values: np.ndarray = column.values.to_numpy(zero_copy_only=True)
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
            DataError: there are no features of this clip where they should be.
        """
        if not 0 <= clip < len(self):
            raise IndexError(f"clip {clip} of {len(self)}")
        values, offsets = self._batch(int(self._shard_of[clip]), int(self._batch_of[clip]))
        slot = int(self._slot_of[clip])
        found = values[offsets[slot] : offsets[slot + 1]] if slot + 1 < len(offsets) else values[:0]
        if not len(found) or len(found) % self.channels:
            raise self._damaged(f"clip {clip} has {len(found)} numbers of {self.channels} channels")
        return found.reshape(self.channels, -1)

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.folder}: damaged store ({reason}); delete the folder and prepare it again")

    def clip_captions(self, clip: int) -> np.ndarray:
        """Indices into `captions` of one clip's captions, int64."""
        values, offsets = self._caption_lists
        return values[offsets[clip] : offsets[clip + 1]]

    def _batch(self, shard: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        if (shard, batch) not in self._batches:
            try:
                column = self._shards[shard].get_batch(batch).column("features")
                column.validate()
            except (pa.ArrowException, ValueError, OSError) as error:
                raise self._damaged(" ".join(str(error).split())) from None
            self._batches[shard, batch] = _list_arrays(column)
        return self._batches[shard, batch]

    def _column(self, name: str) -> np.ndarray:
        values: np.ndarray = self._clips.column(name).to_numpy()
        return values

    def _texts(self, name: str) -> list[str]:
        texts: list[Any] = self._clips.column(name).to_pylist()
        return texts

    @cached_property
    def _splits(self) -> np.ndarray:
        return self._column("split")

    @cached_property
    def _caption_lists(self) -> tuple[np.ndarray, np.ndarray]:
        return _list_arrays(self._clips.column("captions").combine_chunks())


def _list_arrays(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column without nulls."""
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True)
