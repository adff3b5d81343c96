"""The frozen part of the encoder below the first adapted block, computed once and shared by every trial.

LoRA never touches what lies below its first adapted block, so the hidden states that enter this block are constants of
the data set. `LivePrefix` computes them from features each time and is the reference; `CachedPrefix` reads them from a
memory-mapped file that all trials, workers and lanes of a machine share.

Shapes: B clips, T tokens (padded to the longest of the group), D width.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.data.store import Store
from tuner.encoders.base import AudioEncoder
from tuner.errors import DataError
from tuner.train.batches import forward_groups

FORMAT = 1
Progress = Callable[[int, int], None]


class Prefix(Protocol):
    """Hidden states that enter block `depth`."""

    depth: int

    def hidden(self, clips: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """States BTD of these clips and the mask BT of real tokens, on the encoder's device."""


class LivePrefix:
    """Stem and the blocks below `depth`, run anew for every call."""

    def __init__(self, encoder: AudioEncoder, store: Store, depth: int) -> None:
        self.encoder, self.store, self.depth = encoder, store, depth

    @torch.no_grad()
    def hidden(self, clips: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """See `Prefix.hidden`."""
        encoder = self.encoder
        features_BCF = encoder.pad_features([self.store.features(int(clip)) for clip in clips])
        frames_B = torch.from_numpy(self.store.frames[clips].astype(np.int64)).to(features_BCF.device)
        hidden_BTD = encoder.stem(features_BCF, frames_B)
        mask_BT = real_tokens(encoder.token_lengths(frames_B), hidden_BTD.shape[1])
        for index in range(self.depth):
            hidden_BTD = encoder.block(index, hidden_BTD, mask_BT)
        return hidden_BTD, mask_BT


class CachedPrefix:
    """The same states from a file of tokens, one row a token, in the encoder's own number format."""

    def __init__(self, folder: Path, depth: int, encoder: AudioEncoder, store: Store) -> None:
        self.depth, self.device = depth, next(encoder.tower.parameters()).device
        rows_N = row_lengths(encoder, store)
        self.offset_N = torch.from_numpy(np.concatenate([[0], np.cumsum(rows_N)[:-1]]))
        self.rows_N = torch.from_numpy(rows_N)
        self.length_N = encoder.token_lengths(torch.from_numpy(store.frames.astype(np.int64)))
        width, total = encoder.spec.hidden_size, int(rows_N.sum())
        dtype = next(encoder.tower.parameters()).dtype
        flat = torch.from_file(str(folder / "tokens.bin"), shared=False, size=total * width, dtype=dtype)
        self.table_RD = flat.view(total, width)

    def hidden(self, clips: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """See `Prefix.hidden`; padding repeats a clip's last row, which the mask hides."""
        picked_B = torch.from_numpy(clips)
        rows_B = self.rows_N[picked_B]
        token_T = torch.arange(int(rows_B.max()))
        row_BT = self.offset_N[picked_B, None] + torch.minimum(token_T, rows_B[:, None] - 1)
        hidden_BTD = self.table_RD[row_BT].to(self.device, non_blocking=True)
        return hidden_BTD, real_tokens(self.length_N[picked_B], len(token_T)).to(self.device)


def real_tokens(lengths_B: Tensor, width: int) -> Tensor:
    """Mask BT, True on a clip's own tokens."""
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]


def row_lengths(encoder: AudioEncoder, store: Store) -> NDArray[np.int64]:
    """Tokens that pass through the blocks for each clip of the store (padded to 30 s where the encoder pads)."""
    return np.asarray([encoder.spec.sequence_length(int(frames)) for frames in store.frames], dtype=np.int64)


def open_prefix(
    encoder: AudioEncoder, store: Store, depth: int, root: Path, tokens_per_forward: int, progress: Progress | None = None
) -> CachedPrefix:
    """Open the cache of this depth below `root`, filling it first if no process has done so.

    Raises:
        DataError: the disk is full.
    """
    dtype = str(next(encoder.tower.parameters()).dtype).removeprefix("torch.")
    name = f"{store.fingerprint[:16]}-{encoder.spec.fingerprint[:16]}-{depth}-{dtype}"
    folder = root / name
    manifest = folder / "complete.json"
    with _locked(root / f"{name}.lock"):
        if not manifest.exists():
            folder.mkdir(exist_ok=True)
            try:
                _fill(folder / "tokens.bin", LivePrefix(encoder, store, depth), tokens_per_forward, progress)
                staged = manifest.with_suffix(".tmp")
                staged.write_text(json.dumps({"format": FORMAT, "store": store.fingerprint, "depth": depth}))
                staged.replace(manifest)
            except OSError as error:
                raise DataError(f"{folder}: cannot be written ({error.strerror}); free disk space or set TUNER_CACHE") from error
    return CachedPrefix(folder, depth, encoder, store)


def _fill(path: Path, live: LivePrefix, tokens_per_forward: int, progress: Progress | None) -> None:
    rows_N = row_lengths(live.encoder, live.store)
    offset_N = np.concatenate([[0], np.cumsum(rows_N)])
    width, dtype = live.encoder.spec.hidden_size, next(live.encoder.tower.parameters()).dtype
    # Reserve the whole file first: a full disk is an error here, not a bus error in a mapped page later.
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(offset_N[-1]) * width * dtype.itemsize)
    table_RD = torch.from_file(str(path), shared=True, size=int(offset_N[-1]) * width, dtype=dtype).view(-1, width)
    done = 0
    for group in forward_groups(rows_N, tokens_per_forward):
        hidden_BTD, _ = live.hidden(group)
        for row, clip in enumerate(group):
            table_RD[offset_N[clip] : offset_N[clip + 1]] = hidden_BTD[row, : rows_N[clip]].cpu()
        done += len(group)
        if progress:
            progress(done, len(rows_N))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
