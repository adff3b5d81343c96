"""Qwen2-Audio without its checkpoint: by its configuration at real size, and small with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tuner.encoders.checkpoint import INDEX
from tuner.encoders.qwen2_audio.facts import PARTS

# The smaller one has these widths of the 7B model divided by `SHRINK`, so that all ratios between layers stay.
SHRINK, LAYERS = 8, 4
AUDIO = {"model_type": "qwen2_audio_encoder", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
AUDIO |= {"encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500}
TEXT = {"model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
TEXT |= {"num_attention_heads": 32, "num_key_value_heads": 32}
WIDTHS = ("d_model", "encoder_ffn_dim", "hidden_size", "intermediate_size")


def write_real_size(folder: Path) -> Path:
    """The configuration of Qwen2-Audio-7B beside an empty weight file: its facts are read, its weights never."""
    folder.mkdir(parents=True)
    config = {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | {"audio_config": AUDIO, "text_config": TEXT}))
    shard = "model-00001-of-00001.safetensors"
    names = [f"{prefixes[0]}weight" for prefixes in PARTS.values()]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    (folder / shard).touch()
    return folder


def write_small(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2-Audio as Hugging Face saves it: every width an eighth, 4 blocks in either part instead of 32."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio, text = _shrunk(AUDIO), _shrunk(TEXT)
    # Fewer heads than in the original, whose own number would leave each 8 wide.
    audio |= {"encoder_layers": LAYERS, "encoder_attention_heads": 5}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8}
    text |= {"vocab_size": 64, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=50)
    )
    with torch.no_grad():
        # transformers starts so near to zero that a narrow model's attention would hardly matter.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value // SHRINK if key in WIDTHS else value for key, value in config.items()}
