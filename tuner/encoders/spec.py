"""What is known of an encoder before any weight is loaded: shapes, module names, token arithmetic. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LinearTarget:
    """A linear layer inside one block that LoRA can adapt."""

    suffix: str  # path below the block, e.g. "self_attn.out_proj"
    in_features: int
    out_features: int


@dataclass(frozen=True)
class EncoderSpec:
    """Facts of one audio encoder, read from its configuration file.

    `targets` maps the family's own short names (`q_proj`, `out_proj`, `fc1`, ...) to linear layers of a block;
    `aliases` maps other families' names (`o_proj`) to those. Block i lives at `block_path.format(i)` below the tower.
    """

    family: str
    source: str
    folder: Path
    checkpoint: Literal["transformers", "ctranslate2"]
    pad_to_30s: bool
    fingerprint: str  # of configuration, weights and pad_to_30s: the key of every cache below the encoder
    num_layers: int
    hidden_size: int
    sampling_rate: int  # Hz
    feature_channels: int  # mel bins
    max_seconds: float
    block_path: str
    targets: Mapping[str, LinearTarget]
    aliases: Mapping[str, str]
