"""The audio tower of GLM-ASR: Whisper's convolutions, rotary positions in the blocks. No torch here.

The original pads the clips of a batch to the longest and lets the padding attend, so its output for a clip depends on
the rest of the batch. Here every clip is truncated to its own length, and the convolutions read silence after it. The
tower comes inside the whole model (`glmasr`), of which only the tower is read, or as a folder of its own
(`glmasr_encoder`).
"""

from __future__ import annotations

from dataclasses import replace

from tuner.encoders.checkpoint import tower_config, weight_files
from tuner.encoders.family import TOWER_PATH, TOWER_PREFIXES, EncoderSource, Family
from tuner.encoders.spec import EncoderSpec, LinearTarget
from tuner.encoders.whisper.facts import LARGE_SIZES, READERS, in_whisper_names, whisper_spec
from tuner.errors import EncoderError

WHOLE, TOWER = "glmasr", "glmasr_encoder"
PREFIXES = {WHOLE: TOWER_PREFIXES, TOWER: ("",)}
TOWER_PATHS = {WHOLE: TOWER_PATH, TOWER: ""}
# The nested configuration of a whole model may omit what equals the defaults: the sizes of GLM-ASR-Nano.
DEFAULTS = LARGE_SIZES | {"max_position_embeddings": 1500}
_SUFFIXES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_ALIASES = {
    "out_proj": ("o_proj",),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "up_proj": ("fc1",),
    "down_proj": ("fc2",),
}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower; `source` is a whole model or the tower alone.

    Raises:
        EncoderError: a field of the configuration is wrong, there are no weights, or padding to 30 s is requested.
    """
    if source.ref.pad_to_30s:
        raise EncoderError(f"{source.ref.source}: GLM-ASR has no 30 s window to pad to; drop pad_to_30s")
    config = tower_config(source.config, DEFAULTS)
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        raise EncoderError(
            f"{source.folder}: num_key_value_heads in config.json differs from num_attention_heads, "
            "which tuner does not support; use another checkpoint"
        )
    weights = weight_files(source.folder, PREFIXES[source.model_type])
    names = in_whisper_names(config, "max_position_embeddings")
    spec = whisper_spec(source, names, weights, TOWER_PATHS[source.model_type])
    (stage,) = spec.stages
    width, wide = stage.width, stage.targets["fc1"].out_features
    sizes = {"fc1": (width, wide), "fc2": (wide, width)}
    targets = {
        name: LinearTarget(suffix, *sizes.get(name, (width, width)), name in READERS)
        for name, suffix in _SUFFIXES.items()
    }
    return replace(spec, stages=(replace(stage, targets=targets, aliases=_ALIASES),))


FAMILIES = tuple(
    Family(model_type=name, prefixes=prefixes, inspect=inspect, tower="glmasr", features="log_mel")
    for name, prefixes in PREFIXES.items()
)
