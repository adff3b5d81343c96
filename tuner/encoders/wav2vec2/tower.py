"""wav2vec 2.0 and HuBERT in torch, and the parts that WavLM shares with them. A torch module.

Shapes: B clips, C channels, F frames, S samples, T tokens of the longest clip, N tokens of all clips, D width.

The stem runs clip by clip: the group norm of the base models takes its statistics over the whole clip, and the
positional convolution reads 2.5 s around a token, so padding would change both. A clip in a batch therefore equals the
clip alone, which is not so in transformers' own padded batches of base models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model

from tuner.encoders.base import AudioEncoder
from tuner.encoders.checkpoint import read_json
from tuner.encoders.packed import Packing, empty_model
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.wav2vec2.facts import PREFIXES
from tuner.encoders.weights import load_strictly, read_tensors

# oneDNN keeps memory for every input length of a convolution, so clips are rounded up to half seconds.
LENGTH_MULTIPLE = 8000
# The tower is frozen: its dropout would only add noise, and SpecAugment is not used.
_FROZEN = {
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "hidden_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_feature_prob": 0.0,
    "mask_time_prob": 0.0,
}
_MASK_EMBEDDING = "masked_spec_embed"  # of SpecAugment
_POSITIONS = "encoder.pos_conv_embed.conv"
# transformers before 4.31 wrote the weight norm of the positional convolution under torch's old names.
_RENAMED = {
    f"{_POSITIONS}.weight_g": f"{_POSITIONS}.parametrizations.weight.original0",
    f"{_POSITIONS}.weight_v": f"{_POSITIONS}.parametrizations.weight.original1",
}


class WaveformEncoder(AudioEncoder):
    """Transformers' Wav2Vec2Model or HubertModel as an `AudioEncoder`."""

    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        """Batch BCF, as long as its longest clip, with digital silence after the others, which `stem` cuts off."""
        longest = max(clip.shape[1] for clip in features)
        batch = np.zeros((len(features), self.spec.feature_channels, longest), dtype=np.float32)
        for row, clip in zip(batch, features, strict=True):
            row[:, : clip.shape[1]] = clip
        return torch.from_numpy(batch).to(self.device, self.dtype)

    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0, zero after each clip."""
        clips = zip(features_BCF[:, 0], frames_B.tolist(), strict=True)
        return nn.utils.rnn.pad_sequence([self._stem_alone(clip_S[:frames]) for clip_S, frames in clips], True)

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; see `AudioEncoder.block`."""
        tower: Any = self.model
        return cast(Tensor, tower.encoder.layers[index](hidden_ND[None], attention_mask=packing)[0])

    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        """The final layer norm of the models that have one there (the large ones)."""
        tower: Any = self.model
        real_ND = hidden_ND[: packing.tokens]
        return (tower.encoder.layer_norm(real_ND) if self._norm_comes_last else real_ND), list(packing.lengths)

    @property
    def _norm_comes_last(self) -> bool:
        tower: Any = self.model
        return bool(tower.config.do_stable_layer_norm)

    def _stem_alone(self, clip_S: Tensor) -> Tensor:
        """States TD of one clip. The padding to a round length is dropped before anything reads it."""
        tower: Any = self.model
        hidden_1CF = F.pad(clip_S, (0, -len(clip_S) % LENGTH_MULTIPLE))[None, None]
        lengths = self.spec.stem_lengths(len(clip_S))
        for layer, length in zip(tower.feature_extractor.conv_layers, lengths, strict=True):
            hidden_1CF = _convolve(layer, hidden_1CF, length)
        projected = tower.feature_projection(hidden_1CF.transpose(1, 2))
        # wav2vec 2.0 also returns the input of its quantiser.
        hidden_1TD = projected[0] if isinstance(projected, tuple) else projected
        tokens = lengths[-1]
        # The positional convolution must read zeros after the clip, as at the end of a clip alone.
        hidden_1TD = torch.cat([hidden_1TD[:, :tokens], torch.zeros_like(hidden_1TD[:, tokens:])], dim=1)
        hidden_TD = (hidden_1TD + tower.encoder.pos_conv_embed(hidden_1TD))[0, :tokens]
        return hidden_TD if self._norm_comes_last else cast(Tensor, tower.encoder.layer_norm(hidden_TD))


def _convolve(layer: Any, hidden_1CF: Tensor, length: int) -> Tensor:
    """One layer of the convolutional front end; the first `length` frames of its output belong to the clip."""
    norm = getattr(layer, "layer_norm", None)
    if not isinstance(norm, nn.GroupNorm):
        return cast(Tensor, layer(hidden_1CF))
    convolved_1CF = layer.conv(hidden_1CF)
    clip_1CF = norm(convolved_1CF[:, :, :length])
    return cast(Tensor, layer.activation(F.pad(clip_1CF, (0, convolved_1CF.shape[2] - length))))


def load_wav2vec2(spec: EncoderSpec, dtype: torch.dtype, device: str) -> WaveformEncoder:
    """The frozen tower of a wav2vec 2.0 or HuBERT, its weights read straight into place.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    config_class, tower_class = {
        "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
        "hubert": (HubertConfig, HubertModel),
    }[spec.family]
    tower = empty_model(tower_class, frozen_config(spec, config_class))
    fill_tower(tower, spec, dtype, device)
    return WaveformEncoder(spec, tower).eval()


def frozen_config(spec: EncoderSpec, config_class: Any) -> Any:
    """Configuration of the tower without its dropout and masking."""
    return config_class(**(read_json(spec.folder / "config.json") | _FROZEN))


def fill_tower(tower: Any, spec: EncoderSpec, dtype: torch.dtype, device: str) -> None:
    """Read the weights of a tower on the meta device and freeze it.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    tensors = read_tensors(spec.folder, PREFIXES[spec.family], dtype, device)
    tensors.pop(_MASK_EMBEDDING, None)
    load_strictly(tower, {_RENAMED.get(name, name): tensor for name, tensor in tensors.items()}, spec.folder)
    # Keep the frozen weight itself, instead of computing it from the weight norm again for every clip.
    parametrize.remove_parametrizations(tower.encoder.pos_conv_embed.conv, "weight")
    tower.requires_grad_(False)
