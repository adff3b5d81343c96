"""The Whisper family: facts from its configuration. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.encoders import ctranslate2
from tuner.encoders.checkpoint import positive, read_json, weight_files
from tuner.encoders.family import EncoderSource, Family
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage, Window

# How the encoder's tensors are named inside a WhisperForConditionalGeneration, a WhisperModel and a WhisperEncoder.
PREFIXES = ("model.encoder.", "encoder.", "")
SAMPLING_RATE = 16_000  # Hz
HOP = 160  # samples between frames
READERS = ("q_proj", "k_proj", "v_proj")  # of the block's input
ATTENTION = (*READERS, "out_proj")
ALIASES = {
    "o_proj": ("out_proj",),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "up_proj": ("fc1",),
    "down_proj": ("fc2",),
}
CONVOLUTIONS = (Window(kernel=3, stride=1, padding=1), Window(kernel=3, stride=2, padding=1))
STRIDE = math.prod(window.stride for window in CONVOLUTIONS)  # frames a token
# Sizes of the large Whisper, which newer families have under other names: see `in_whisper_names`.
LARGE_SIZES = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "num_mel_bins": 128,
}


def encoder_config(folder: Path, checkpoint: str) -> dict[str, Any]:
    """Configuration in transformers' names, from config.json or from the shapes in a faster-whisper model.bin.

    Raises:
        EncoderError: the file cannot be read or is quantised.
    """
    if checkpoint == "ctranslate2":
        return ctranslate2.whisper_config(ctranslate2.read_header(folder / ctranslate2.FILE_NAME))
    return read_json(folder / "config.json")


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of a Whisper encoder.

    Raises:
        EncoderError: a field is missing from the configuration, or there are no weights.
    """
    folder = source.folder
    converted = source.checkpoint == "ctranslate2"
    weights = [folder / ctranslate2.FILE_NAME] if converted else weight_files(folder, PREFIXES)
    return whisper_spec(source, encoder_config(folder, source.checkpoint), weights, "model.encoder")


def in_whisper_names(config: Mapping[str, Any], positions: str) -> dict[str, Any]:
    """The configuration of a newer family's tower in Whisper's names, for `whisper_spec`.

    Args:
        positions: the family's name for the largest number of positions.
    """
    names = {
        "d_model": "hidden_size",
        "encoder_ffn_dim": "intermediate_size",
        "encoder_layers": "num_hidden_layers",
        "num_mel_bins": "num_mel_bins",
        "max_source_positions": positions,
    }
    return {ours: config[theirs] for ours, theirs in names.items()}


def whisper_spec(
    source: EncoderSource,
    config: Mapping[str, Any],
    weights: Sequence[Path],
    tower_path: str,
    pooling_windows: tuple[Window, ...] = (),
) -> EncoderSpec:
    """Facts of a tower that is built like Whisper's encoder, of any family.

    Args:
        config: of the tower, in the names of Whisper's configuration.
        weights: files that hold the tower.
        tower_path, pooling_windows: see `EncoderSpec`.

    Raises:
        EncoderError: a field is missing from the configuration.
    """
    folder = source.folder
    width, wide = positive(config, "d_model", folder), positive(config, "encoder_ffn_dim", folder)
    max_frames = STRIDE * positive(config, "max_source_positions", folder)
    targets = {name: LinearTarget(f"self_attn.{name}", width, width, name in READERS) for name in ATTENTION}
    targets |= {"fc1": LinearTarget("fc1", width, wide, False), "fc2": LinearTarget("fc2", wide, width, False)}
    return EncoderSpec(
        **source.facts(weights, source.ref.pad_to_30s),
        sampling_rate=SAMPLING_RATE,
        feature_channels=positive(config, "num_mel_bins", folder),
        max_frames=max_frames,
        max_seconds=max_frames * HOP / SAMPLING_RATE,
        stages=(Stage("layers.{}", positive(config, "encoder_layers", folder), width, targets, ALIASES),),
        stem_windows=CONVOLUTIONS,
        pooling_windows=pooling_windows,
        tower_path=tower_path,
    )


FAMILY = Family(
    model_type="whisper",
    prefixes=PREFIXES,
    ctranslate2_name="WhisperSpec",
    inspect=inspect,
    tower="whisper",
    features="log_mel",
)
