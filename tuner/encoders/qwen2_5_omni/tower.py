"""The audio tower of Qwen2.5-Omni in torch. A torch module.

Shapes: B clips, C mel bins, F frames, K windows of a clip, T tokens of the longest clip, N tokens of all clips, D
width.

The output is the states after the last layer norm, of width D. The tower's own `proj` into the space of the language
model is omitted, like Qwen2-Audio's projector: the adapter's own head takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    SinusoidsPositionEmbedding,
)

from tuner.encoders.checkpoint import read_json
from tuner.encoders.packed import Packing, empty_model
from tuner.encoders.qwen2_5_omni.facts import PREFIXES, omni_config
from tuner.encoders.qwen2_audio.tower import Qwen2AudioTower
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.weights import load_strictly, read_tensors
from tuner.encoders.whisper.facts import STRIDE
from tuner.encoders.whisper.tower import NO_DROPOUT


class OmniTower(Qwen2AudioTower):
    """Transformers' Qwen2_5OmniAudioEncoder as an `AudioEncoder`."""

    @property
    def _window(self) -> int:
        tower: Any = self.model
        return int(tower.n_window)  # tokens

    def packing(self, lengths: Sequence[int], depth: int = 0) -> Packing:
        """The packing of clips with these numbers of tokens; each window attends only to itself."""
        return Packing(lengths, self.dtype, self.device, self._window)

    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0, zero after each clip."""
        clips = zip(features_BCF, frames_B.tolist(), strict=True)
        return nn.utils.rnn.pad_sequence([self._stem_alone(clip_CF[:, :frames]) for clip_CF, frames in clips], True)

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; see `AudioEncoder.block`."""
        tower: Any = self.model
        # One span for all: with more, the layer would call attention once per window. The packing has the windows.
        whole = torch.tensor([0, len(hidden_ND)])
        return cast(Tensor, tower.layers[index](hidden_ND, cu_seqlens=whole, packing=packing)[0])

    def final_norm(self, tokens_ND: Tensor) -> Tensor:
        """The last layer norm."""
        tower: Any = self.model
        return cast(Tensor, tower.ln_post(tokens_ND))

    def _stem_alone(self, clip_CF: Tensor) -> Tensor:
        """States TD of one clip's real frames, window by window."""
        tower: Any = self.model
        channels, frames = clip_CF.shape
        span = STRIDE * self._window
        padded_CF = F.pad(clip_CF, (0, -frames % span))
        windows_KCF = padded_CF.view(channels, -1, span).transpose(0, 1)
        # The second convolution must read zeros after the last frame, as it does at the end of a full window.
        real_K1F = (torch.arange(padded_CF.shape[1], device=clip_CF.device) < frames).view(-1, 1, span)
        hidden_KDF = F.gelu(tower.conv1(windows_KCF)) * real_K1F
        hidden_KTD = F.gelu(tower.conv2(hidden_KDF)).transpose(1, 2)
        placed_KTD: Tensor = hidden_KTD + tower.positional_embedding(self._window).to(hidden_KTD.dtype)
        return placed_KTD.flatten(0, 1)[: self.spec.sequence_length(frames)]


def load_omni(spec: EncoderSpec, dtype: torch.dtype, device: str) -> OmniTower:
    """The frozen tower, its weights read straight into place; no other part of a whole model is built or read.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    fields = omni_config(read_json(spec.folder / "config.json"))
    config = Qwen2_5OmniAudioEncoderConfig(**(fields | NO_DROPOUT))
    tower: Any = empty_model(Qwen2_5OmniAudioEncoder, config)
    load_strictly(tower, read_tensors(spec.folder, PREFIXES[spec.family], dtype, device), spec.folder)
    # Its sinusoids are computed, not read, so they are still on the meta device.
    sinusoids: Any = SinusoidsPositionEmbedding
    tower.positional_embedding = sinusoids(config.max_source_positions, config.d_model).to(device)
    return OmniTower(spec, tower).eval()
