"""How the speed decomposes: one epoch of the project's own training core, one lever after another, on the same clips.

It starts as the peer computes (30 s of padding, fp32, features computed again in each epoch, torch's dropout) and ends
as the project does. Every row keeps the levers of the rows above, so their factors multiply to the whole.

Shapes: B clips, T tokens of the longest clip, N tokens of all clips, D width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import nn

from benchmarks import run
from benchmarks.share import make_share
from benchmarks.table import factor, show
from tuner.config import EncoderRef, LoraSpec, Precision, RunSettings, TrialConfig
from tuner.data.audio import decode, resample
from tuner.data.prepare import prepare
from tuner.data.store import Store
from tuner.encoders.base import AudioEncoder, Hidden, real_token_mask
from tuner.encoders.packed import Group, Packing
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.errors import TrialFailed
from tuner.train.pack import Pack, PackContext
from tuner.train.precision import dtype_of
from tuner.train.prefix import FeatureSource, LivePrefix, Prefix, frame_counts

RECOMMENDED = LoraSpec(rank=16, alpha_ratio=2.0, dropout=0.1, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
# Fast epochs are repeated, since the first one compiles kernels and touches cold pages; a padded one takes minutes.
ENOUGH_SECONDS = 10.0
MAX_EPOCHS = 4


class WholeBatch(Packing):
    """Clips padded to the longest of the batch, as a tensor BTD is: padding runs through every layer and is masked."""

    def __init__(self, lengths: list[int], encoder: AudioEncoder) -> None:
        width, batch = max(lengths), len(lengths)
        super().__init__([width] * batch, encoder.dtype, encoder.device)
        mask_BT = real_token_mask(torch.tensor(lengths, device=encoder.device), width)
        bias_BT = torch.zeros(batch, width, dtype=encoder.dtype, device=encoder.device)
        bias_BT = bias_BT.masked_fill(~mask_BT, torch.finfo(encoder.dtype).min)
        self.groups = (Group(0, batch * width, batch, width, None, None, bias_BT[:, None, :]),)


class PaddedPrefix(LivePrefix):
    """States of a batch before block 0, every clip as long as the longest."""

    @torch.no_grad()
    def hidden(self, clips: NDArray[np.int64]) -> Hidden:
        """See `Prefix.hidden`."""
        features_BCF = self.encoder.pad_features([self.store.features(int(clip)) for clip in clips])
        frames_B = frame_counts(self.store, clips)
        states_BTD = self.encoder.stem(features_BCF, frames_B.to(self.encoder.device))
        packing = WholeBatch([self.encoder.spec.sequence_length(frames) for frames in frames_B.tolist()], self.encoder)
        return Hidden(packing.join_batch(states_BTD), packing, frames_B)


class PaddedPack(Pack):
    """A pack that pads each forward pass to its longest clip; the reference of the packed one."""

    def prefix(self, depth: int) -> Prefix:
        """See `Pack.prefix`."""
        assert depth == 0, "only adapters from block 0 on are compared"
        return PaddedPrefix(self.encoder, self.store, depth)


class FeaturesEachTime:
    """Features from the recordings, decoded and padded to 30 s at every use, as a data set in memory of a user does."""

    def __init__(self, store: Store, encoder: AudioEncoder) -> None:
        self.frames = store.frames
        self._audio, self._spec = store.audio, encoder.spec
        extractor: Any = load_feature_extractor(encoder.spec)
        self._extract = extractor.extractor

    def features(self, clip: int) -> NDArray[np.float32]:
        """Features [C, F] of one clip."""
        waveform = resample(decode(Path(self._audio[clip]), self._spec.max_seconds), self._spec.sampling_rate)
        features: NDArray[np.float32] = self._extract(waveform, sampling_rate=self._spec.sampling_rate)[
            "input_features"
        ][0]
        return features


class UncachedPack(Pack):
    """A pack that computes features from the recordings at every use."""

    def prefix(self, depth: int) -> Prefix:
        """See `Pack.prefix`."""
        source: FeatureSource = FeaturesEachTime(self.store, self.encoder)
        return LivePrefix(self.encoder, source, depth)


@dataclass(frozen=True)
class Lever:
    """One row: what is added, and how the core is built with it and all levers before."""

    name: str
    pack: type[Pack] = Pack
    pad_to_30s: bool = False
    precision: Precision = "fp32"
    own_dropout: bool = False
    cached_prefix: bool = False


LEVERS = (
    Lever("as the peer: 30 s, fp32, features each epoch", UncachedPack, pad_to_30s=True),
    Lever("+ features from the store", pad_to_30s=True),
    Lever("+ truncated to the clip, batch padded to its longest", PaddedPack),
    Lever("+ packed tokens, no padding"),
    Lever("+ bf16", precision="bf16"),
    Lever("+ LoRA layers in one step, dropout by random bits", precision="bf16", own_dropout=True),
    Lever("+ cached prefix (convolutions)", precision="bf16", own_dropout=True, cached_prefix=True),
)


def build(lever: Lever, store: Store, batch_size: int, prefix_root: Path) -> Pack:
    """The training core with this lever and all before it, and one member `t`."""
    reference = EncoderRef(source=store.encoder.source, pad_to_30s=lever.pad_to_30s)
    encoder = load_encoder(inspect_encoder(reference), dtype_of(lever.precision))
    settings = RunSettings(
        store=str(store.folder), encoder=reference, epochs=MAX_EPOCHS, batch_size=batch_size, tokens_per_forward=8192
    )
    pack = lever.pack(PackContext(encoder, store, settings, prefix_root=prefix_root if lever.cached_prefix else None))
    dropout: AbstractContextManager[Any] = nullcontext()
    if not lever.own_dropout:
        dropout = patch("tuner.lora.adapter.LoraDropout", nn.Dropout)
    with dropout:
        pack.attach("t", TrialConfig(lora=RECOMMENDED))
    pack.prefix(0)
    return pack


def best_epoch_seconds(pack: Pack) -> tuple[float, int]:
    """Seconds of the fastest epoch and how many ran: one when it takes long, else a few."""
    seconds: list[float] = []
    while len(seconds) < MAX_EPOCHS and sum(seconds) < ENOUGH_SECONDS:
        row = pack.train_epoch(["t"])["t"]
        if isinstance(row, TrialFailed):
            raise row
        seconds.append(row["train_seconds"])
    return min(seconds), len(seconds)


def measure(store: Store, batch_size: int, say: Callable[[str], None]) -> list[tuple[str, float, int]]:
    """Name, seconds of one epoch over the training split, and epochs run, for each lever."""
    results = []
    with tempfile.TemporaryDirectory(prefix="tuner-bench-") as folder:
        for lever in LEVERS:
            say(f"measuring: {lever.name}")
            results.append((lever.name, *best_epoch_seconds(build(lever, store, batch_size, Path(folder)))))
    return results


def show_levers(results: list[tuple[str, float, int]], clips: int) -> None:
    """Print the levers with what each brings over the row above and all together."""
    rows, first = [], results[0][1]
    for index, (name, seconds, epochs) in enumerate(results):
        step = factor(results[index - 1][1], seconds) if index else ""
        cells = (f"{seconds:.2f}", f"{clips / seconds:.1f}", step, factor(first, seconds), str(epochs))
        rows.append((name, *cells))
    title = f"levers of the training core, one epoch of {clips} clips, LoRA r=16 on attention"
    show(title, ("lever", "seconds", "clips/s", "factor", "product", "epochs run"), rows)


def main(train: int = 200, batch_size: int = 24, quick: bool = False) -> None:
    """Measure the levers on so many training clips of the demo."""
    if quick:
        train, batch_size = 16, 8
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="tuner-bench-") as folder:
        share = make_share(Path(folder), {"train": train, "validation": 8, "test": 8})
        encoder = EncoderRef(source=str(share.audio_encoder))
        store = Store.open(prepare(share.manifest, encoder, str(share.text_encoder), Path(folder) / "store").store)
        show_levers(measure(store, batch_size, lambda text: typer.echo(text, err=True)), train)


if __name__ == "__main__":
    run(main)
