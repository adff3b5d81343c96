"""The audio tower of Voxtral: Whisper's encoder under other names of its configuration. No torch at import.

As with Whisper, padding attends in the original, so a tower truncated to the clip is another (and much cheaper) model
than the original, which is `pad_to_30s`. The tower comes inside the whole model (`voxtral`), of which nothing but the
tower is read, or as a folder of its own (`voxtral_encoder`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.encoders.checkpoint import load_strictly, read_json, read_tensors, tower_config, weight_files
from tuner.encoders.family import TOWER_PATH, TOWER_PREFIXES, EncoderSource, Family
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.whisper.facts import LARGE_SIZES, WhisperFeatures, in_whisper_names, whisper_spec

if TYPE_CHECKING:
    import torch

    from tuner.encoders.base import AudioEncoder

WHOLE, TOWER = "voxtral", "voxtral_encoder"
PREFIXES = {WHOLE: TOWER_PREFIXES, TOWER: ("",)}
TOWER_PATHS = {WHOLE: TOWER_PATH, TOWER: ""}
# The nested configuration of a whole model may leave out what equals the defaults: the sizes of Voxtral-Mini-3B.
DEFAULTS = LARGE_SIZES | {"max_source_positions": 1500}
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower; `source` is a whole model or the tower alone.

    Raises:
        EncoderError: a field of the configuration is wrong, or there are no weights.
    """
    config = tower_config(source.config, DEFAULTS)
    weights = weight_files(source.folder, PREFIXES[source.model_type])
    names = in_whisper_names(config, "max_source_positions")
    return whisper_spec(source, names, weights, TOWER_PATHS[source.model_type])


def _load(spec: EncoderSpec, dtype: torch.dtype, device: str) -> AudioEncoder:
    from transformers import VoxtralEncoderConfig
    from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

    from tuner.encoders.packed import empty_tower
    from tuner.encoders.whisper.tower import WhisperAudioEncoder

    config = tower_config(read_json(spec.folder / "config.json"), DEFAULTS)
    tower = empty_tower(VoxtralEncoder, VoxtralEncoderConfig(**(config | _NO_DROPOUT)))
    load_strictly(tower, read_tensors(spec.folder, PREFIXES[spec.family], dtype, device), spec.folder)
    return WhisperAudioEncoder(spec, tower).eval()


FAMILIES = tuple(
    Family(model_type=name, prefixes=prefixes, inspect=inspect, load=_load, load_features=WhisperFeatures)
    for name, prefixes in PREFIXES.items()
)
