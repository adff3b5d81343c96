"""Qwen2-Audio through its language model: against the padded, masked original, and what is read for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from tuner.config import EncoderRef, LoraSpec
from tuner.encoders import packed
from tuner.encoders.base import AudioEncoder
from tuner.encoders.packed import Packing, Rotation
from tuner.encoders.qwen2_audio_full import Qwen2AudioFullForward, empty_model
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.errors import EncoderError

RATE = 16_000
AUDIO_TOKEN = 150
TOWER_WIDTH, WIDTH = 32, 40
# From one token of the language model to a few hundred: odd and even numbers of frames and of tokens.
SAMPLES = [47_777, 801, 7_000, 20_000, 7_001, 100_001]


@pytest.fixture(scope="module")
def model() -> Qwen2AudioForConditionalGeneration:
    """Two heads of keys and values for four of queries; weights so large that every part matters."""
    audio = {"model_type": "qwen2_audio_encoder", "d_model": TOWER_WIDTH, "encoder_layers": 3}
    audio |= {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 128}
    text = {"model_type": "qwen2", "hidden_size": WIDTH, "intermediate_size": 56, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_TOKEN)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def folder(model: Qwen2AudioForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2-audio")
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def inspect(folder: Path, path: Any = "full_forward") -> EncoderSpec:
    return inspect_encoder(EncoderRef(source=str(folder), path=path))


def clips(samples: list[int]) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    return [(random.standard_normal(length) * 0.1).astype(np.float32) for length in samples]


def run(encoder: AudioEncoder, waveforms: list[NDArray[np.float32]]) -> list[Tensor]:
    extractor = load_feature_extractor(encoder.spec)
    features, frames = zip(*map(extractor.extract, waveforms), strict=True)
    with torch.inference_mode():
        hidden_BTD, mask_BT = encoder(encoder.pad_features(features), torch.tensor(frames))
    return [states_TD[mask_T] for states_TD, mask_T in zip(hidden_BTD, mask_BT, strict=True)]


def original(model: Qwen2AudioForConditionalGeneration, spec: EncoderSpec, waveforms: list[Any]) -> list[Tensor]:
    """Slow reference: the whole model on 30 s windows and padded tokens, its last hidden states of the real ones."""
    extractor: Any = load_feature_extractor(spec)
    inputs = extractor.extractor(waveforms, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    frames_B = inputs["attention_mask"].sum(dim=1)
    _, tokens_B = model.model.audio_tower._get_feat_extract_output_lengths(frames_B)
    is_audio_BT = torch.arange(int(tokens_B.max())) < tokens_B[:, None]
    with torch.inference_mode():
        states_BTD = model.model(
            input_ids=is_audio_BT * AUDIO_TOKEN,
            attention_mask=is_audio_BT.long(),
            input_features=inputs["input_features"],
            feature_attention_mask=inputs["attention_mask"],
        ).last_hidden_state
    return [states_TD[mask_T] for states_TD, mask_T in zip(states_BTD, is_audio_BT, strict=True)]


def test_a_pack_of_clips_equals_the_padded_masked_original(
    model: Qwen2AudioForConditionalGeneration, folder: Path
) -> None:
    """Tolerance 1e-5 in fp32, on states of size 1 (the last norm)."""
    spec, waveforms = inspect(folder), clips(SAMPLES)
    expected = original(model, spec, waveforms)
    for ours_TD, theirs_TD in zip(run(load_encoder(spec, torch.float32), waveforms), expected, strict=True):
        assert ours_TD.shape == theirs_TD.shape and ours_TD.shape[1] == WIDTH
        assert (ours_TD - theirs_TD).abs().max() <= 1e-5
