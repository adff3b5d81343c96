"""The frozen part of the encoder below the first adapted block, computed once and shared by every trial.

LoRA changes nothing below its first adapted block, so the hidden states that enter this block are constants of the data
set. `LivePrefix` computes them from features each time and is the reference; `CachedPrefix` reads them from a
file that all trials, workers and lanes of a machine share.

Shapes: B clips, N tokens of all clips end to end, D width, R rows of the cache file.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from tuner.data.store import Store
from tuner.encoders.base import AudioEncoder, Hidden
from tuner.errors import DataError
from tuner.train.batches import forward_groups

FORMAT = 1
TOKENS_FILE = "tokens.bin"
Progress = Callable[[int, int], None]


class FeatureSource(Protocol):
    """Where features come from: a store, or a few clips in memory."""

    @property
    def frames(self) -> NDArray[np.int32]:
        """Real frames of each clip."""

    def features(self, clip: int) -> NDArray[np.float32]:
        """Features [C, F] of one clip."""


class Prefix(Protocol):
    """Hidden states that enter block `depth`."""

    depth: int

    def hidden(self, clips: NDArray[np.int64]) -> Hidden:
        """States of these clips on the encoder's device."""


class LivePrefix:
    """Stem and the blocks below `depth`, run again for every call."""

    def __init__(self, encoder: AudioEncoder, store: FeatureSource, depth: int) -> None:
        self.encoder, self.store, self.depth = encoder, store, depth

    @torch.no_grad()
    def hidden(self, clips: NDArray[np.int64]) -> Hidden:
        """See `Prefix.hidden`."""
        encoder = self.encoder
        features_BCF = encoder.pad_features([self.store.features(int(clip)) for clip in clips])
        return encoder.advance(encoder.begin(features_BCF, frame_counts(self.store, clips)), 0, self.depth)


class CachedPrefix:
    """The same states from a file of tokens, one row for each token, in the encoder's own number format.

    Rows are read, not mapped: mapped pages would count as memory of every worker, and a lost file would kill it.
    """

    def __init__(self, folder: Path, depth: int, encoder: AudioEncoder, store: Store, made: bool = False) -> None:
        self.depth, self.encoder, self.store = depth, encoder, store
        self.made = made  # by this process, rather than found
        self.read_clips = self.read_bytes = 0
        self.rows_N = row_lengths(encoder, store, depth)
        self._row_bytes = encoder.spec.width(depth) * encoder.dtype.itemsize
        self._start_N = np.concatenate([[0], np.cumsum(self.rows_N)]) * self._row_bytes
        self._path = folder / TOKENS_FILE
        self._file = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def hidden(self, clips: NDArray[np.int64]) -> Hidden:
        """See `Prefix.hidden`.

        Raises:
            DataError: the file has become shorter.
        """
        lengths = self.rows_N[clips].tolist()
        packing = self.encoder.packing(lengths, self.depth)
        rows = np.empty((packing.tokens, self._row_bytes), dtype=np.uint8)
        self.read_clips, self.read_bytes = self.read_clips + len(clips), self.read_bytes + rows.nbytes
        own = np.split(rows, np.cumsum(lengths))[:-1]
        for clip, clip_rows in zip(clips, own, strict=True):
            if os.preadv(self._file, [clip_rows.data], int(self._start_N[clip])) != clip_rows.nbytes:
                raise DataError(f"{self._path}: shorter than it was; remove its folder, the next run makes it again")
        states_ND = torch.from_numpy(rows).view(self.encoder.dtype).to(self.encoder.device, non_blocking=True)
        return Hidden(states_ND, packing, frame_counts(self.store, clips))

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return int(self._start_N[-1])


@dataclass(frozen=True)
class PrefixUse:
    """How much a pack has used its prefix caches."""

    files: int = 0  # in use
    made: int = 0  # of these, computed by this process
    file_bytes: int = 0
    read_clips: int = 0
    read_bytes: int = 0


def prefix_use(prefixes: Iterable[Prefix]) -> PrefixUse:
    """The sum over all prefixes that are files."""
    cached = [prefix for prefix in prefixes if isinstance(prefix, CachedPrefix)]
    return PrefixUse(
        files=len(cached),
        made=sum(prefix.made for prefix in cached),
        file_bytes=sum(prefix.file_bytes for prefix in cached),
        read_clips=sum(prefix.read_clips for prefix in cached),
        read_bytes=sum(prefix.read_bytes for prefix in cached),
    )


def frame_counts(store: FeatureSource, clips: NDArray[np.int64]) -> Tensor:
    """Real feature frames of clips, int64."""
    return torch.from_numpy(store.frames[clips].astype(np.int64))


def row_lengths(encoder: AudioEncoder, store: FeatureSource, depth: int = 0) -> NDArray[np.int64]:
    """Tokens that enter block `depth` for each clip of the store (those of 30 s where the encoder pads)."""
    frames, places = np.unique(store.frames, return_inverse=True)
    lengths = [encoder.spec.sequence_length(count, depth) for count in frames.tolist()]
    return np.array(lengths, dtype=np.int64)[places]


def open_prefix(
    encoder: AudioEncoder,
    store: Store,
    depth: int,
    root: Path,
    tokens_per_forward: int,
    progress: Progress | None = None,
) -> CachedPrefix:
    """Open the cache of this depth below `root`, filling it first if no process has done so.

    Raises:
        DataError: the disk is full.
    """
    dtype = str(encoder.dtype).removeprefix("torch.")
    name = f"{store.fingerprint[:16]}-{encoder.spec.fingerprint[:16]}-{depth}-{dtype}"
    folder = root / name
    manifest = folder / "complete.json"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        made = not manifest.exists()
        if made:
            folder.mkdir(exist_ok=True)
            try:
                # A separate store: the features are read once, and their mapped pages are freed with it.
                features = Store.open(store.folder)
                _fill(folder / TOKENS_FILE, LivePrefix(encoder, features, depth), tokens_per_forward, progress)
                staged = manifest.with_suffix(".tmp")
                staged.write_text(json.dumps({"format": FORMAT, "store": store.fingerprint, "depth": depth}))
                staged.replace(manifest)
            except OSError as error:
                (folder / TOKENS_FILE).unlink(missing_ok=True)
                raise DataError(
                    f"{folder}: cannot be written ({error.strerror}); free disk space or move the cache (TUNER_CACHE)"
                ) from error
    return CachedPrefix(folder, depth, encoder, store, made)


def _fill(path: Path, live: LivePrefix, tokens_per_forward: int, progress: Progress | None) -> None:
    rows_N = row_lengths(live.encoder, live.store, live.depth)
    offset_N = np.concatenate([[0], np.cumsum(rows_N)])
    width, dtype = live.encoder.spec.width(live.depth), live.encoder.dtype
    # Reserve the whole file first: a full disk is an error here, not a bus error in a mapped page later.
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(offset_N[-1]) * width * dtype.itemsize)
    table_RD = torch.from_file(str(path), shared=True, size=int(offset_N[-1]) * width, dtype=dtype).view(-1, width)
    done = 0
    # Grouped by the tokens that enter the first block: all blocks below `depth` run, and sequences only get shorter.
    for group in forward_groups(row_lengths(live.encoder, live.store), tokens_per_forward):
        hidden = live.hidden(group)
        for clip, states_TD in zip(group, hidden.packing.split(hidden.states_ND.cpu()), strict=True):
            table_RD[offset_N[clip] : offset_N[clip + 1]] = states_TD
        done += len(group)
        if progress:
            progress(done, len(rows_N))
