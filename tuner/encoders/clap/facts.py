"""CLAP's audio tower, HTSAT (arXiv:2202.00874): facts from its configuration. No torch here.

A Swin transformer over one picture of the sound: the mel spectrum of 10 s, stretched a little, folded into a square and
cut into patches. A clip always fills that window. A shorter one is repeated as the checkpoint's own front end does it
(`repeatpad`: as often as it fits, then zeros). A longer one is refused; the original takes a random 10 s of it. So all
clips have the same number of tokens, and there is no padding to drop. From stage to stage 4 neighbouring tokens become
one of twice the width.

The tower comes inside the whole model (`clap`), of which only the tower is read, or as a folder of its own
(`clap_audio_model`, with or without the projection, which is omitted: the adapter's own head takes its place).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.encoders.checkpoint import positive, tower_config, weight_files
from tuner.encoders.family import EncoderSource, Family
from tuner.encoders.preprocessor import preprocessor_file, read_preprocessor
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage, Window
from tuner.errors import EncoderError

WHOLE, TOWER = "clap", "clap_audio_model"
PREFIXES = {WHOLE: ("audio_model.audio_encoder.",), TOWER: ("audio_model.audio_encoder.", "audio_encoder.")}
SAMPLING_RATE = 48_000  # Hz
# Fields that the nested configuration of a whole model may omit, with the defaults of transformers.
DEFAULTS = {
    "depths": [2, 2, 6, 2],
    "enable_fusion": False,
    "mlp_ratio": 4.0,
    "num_mel_bins": 64,
    "patch_embeds_hidden_size": 96,
    "patch_stride": [4, 4],
    "spec_size": 256,
    "window_size": 8,
}
_EXTRACTOR_DEFAULTS = {
    "feature_size": 64,
    "hop_length": 480,
    "max_length_s": 10,
    "sampling_rate": SAMPLING_RATE,
    "truncation": "fusion",
}
# Four neighbours, two by two, become one token; in a row of them that is every fourth.
MERGING = Window(kernel=4, stride=4, padding=0)
# transformers calls the last three `dense`, each in a module of its own; the names here are those of other families.
_SUFFIXES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
READERS = ("query", "key", "value")  # of the block's input
ALIASES = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("out_proj",),
    "up_proj": ("fc1",),
    "down_proj": ("fc2",),
}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of the tower; `source` is a whole model or the tower alone.

    Raises:
        EncoderError: a field of the configuration is wrong or asks for fusion, there are no weights or no preprocessor
            configuration, or padding to 30 s is requested.
    """
    folder = source.folder
    if source.ref.pad_to_30s:
        raise EncoderError(f"{source.ref.source}: every clip fills CLAP's own window; drop pad_to_30s")
    config = tower_config(source.config, DEFAULTS)
    if config["enable_fusion"]:
        raise EncoderError(
            f"{folder}: enable_fusion in config.json asks for four views of a clip, which tuner does not support; "
            "use a checkpoint without fusion, such as laion/clap-htsat-unfused"
        )
    mels, size = positive(config, "num_mel_bins", folder), positive(config, "spec_size", folder)
    extractor = read_settings(folder, mels)
    frames = extractor["max_length_s"] * SAMPLING_RATE // extractor["hop_length"] + 1
    if frames > size * (size // mels):
        raise EncoderError(
            f"{preprocessor_file(folder)}: makes {frames} frames, but spec_size "
            f"and num_mel_bins in config.json allow at most {size * (size // mels)}; download the model again"
        )
    return EncoderSpec(
        **source.facts(weight_files(folder, PREFIXES[source.model_type])),
        sampling_rate=SAMPLING_RATE,
        feature_channels=mels,
        max_frames=frames,
        max_seconds=float(extractor["max_length_s"]),
        stages=_stages(config, folder),
        stem_windows=(),
        fixed_tokens=_side(config, folder) ** 2,
        tower_path=_tower_path(source),
    )


def _stages(config: Mapping[str, Any], folder: Path) -> tuple[Stage, ...]:
    first, window = positive(config, "patch_embeds_hidden_size", folder), positive(config, "window_size", folder)
    stages = []
    for index, layers in enumerate(_depths(config, folder)):
        width = first * 2**index
        wide = int(config["mlp_ratio"] * width)
        sizes = {"fc1": (width, wide), "fc2": (wide, width)}
        stages.append(
            Stage(
                block_path=f"layers.{index}.blocks.{{}}",
                layers=layers,
                width=width,
                targets={
                    name: LinearTarget(suffix, *sizes.get(name, (width, width)), name in READERS)
                    for name, suffix in _SUFFIXES.items()
                },
                aliases=ALIASES,
                windows=(MERGING,) if index else (),
                attention_window=window**2,
            )
        )
    return tuple(stages)


def _side(config: Mapping[str, Any], folder: Path) -> int:
    """Patches along a side of the picture. Each stage halves it; in the last one an attention window must still fit."""
    size, mels = positive(config, "spec_size", folder), positive(config, "num_mel_bins", folder)
    window, halvings = positive(config, "window_size", folder), len(_depths(config, folder)) - 1
    stride = config["patch_stride"]
    if isinstance(stride, list) and len(set(stride)) == 1:
        stride = stride[0]
    if isinstance(stride, int) and stride > 0:
        side = size // stride
        if size % mels == 0 and side % 2**halvings == 0 and side >> halvings >= window:
            return side
    raise EncoderError(
        f"{folder}: spec_size, num_mel_bins, patch_stride, depths and window_size in config.json do not fit together; "
        "download the model again"
    )


def _depths(config: Mapping[str, Any], folder: Path) -> list[int]:
    depths = config["depths"]
    if not isinstance(depths, list) or not depths or not all(isinstance(each, int) and each > 0 for each in depths):
        raise EncoderError(
            f"{folder}: depths in config.json is {depths!r}, expected a list of positive numbers; "
            "download the model again"
        )
    return depths


def _tower_path(source: EncoderSource) -> str:
    # Two classes have this configuration, and one contains the other.
    bare = source.model_type == TOWER and "ClapAudioModel" in (source.config.get("architectures") or ())
    return "audio_encoder" if bare else "audio_model.audio_encoder"


def read_settings(folder: Path, mels: int) -> dict[str, Any]:
    """Settings of the front end.

    Raises:
        EncoderError: they are missing, or contradict the encoder.
    """
    path, given = preprocessor_file(folder), read_preprocessor(folder)
    if given is None:
        raise EncoderError(f"{path}: is missing, but it defines how a clip fills the window; download it too")
    config: dict[str, Any] = _EXTRACTOR_DEFAULTS | given
    for name, value in {"sampling_rate": SAMPLING_RATE, "feature_size": mels, "truncation": "rand_trunc"}.items():
        if config[name] != value:
            raise EncoderError(f"{path}: {name} is {config[name]}, but this encoder reads {value}; download it again")
    for name in ("hop_length", "max_length_s"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise EncoderError(f"{path}: {name} is {config[name]!r}, expected a positive number; download it again")
    return config


FAMILIES = tuple(
    Family(model_type=name, prefixes=prefixes, inspect=inspect, tower="clap", features="clap")
    for name, prefixes in PREFIXES.items()
)
