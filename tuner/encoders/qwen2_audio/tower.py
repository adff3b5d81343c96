"""The audio tower of Qwen2-Audio in torch, exactly truncated to the clip. A torch module.

Shapes: N tokens of all clips, P pairs of neighboring tokens of all clips, D width.

The original pads every clip to 30 s and masks the padding in attention. Here the padding is not computed at all: stem
and blocks are those of `WhisperAudioEncoder`, and its truncation is exact because padding does not attend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from tuner.encoders.checkpoint import read_json, tower_config
from tuner.encoders.packed import Packing, empty_model
from tuner.encoders.qwen2_audio.facts import DEFAULTS, PAIRS, PREFIXES
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.weights import load_strictly, read_tensors
from tuner.encoders.whisper.tower import NO_DROPOUT, WhisperAudioEncoder


class Qwen2AudioTower(WhisperAudioEncoder):
    """Transformers' Qwen2AudioEncoder as an `AudioEncoder`."""

    def finish(self, hidden_ND: Tensor, packing: Packing, frames_B: Tensor) -> tuple[Tensor, list[int]]:
        """Means of neighboring tokens, then the final layer norm; a last token without a neighbor is dropped."""
        pairs = [self.spec.token_length(frames) for frames in frames_B.tolist()]
        clips = zip(packing.split(hidden_ND), pairs, strict=True)
        paired_ND = torch.cat([tokens_TD[: PAIRS.stride * count] for tokens_TD, count in clips])
        mean_PD = paired_ND.reshape(-1, PAIRS.stride, paired_ND.shape[1]).mean(dim=1)
        return self.final_norm(mean_PD), pairs


def load_qwen2_audio(spec: EncoderSpec, dtype: torch.dtype, device: str) -> Qwen2AudioTower:
    """The frozen tower, its weights read straight into place; no other part of a whole model is built or read.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    config = tower_config(read_json(spec.folder / "config.json"), DEFAULTS)
    tower = empty_model(Qwen2AudioEncoder, Qwen2AudioEncoderConfig(**(config | NO_DROPOUT)))
    load_strictly(tower, read_tensors(spec.folder, PREFIXES[spec.family], dtype, device), spec.folder)
    return Qwen2AudioTower(spec, tower).eval()
