"""The audio tower of GLM-ASR in torch, truncated to the clip. A torch module.

Shapes: B clips, T tokens of the longest clip, N tokens of all clips, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GlmAsrEncoderConfig
from transformers.models.glmasr.modeling_glmasr import GlmAsrEncoder, GlmAsrRotaryEmbedding

from tuner.encoders.checkpoint import read_json, tower_config
from tuner.encoders.glmasr.facts import DEFAULTS, PREFIXES
from tuner.encoders.packed import Packing, Rotation, empty_model
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.weights import load_strictly, read_tensors
from tuner.encoders.whisper.tower import WhisperAudioEncoder


class GlmAsrTower(WhisperAudioEncoder):
    """Transformers' GlmAsrEncoder as an `AudioEncoder`."""

    def __init__(self, spec: EncoderSpec, tower: nn.Module) -> None:
        super().__init__(spec, tower)
        self._rotation = Rotation(tower)

    def add_positions(self, hidden_BTD: Tensor) -> Tensor:
        """The states as they are: positions enter in the blocks."""
        return hidden_BTD

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; see `AudioEncoder.block`."""
        tower: Any = self.model
        layer = tower.layers[index]
        rotation = self._rotation.of(packing, hidden_ND)
        return cast(Tensor, layer(hidden_ND[None], position_embeddings=rotation, attention_mask=packing)[0])

    def final_norm(self, tokens_ND: Tensor) -> Tensor:
        """The last layer norm."""
        tower: Any = self.model
        return cast(Tensor, tower.norm(tokens_ND))


def load_glmasr(spec: EncoderSpec, dtype: torch.dtype, device: str) -> GlmAsrTower:
    """The frozen tower, its weights read straight into place; no other part of a whole model is built or read.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    fields = tower_config(read_json(spec.folder / "config.json"), DEFAULTS) | {"attention_dropout": 0.0}
    config: Any = GlmAsrEncoderConfig(**fields)
    tower: Any = empty_model(GlmAsrEncoder, config)
    load_strictly(tower, read_tensors(spec.folder, PREFIXES[spec.family], dtype, device), spec.folder)
    # Its frequencies are computed, not read, so they are still on the meta device.
    tower.rotary_emb = GlmAsrRotaryEmbedding(config).to(device)
    return GlmAsrTower(spec, tower).eval()
