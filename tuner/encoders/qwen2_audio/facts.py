"""Qwen2-Audio: facts of its audio tower, and of the path through its language model. No torch here.

The tower is Whisper's encoder with the padding masked and with the last states averaged in pairs, so features, token
arithmetic and target names are Whisper's. It comes inside the whole model (`qwen2_audio`), of which only the
tower is read, or as a folder of its own (`qwen2_audio_encoder`).

On the path `full_forward` the pairs pass through the projector and the language model, and the last hidden state is
pooled over them. There is no text prompt: an embedding should depend only on the recording, every token of a prompt
would cost each clip a pass through 7 billion parameters, and the adapters can learn what a fixed prompt could add.
So neither the word embeddings nor the output layer is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tuner.encoders.checkpoint import fingerprint, positive, tower_config, weight_files
from tuner.encoders.family import TOWER_PATH, TOWER_PREFIXES, EncoderSource, Family
from tuner.encoders.preprocessor import preprocessor_file
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage, Window
from tuner.encoders.whisper.facts import READERS, whisper_spec
from tuner.errors import EncoderError

WHOLE, TOWER = "qwen2_audio", "qwen2_audio_encoder"
PREFIXES = {WHOLE: TOWER_PREFIXES, TOWER: ("",)}
TOWER_PATHS = {WHOLE: TOWER_PATH, TOWER: ""}
# Parts that the language model's path reads, by their names below the root of the adapters (`Qwen2AudioModel`).
PARTS = {
    "audio_tower.": PREFIXES[WHOLE],
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model.layers.": ("language_model.model.layers.", "model.language_model.layers."),
    "language_model.norm.": ("language_model.model.norm.", "model.language_model.norm."),
}
PAIRS = Window(kernel=2, stride=2, padding=0)
# The nested configuration of a whole model may omit what equals the defaults: the sizes of Qwen2-Audio-7B.
DEFAULTS = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "max_source_positions": 1500,
}
# The same for its language model, with the defaults of transformers' Qwen2Config.
TEXT_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
# The gated MLP has two widening layers where others have one, so `fc1` in a space means both.
TEXT_ALIASES = {
    "out_proj": ("o_proj",),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "fc1": ("gate_proj", "up_proj"),
    "fc2": ("down_proj",),
}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower, or of the path through the language model; `source` is a whole model or the tower alone.

    Raises:
        EncoderError: a field of the configuration is wrong, there are no weights, or padding to 30 s is requested.
    """
    if source.ref.pad_to_30s:
        raise EncoderError(
            f"{source.ref.source}: Qwen2-Audio masks the padding after a clip, so padding to 30 s costs more and gives "
            "the same embeddings; drop pad_to_30s"
        )
    weights = weight_files(source.folder, PREFIXES[source.model_type])
    config, path = tower_config(source.config, DEFAULTS), TOWER_PATHS[source.model_type]
    tower = whisper_spec(source, config, weights, path, (PAIRS,))
    if source.model_type == TOWER:
        return tower
    tower = replace(tower, language_model_path="model.language_model")
    return _with_language_model(source, tower) if source.ref.path == "full_forward" else tower


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the language model from a parsed `config.json`."""
    return TEXT_DEFAULTS | dict(config.get("text_config") or {})


def _with_language_model(source: EncoderSource, tower: EncoderSpec) -> EncoderSpec:
    folder, (stage,) = source.folder, tower.stages
    weights = sorted({file for prefixes in PARTS.values() for file in weight_files(folder, prefixes)})
    configs = [folder / "config.json", preprocessor_file(folder)]
    inside = replace(stage, block_path=f"audio_tower.{stage.block_path}")
    return replace(
        tower,
        fingerprint=fingerprint(configs, weights, tower.family, "full_forward"),
        stages=(inside, _language_model_stage(source)),
        pooling_windows=(),
        path="full_forward",
        tower_alone=tower,
    )


def _language_model_stage(source: EncoderSource) -> Stage:
    folder, config = source.folder, text_config(source.config)
    if config.get("model_type", "qwen2") != "qwen2" or config.get("use_sliding_window"):
        raise EncoderError(
            f"{folder}: text_config in config.json is not of a Qwen2 with full attention, the only language model that "
            "tuner supports here; use path audio_tower"
        )
    width, wide = positive(config, "hidden_size", folder), positive(config, "intermediate_size", folder)
    heads = positive(config, "num_attention_heads", folder)
    head_width = config.get("head_dim") or width // heads
    queries, keys = heads * head_width, (config["num_key_value_heads"] or heads) * head_width
    sizes = {
        "self_attn.q_proj": (width, queries),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (queries, width),
        "mlp.gate_proj": (width, wide),
        "mlp.up_proj": (width, wide),
        "mlp.down_proj": (wide, width),
    }
    return Stage(
        block_path="language_model.layers.{}",
        layers=positive(config, "num_hidden_layers", folder),
        width=width,
        targets={
            name: LinearTarget(suffix, *size, name in READERS)
            for suffix, size in sizes.items()
            for name in [suffix.partition(".")[2]]
        },
        aliases=TEXT_ALIASES,
        windows=(PAIRS,),
        part="language_model",
    )


FAMILIES = (
    Family(
        model_type=WHOLE,
        prefixes=PREFIXES[WHOLE],
        inspect=inspect,
        tower="qwen2_audio",
        features="log_mel",
        paths=("audio_tower", "full_forward"),
        behind_tower=tuple(prefixes for prefixes in PARTS.values() if prefixes != PREFIXES[WHOLE]),
    ),
    Family(model_type=TOWER, prefixes=PREFIXES[TOWER], inspect=inspect, tower="qwen2_audio", features="log_mel"),
)
