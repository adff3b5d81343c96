"""The audio tower of Qwen2-Audio: facts from its configuration. No torch here.

The tower is Whisper's encoder with the padding masked and with the last states averaged in pairs, so features, token
arithmetic and target names are Whisper's. It comes inside the whole model (`qwen2_audio`), of which nothing but the
tower is read, or as a folder of its own (`qwen2_audio_encoder`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.encoders.checkpoint import tower_config, weight_files
from tuner.encoders.family import EncoderSource, Family
from tuner.encoders.spec import EncoderSpec, Window
from tuner.encoders.whisper import WhisperFeatures, whisper_spec
from tuner.errors import EncoderError

if TYPE_CHECKING:
    import torch

    from tuner.encoders.base import AudioEncoder

WHOLE, TOWER = "qwen2_audio", "qwen2_audio_encoder"
# transformers 4 wrote `audio_tower`, which is what checkpoints have on disk; its successor holds `model.audio_tower`.
PREFIXES = {WHOLE: ("audio_tower.", "model.audio_tower."), TOWER: ("",)}
PAIRS = Window(kernel=2, stride=2, padding=0)
# The nested configuration of a whole model may leave out what equals the defaults: the sizes of Qwen2-Audio-7B.
DEFAULTS = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "max_source_positions": 1500,
}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower; `source` is a whole model or the tower alone.

    Raises:
        EncoderError: a field of the configuration is wrong, there are no weights, or padding to 30 s is asked for.
    """
    if source.ref.pad_to_30s:
        raise EncoderError(
            f"{source.ref.source}: Qwen2-Audio masks what lies behind a clip, so padding to 30 s gives the same "
            "embeddings for more work; leave pad_to_30s out"
        )
    weights = weight_files(source.folder, PREFIXES[source.model_type])
    return whisper_spec(source, tower_config(source.config, DEFAULTS), weights, pooling_windows=(PAIRS,))


def _load(spec: EncoderSpec, dtype: torch.dtype, device: str) -> AudioEncoder:
    from tuner.encoders.qwen2_audio_tower import load_qwen2_audio

    return load_qwen2_audio(spec, dtype, device)


FAMILIES = tuple(
    Family(model_type=name, prefixes=prefixes, inspect=inspect, load=_load, load_features=WhisperFeatures)
    for name, prefixes in PREFIXES.items()
)
