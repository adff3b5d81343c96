"""The audio tower of Voxtral in torch: Whisper's, from transformers' class for it. A torch module."""

from __future__ import annotations

import torch
from transformers import VoxtralEncoderConfig
from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

from tuner.encoders.checkpoint import read_json, tower_config
from tuner.encoders.packed import empty_model
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.voxtral.facts import DEFAULTS, PREFIXES
from tuner.encoders.weights import load_strictly, read_tensors
from tuner.encoders.whisper.tower import WhisperAudioEncoder

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}


def load_voxtral(spec: EncoderSpec, dtype: torch.dtype, device: str) -> WhisperAudioEncoder:
    """The frozen tower, its weights read straight into place; no other part of a whole model is built or read.

    Raises:
        EncoderError: the weights are damaged or do not match the configuration.
    """
    config = tower_config(read_json(spec.folder / "config.json"), DEFAULTS)
    tower = empty_model(VoxtralEncoder, VoxtralEncoderConfig(**(config | NO_DROPOUT)))
    load_strictly(tower, read_tensors(spec.folder, PREFIXES[spec.family], dtype, device), spec.folder)
    return WhisperAudioEncoder(spec, tower).eval()
