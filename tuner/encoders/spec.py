"""Facts of an encoder before any weight is loaded: shapes, module names, token arithmetic. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tuner.config import EncoderPath

CheckpointKind = Literal["transformers", "ctranslate2"]
Part = Literal["tower", "language_model"]  # of an audio language model


@dataclass(frozen=True)
class LinearTarget:
    """A linear layer inside one block that LoRA can adapt."""

    suffix: str  # path below the block, e.g. "self_attn.out_proj"
    in_features: int
    out_features: int
    # Whether it reads the block's input (after the norm), as queries, keys and values do. Each family states it,
    # because cost estimates depend on how far a gradient flows back.
    reads_block_input: bool


class Window(NamedTuple):
    """Sliding window of a convolution or pooling over time: how it shortens a sequence."""

    kernel: int
    stride: int
    padding: int

    def outputs(self, length: int) -> int:
        """Number of outputs for `length` inputs."""
        return max(0, (length + 2 * self.padding - self.kernel) // self.stride + 1)

    def inputs(self, outputs: int) -> int:
        """How many of the first inputs the first `outputs` outputs (at least one) depend on."""
        return (outputs - 1) * self.stride + self.kernel - self.padding


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks with the same width and sequence length; an encoder has one or more stages.

    `targets` maps the family's own short names (`q_proj`, `out_proj`, `fc1`, ...) to linear layers of a block, queries
    first, then in the order in which a token passes them. `aliases` maps other families' names (`o_proj`) to one or
    more of those. Block i of the stage is at `block_path.format(i)` below the root of the adapters. `windows` shorten
    the sequence before the first block of the stage; the encoder's `stem_windows` shorten frames to the tokens of the
    first stage.
    """

    block_path: str
    layers: int
    width: int
    targets: Mapping[str, LinearTarget]
    aliases: Mapping[str, tuple[str, ...]]
    windows: tuple[Window, ...] = ()
    part: Part = "tower"
    attention_window: int | None = None  # tokens of a window, if a clip attends in windows

    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks of this stage below the root of the adapters."""
        return tuple(self.block_path.format(index) for index in range(self.layers))


@dataclass(frozen=True)
class EncoderSpec:
    """Facts of one audio encoder, read from its configuration file.

    Blocks are counted through all stages: depth 0 is the input of the first block, depth `num_layers` the output of the
    last. `stem_windows` shorten frames to the tokens of the first block, `pooling_windows` shorten the tokens of the
    last block to the tokens of the output.
    """

    family: str
    source: str
    folder: Path
    checkpoint: CheckpointKind
    pad_to_30s: bool
    fingerprint: str  # of configuration, weights and pad_to_30s: the key of every cache below the encoder
    sampling_rate: int  # Hz
    feature_channels: int  # mel bins; 1 if the encoder reads the waveform
    max_frames: int
    max_seconds: float
    stages: tuple[Stage, ...]
    stem_windows: tuple[Window, ...]
    pooling_windows: tuple[Window, ...] = ()
    # Tokens of the first block if every clip fills the whole window, however short it is; no stem windows then.
    fixed_tokens: int | None = None
    path: EncoderPath = "audio_tower"
    # Where transformers has the tower in its whole model: "" if the folder holds only a tower, None if the whole model
    # is the encoder, so that `full_forward` is the only path.
    tower_path: str | None = None
    language_model_path: str | None = None  # the same of its language model; None if there is none to run
    tower_alone: EncoderSpec | None = None  # only of `full_forward` through a language model: its tower by itself

    @property
    def features_fingerprint(self) -> str:
        """The key of prepared features: the same with and without a language model after the tower."""
        return self.tower_alone.fingerprint if self.tower_alone else self.fingerprint

    @property
    def num_layers(self) -> int:
        """Blocks of all stages."""
        return sum(stage.layers for stage in self.stages)

    @property
    def hidden_size(self) -> int:
        """Width of the output tokens: what is pooled and enters the head."""
        return self.stages[-1].width

    @property
    def shape(self) -> str:
        """The blocks in words: `32 blocks of width 1280, then 32 blocks of width 4096`."""
        return ", then ".join(f"{stage.layers} blocks of width {stage.width}" for stage in self.stages)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of all blocks below the root of the adapters, by depth."""
        return tuple(name for stage in self.stages for name in stage.block_names())

    def first_block(self, stage: int) -> int:
        """Depth of the first block of a stage."""
        return sum(before.layers for before in self.stages[:stage])

    def stage_at(self, depth: int) -> int:
        """Which stage block `depth` belongs to; the last one for the depth after the last block."""
        ends = itertools.accumulate(stage.layers for stage in self.stages)
        return next((index for index, end in enumerate(ends) if depth < end), len(self.stages) - 1)

    def width(self, depth: int) -> int:
        """Width of the states that enter block `depth`."""
        return self.stages[self.stage_at(depth)].width

    def windows(self, depth: int) -> tuple[Window, ...]:
        """All windows between the frames and the tokens that enter block `depth`."""
        entered = self.stages[: self.stage_at(depth) + 1]
        return (*self.stem_windows, *(window for stage in entered for window in stage.windows))

    def token_length(self, frames: int) -> int:
        """Output tokens of a clip of `frames` real frames, without padding: the tokens that are pooled."""
        return _through(self.pooling_windows, self.real_length(frames, self.num_layers))

    def real_length(self, frames: int, depth: int = 0) -> int:
        """Tokens at block `depth` of a clip of `frames` real frames, without padding."""
        return _through(self.windows(depth), self.fixed_tokens or frames)

    def sequence_length(self, frames: int, depth: int = 0) -> int:
        """Tokens at block `depth` of a clip of `frames` real frames, with padding: the tokens that are computed."""
        return self.real_length(self._computed(frames), depth)

    def stem_lengths(self, frames: int) -> tuple[int, ...]:
        """Outputs of each convolution of the stem for a clip of `frames` real frames, with padding."""
        convolutions = range(1, len(self.stem_windows) + 1)
        return tuple(_through(self.stem_windows[:count], self._computed(frames)) for count in convolutions)

    def frames_read(self, tokens: int) -> int:
        """Frames that the stem reads for the first `tokens` tokens of the first block, at most the longest clip's."""
        for window in reversed(self.stem_windows):
            tokens = window.inputs(tokens)
        return min(tokens, self.max_frames)

    def _computed(self, frames: int) -> int:
        return self.max_frames if self.pad_to_30s else frames


def _through(windows: tuple[Window, ...], length: int) -> int:
    for window in windows:
        length = window.outputs(length)
    return length
