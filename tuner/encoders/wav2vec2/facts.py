"""wav2vec 2.0, HuBERT and WavLM: facts from their configuration. No torch here.

The three read the waveform: a feature is a sample, C is 1. Their convolutions and the positional convolution over the
whole clip belong to the stem and stay frozen; LoRA goes to the transformer blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.encoders.checkpoint import positive, weight_files
from tuner.encoders.family import EncoderSource, Family
from tuner.encoders.preprocessor import preprocessor_file, read_preprocessor
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage, Window
from tuner.errors import EncoderError

# The encoder alone, and inside a model with a head (`Wav2Vec2ForCTC` and others).
PREFIXES = {name: (f"{name}.", "") for name in ("wav2vec2", "hubert", "wavlm")}
SAMPLING_RATE = 16_000  # Hz
# The architecture has no limit. But the cost of attention grows with the square of the length, and the other families
# stop here, too.
MAX_SECONDS = 30
READERS = ("q_proj", "k_proj", "v_proj")  # of the block's input
ATTENTION = (*READERS, "out_proj")
ALIASES = {
    "o_proj": ("out_proj",),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "fc1": ("intermediate_dense",),
    "fc2": ("output_dense",),
    "up_proj": ("intermediate_dense",),
    "down_proj": ("output_dense",),
}
# Parts that these models can have and that are not supported here, by the field that switches each on.
_UNKNOWN_PARTS = {
    "add_adapter": "convolutions after the blocks",
    "conv_pos_batch_norm": "a batch norm before the positional convolution",
}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of an encoder.

    Raises:
        EncoderError: a field of the configuration is missing or asks for what is not supported, there are no weights
            or no preprocessor configuration, or padding to 30 s is requested.
    """
    folder, config, family = source.folder, source.config, source.model_type
    if source.ref.pad_to_30s:
        raise EncoderError(f"{source.ref.source}: {family} has no 30 s window to pad to; drop pad_to_30s")
    for field, part in _UNKNOWN_PARTS.items():
        if config.get(field):
            raise EncoderError(
                f"{folder}: {field} in config.json asks for {part}, which tuner does not support; "
                "use another checkpoint"
            )
    read_settings(folder)
    layers = positive(config, "num_hidden_layers", folder)
    width, wide = positive(config, "hidden_size", folder), positive(config, "intermediate_size", folder)
    targets = {name: LinearTarget(f"attention.{name}", width, width, name in READERS) for name in ATTENTION}
    targets["intermediate_dense"] = LinearTarget("feed_forward.intermediate_dense", width, wide, False)
    targets["output_dense"] = LinearTarget("feed_forward.output_dense", wide, width, False)
    return EncoderSpec(
        **source.facts(weight_files(folder, PREFIXES[family])),
        sampling_rate=SAMPLING_RATE,
        feature_channels=1,
        max_frames=MAX_SECONDS * SAMPLING_RATE,
        max_seconds=float(MAX_SECONDS),
        stages=(Stage("encoder.layers.{}", layers, width, targets, ALIASES),),
        stem_windows=_convolutions(source),
        path="full_forward",
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings of the front end.

    Raises:
        EncoderError: they are missing, or their sampling rate is another than the encoder's.
    """
    path, config = preprocessor_file(folder), read_preprocessor(folder)
    if config is None:
        raise EncoderError(f"{path}: is missing, but it defines how the waveform is normalised; download it too")
    rate = config.get("sampling_rate", SAMPLING_RATE)
    if rate != SAMPLING_RATE:
        raise EncoderError(
            f"{path}: sampling_rate is {rate}, but this encoder reads {SAMPLING_RATE}; download it again"
        )
    return config


def _convolutions(source: EncoderSource) -> tuple[Window, ...]:
    kernels, strides = source.config.get("conv_kernel"), source.config.get("conv_stride")
    if not isinstance(kernels, list) or not isinstance(strides, list) or len(kernels) != len(strides):
        raise EncoderError(
            f"{source.folder}: conv_kernel and conv_stride in config.json must be lists of the same length; "
            "download the model again"
        )
    return tuple(Window(int(kernel), int(stride), 0) for kernel, stride in zip(kernels, strides, strict=True))


FAMILIES = tuple(
    Family(
        model_type=name,
        prefixes=prefixes,
        inspect=inspect,
        tower="wavlm" if name == "wavlm" else "wav2vec2",
        features="waveform",
        paths=("full_forward",),
    )
    for name, prefixes in PREFIXES.items()
)
