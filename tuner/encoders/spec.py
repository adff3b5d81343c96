"""What is known of an encoder before any weight is loaded: shapes, module names, token arithmetic. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

CheckpointKind = Literal["transformers", "ctranslate2"]


@dataclass(frozen=True)
class LinearTarget:
    """A linear layer inside one block that LoRA can adapt."""

    suffix: str  # path below the block, e.g. "self_attn.out_proj"
    in_features: int
    out_features: int


class Window(NamedTuple):
    """Sliding window of a convolution or pooling over time: how it shortens a sequence."""

    kernel: int
    stride: int
    padding: int

    def outputs(self, length: int) -> int:
        """Number of outputs for `length` inputs."""
        return max(0, (length + 2 * self.padding - self.kernel) // self.stride + 1)


@dataclass(frozen=True)
class EncoderSpec:
    """Facts of one audio encoder, read from its configuration file.

    `targets` maps the family's own short names (`q_proj`, `out_proj`, `fc1`, ...) to linear layers of a block;
    `aliases` maps other families' names (`o_proj`) to those. Block i lives at `block_path.format(i)` below the tower.
    `stem_windows` shorten frames to the tokens of the blocks, `pooling_windows` those to the tokens of the output.
    """

    family: str
    source: str
    folder: Path
    checkpoint: CheckpointKind
    pad_to_30s: bool
    fingerprint: str  # of configuration, weights and pad_to_30s: the key of every cache below the encoder
    num_layers: int
    hidden_size: int
    sampling_rate: int  # Hz
    feature_channels: int  # mel bins; 1 where the encoder reads the waveform
    max_frames: int
    max_seconds: float
    block_path: str
    targets: Mapping[str, LinearTarget]
    aliases: Mapping[str, str]
    stem_windows: tuple[Window, ...]
    pooling_windows: tuple[Window, ...] = ()

    def token_length(self, frames: int) -> int:
        """Output tokens that describe a clip of `frames` real frames: what is pooled, padding left out."""
        length = frames
        for window in (*self.stem_windows, *self.pooling_windows):
            length = window.outputs(length)
        return length

    def sequence_length(self, frames: int) -> int:
        """Tokens that pass through the blocks for a clip of `frames` real frames: what it costs."""
        length = self.max_frames if self.pad_to_30s else frames
        for window in self.stem_windows:
            length = window.outputs(length)
        return length
