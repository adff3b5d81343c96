"""The audio tower of Voxtral: Whisper's encoder with other names in its configuration. No torch here.

As in Whisper, padding attends in the original, so a tower truncated to the clip is a different (and much cheaper) model
from the original, which is `pad_to_30s`. The tower comes inside the whole model (`voxtral`), of which only the
tower is read, or as a folder of its own (`voxtral_encoder`).
"""

from __future__ import annotations

from tuner.encoders.checkpoint import tower_config, weight_files
from tuner.encoders.family import TOWER_PATH, TOWER_PREFIXES, EncoderSource, Family
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.whisper.facts import LARGE_SIZES, in_whisper_names, whisper_spec

WHOLE, TOWER = "voxtral", "voxtral_encoder"
PREFIXES = {WHOLE: TOWER_PREFIXES, TOWER: ("",)}
TOWER_PATHS = {WHOLE: TOWER_PATH, TOWER: ""}
# The nested configuration of a whole model may omit what equals the defaults: the sizes of Voxtral-Mini-3B.
DEFAULTS = LARGE_SIZES | {"max_source_positions": 1500}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower; `source` is a whole model or the tower alone.

    Raises:
        EncoderError: a field of the configuration is wrong, or there are no weights.
    """
    config = tower_config(source.config, DEFAULTS)
    weights = weight_files(source.folder, PREFIXES[source.model_type])
    names = in_whisper_names(config, "max_source_positions")
    return whisper_spec(source, names, weights, TOWER_PATHS[source.model_type])


FAMILIES = tuple(
    Family(model_type=name, prefixes=prefixes, inspect=inspect, tower="voxtral", features="log_mel")
    for name, prefixes in PREFIXES.items()
)
