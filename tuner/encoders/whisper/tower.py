"""The Whisper encoder in torch, truncated to the clip or padded to 30 s. A torch module.

Shapes: B clips, C mel bins, F frames, T tokens of the longest clip, N tokens of all clips, D width.

A truncated clip gives the tokens of its real frames: the second convolution reads what the first makes of the silence
after them, as inside a 30 s window, and attention stops at the last token. This is exact for the clip (alone or in any
batch), but a different model from the original, whose padding attends: that one is `pad_to_30s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tuner.encoders import ctranslate2
from tuner.encoders.base import AudioEncoder
from tuner.encoders.packed import Packing, empty_model
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.weights import load_strictly, read_tensors
from tuner.encoders.whisper.facts import PREFIXES, encoder_config
from tuner.encoders.whisper.features import silence_level

# The tower is frozen: its own dropout would only add noise to features that every adapter shares.
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}


class WhisperAudioEncoder(AudioEncoder):
    """Transformers' WhisperEncoder as an `AudioEncoder`."""

    def pad_features(self, features: Sequence[NDArray[np.float32]]) -> Tensor:
        """Batch BCF, as long as its longest clip; see `AudioEncoder.pad_features`."""
        longest = max(clip.shape[1] for clip in features)
        batch = np.empty((len(features), self.spec.feature_channels, longest), dtype=np.float32)
        for row, clip in zip(batch, features, strict=True):
            frames = clip.shape[1]
            row[:, :frames] = clip
            if frames < longest:
                row[:, frames:] = silence_level(clip)
        return torch.from_numpy(batch).to(self.device, self.dtype)

    def stem(self, features_BCF: Tensor, frames_B: Tensor) -> Tensor:
        """States BTD before block 0; T is that of the longest clip, or of 30 s if the encoder pads.

        `features_BCF` needs the frames that are read for T tokens, as `WhisperFeatures` makes them; an encoder that
        pads continues each clip to 30 s with the clip's own silence.
        """
        tower: Any = self.model
        tokens = max(self.spec.sequence_length(frames) for frames in frames_B.tolist())
        needed = self.spec.frames_read(tokens)
        if features_BCF.shape[2] < needed and self.spec.pad_to_30s:
            features_BCF = self._continue_with_silence(features_BCF)
        assert features_BCF.shape[2] >= needed, f"{features_BCF.shape[2]} frames given, {needed} needed"
        hidden_BDF = F.gelu(tower.conv1(features_BCF[:, :, :needed]))
        hidden_BTD = F.gelu(tower.conv2(hidden_BDF)).transpose(1, 2)[:, :tokens]
        return self.add_positions(hidden_BTD)

    def add_positions(self, hidden_BTD: Tensor) -> Tensor:
        """The convolved states plus their positions."""
        tower: Any = self.model
        return cast(Tensor, hidden_BTD + tower.embed_positions.weight[: hidden_BTD.shape[1]])

    def final_norm(self, tokens_ND: Tensor) -> Tensor:
        """The last layer norm."""
        tower: Any = self.model
        return cast(Tensor, tower.layer_norm(tokens_ND))

    def block(self, index: int, hidden_ND: Tensor, packing: Packing) -> Tensor:
        """States ND after block `index`; see `AudioEncoder.block`."""
        tower: Any = self.model
        # The layer passes its mask to `packed_attention` unread.
        return cast(Tensor, tower.layers[index](hidden_ND[None], packing)[0])

    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        """The final layer norm; if a clip was padded to 30 s, only its real tokens are pooled."""
        lengths = [self.spec.token_length(frames) for frames in frames_B.tolist()]
        clips = zip(packing.split(hidden_ND), lengths, strict=True)
        real_ND = torch.cat([tokens_TD[:length] for tokens_TD, length in clips])
        return self.final_norm(real_ND), lengths

    def _continue_with_silence(self, features_BCF: Tensor) -> Tensor:
        batch, channels, frames = features_BCF.shape
        silence_B11 = (features_BCF.amax(dim=(1, 2), keepdim=True) - 2).clamp(min=-1.5)
        return torch.cat([features_BCF, silence_B11.expand(batch, channels, self.spec.max_frames - frames)], dim=2)


def load_whisper(spec: EncoderSpec, dtype: torch.dtype, device: str) -> WhisperAudioEncoder:
    """The frozen tower, its weights read straight into place.

    Raises:
        EncoderError: the weights are damaged, quantised or do not match the configuration.
    """
    tower = empty_model(WhisperEncoder, WhisperConfig(**(encoder_config(spec.folder, spec.checkpoint) | NO_DROPOUT)))
    if spec.checkpoint == "ctranslate2":
        arrays = ctranslate2.read_whisper_encoder(spec.folder / ctranslate2.FILE_NAME)
        tensors = {name: torch.from_numpy(array).to(device, dtype) for name, array in arrays.items()}
    else:
        tensors = read_tensors(spec.folder, PREFIXES, dtype, device)
    load_strictly(tower, tensors, spec.folder)
    return WhisperAudioEncoder(spec, tower).eval()
