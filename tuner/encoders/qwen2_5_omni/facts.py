"""The audio tower of Qwen2.5-Omni: facts from its configuration. No torch here.

Whisper's encoder in windows of 2 s: convolutions, positions and attention all stay inside their window. It reads only
the real frames, so there is no padding. The tower comes inside the whole model (`qwen2_5_omni`) or its thinker
(`qwen2_5_omni_thinker`), of which only the tower is read, or as a folder of its own (`qwen2_5_omni_audio_encoder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.encoders.checkpoint import tower_config, weight_files
from tuner.encoders.family import EncoderSource, Family
from tuner.encoders.qwen2_audio.facts import DEFAULTS, PAIRS
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.whisper.facts import whisper_spec
from tuner.errors import EncoderError

PREFIXES = {
    "qwen2_5_omni": ("thinker.audio_tower.", "thinker.model.audio_tower."),
    "qwen2_5_omni_thinker": ("audio_tower.", "model.audio_tower."),
    "qwen2_5_omni_audio_encoder": ("",),
}
TOWER_PATHS = {
    "qwen2_5_omni": "thinker.model.audio_tower",
    "qwen2_5_omni_thinker": "model.audio_tower",
    "qwen2_5_omni_audio_encoder": "",
}


def omni_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the tower from a parsed `config.json`; the sizes are those of Qwen2-Audio."""
    return tower_config(config.get("thinker_config", config), DEFAULTS)


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower.

    Raises:
        EncoderError: a field of the configuration is wrong, there are no weights, or padding to 30 s is requested.
    """
    if source.ref.pad_to_30s:
        raise EncoderError(f"{source.ref.source}: Qwen2.5-Omni has no 30 s window to pad to; drop pad_to_30s")
    weights = weight_files(source.folder, PREFIXES[source.model_type])
    return whisper_spec(source, omni_config(source.config), weights, TOWER_PATHS[source.model_type], (PAIRS,))


FAMILIES = tuple(
    Family(model_type=name, prefixes=prefixes, inspect=inspect, tower="qwen2_5_omni", features="log_mel")
    for name, prefixes in PREFIXES.items()
)
