"""Which clips form a batch, which caption each clip gets, and how a batch is cut into forward passes.

The order depends on the data seed and the epoch alone, so every trial of a study sees the same batches, and a resumed
trial goes on with the batches that it would have seen. Batches are drawn at random over all lengths, so the negatives
are not sorted by length; only inside a batch, clips of similar length share a forward pass. So the loss of the whole
batch does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.data.store import Store


@dataclass(frozen=True)
class Batch:
    """Clips of one optimiser step (all workers) with the caption drawn for each."""

    clips_B: NDArray[np.int64]
    captions_B: NDArray[np.int64]


def steps_per_epoch(clips: int, batch_size: int) -> int:
    """Optimiser steps of one epoch: batches differ by at most one clip, none is dropped."""
    return max(1, round(clips / batch_size))


def epoch_batches(store: Store, clips: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of one epoch (1-based), each clip once, one of its captions drawn for it.

    NumPy's default generator with the seed `[seed, epoch]` draws the order of the clips, then a uniform number for each
    place in it; the share `u` picks caption `int(u * count)`. The first batches have one clip more where it does not
    divide.
    """
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(clips)
    picks = generator.random(len(clips))
    for part in np.array_split(np.arange(len(clips)), steps_per_epoch(len(clips), batch_size)):
        captions = [_draw(store.clip_captions(int(shuffled[i])), picks[i]) for i in part]
        yield Batch(shuffled[part], np.asarray(captions, dtype=np.int64))


def _draw(captions: NDArray[np.int64], uniform: float) -> int:
    return int(captions[int(uniform * len(captions))])


def same_pairs(store: Store, batch: Batch) -> NDArray[np.bool_]:
    """[B, B] True where the caption drawn for clip j is also a caption of clip i."""
    drawn: dict[int, list[int]] = {}
    for position, caption in enumerate(batch.captions_B.tolist()):
        drawn.setdefault(caption, []).append(position)
    same_BB = np.zeros((len(batch.clips_B), len(batch.clips_B)), dtype=np.bool_)
    for row, clip in enumerate(batch.clips_B):
        for caption in store.clip_captions(int(clip)).tolist():
            same_BB[row, drawn.get(caption, [])] = True
    return same_BB


def forward_groups(lengths: Sequence[int] | NDArray[np.int64], tokens_per_forward: int) -> list[NDArray[np.int64]]:
    """Cut positions 0..n-1 into groups of similar length whose tokens stay within the budget.

    Returns groups by falling length: clips of similar length attend together, and the largest attention comes first,
    so memory reaches its peak at once. A single clip longer than the budget is a group of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    total = np.cumsum(np.asarray(lengths)[order])
    groups: list[NDArray[np.int64]] = []
    start, spent = 0, 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(total, spent + tokens_per_forward, side="right")))
        groups.append(order[start:stop])
        start, spent = stop, int(total[stop - 1])
    return groups


def shard(lengths: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Positions that worker `rank` of `world` encodes: every world-th by length, so that all have the same work."""
    return np.sort(np.argsort(-lengths, kind="stable")[rank::world])
