"""wav2vec 2.0, HuBERT and WavLM: facts from their configuration, and their features. No torch at import.

The three read the waveform: a feature is a sample, C is 1. Their convolutions and the positional convolution over the
whole clip belong to the stem and stay frozen; LoRA goes to the transformer blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuner.encoders.checkpoint import positive, read_json, weight_files
from tuner.encoders.family import PREPROCESSOR, EncoderSource, Family
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage, Window
from tuner.errors import DataError, EncoderError

if TYPE_CHECKING:
    import torch

    from tuner.encoders.base import AudioEncoder

# The encoder alone, and inside a model with a head (`Wav2Vec2ForCTC` and others).
PREFIXES = {name: (f"{name}.", "") for name in ("wav2vec2", "hubert", "wavlm")}
SAMPLING_RATE = 16_000  # Hz
# The architecture has no limit; attention over a clip grows with its square, and all families stop here.
MAX_SECONDS = 30
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
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
# What these models can have on top of the towers that are known here, by the field that switches it on.
_UNKNOWN_PARTS = {
    "add_adapter": "convolutions behind the blocks",
    "conv_pos_batch_norm": "a batch norm before the positional convolution",
}


def inspect(source: EncoderSource) -> EncoderSpec:
    """Facts of an encoder.

    Raises:
        EncoderError: a field of the configuration is missing or asks for what is not supported, there are no weights
            or no preprocessor configuration, or padding to 30 s is asked for.
    """
    folder, config, family = source.folder, source.config, source.model_type
    if source.ref.pad_to_30s:
        raise EncoderError(f"{source.ref.source}: {family} has no 30 s window to pad to; leave pad_to_30s out")
    for field, part in _UNKNOWN_PARTS.items():
        if config.get(field):
            raise EncoderError(f"{folder}: {field} in config.json asks for {part}, which this program does not run")
    _read_preprocessor(folder / PREPROCESSOR)
    layers = positive(config, "num_hidden_layers", folder)
    width, wide = positive(config, "hidden_size", folder), positive(config, "intermediate_size", folder)
    targets = {name: LinearTarget(f"attention.{name}", width, width) for name in ATTENTION}
    targets["intermediate_dense"] = LinearTarget("feed_forward.intermediate_dense", width, wide)
    targets["output_dense"] = LinearTarget("feed_forward.output_dense", wide, width)
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


class WaveformFeatures:
    """The waveform itself, of zero mean and unit variance where the model was trained so."""

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import Wav2Vec2FeatureExtractor

        self.spec = spec
        self.extractor: Any = Wav2Vec2FeatureExtractor.from_dict(_read_preprocessor(spec.folder / PREPROCESSOR))

    def extract(self, waveform: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """Samples [1, S] from mono samples [S] at 16 kHz, and their number.

        Raises:
            DataError: the clip is empty, not mono, or longer than 30 s.
        """
        if waveform.ndim != 1 or not waveform.size:
            raise DataError(f"a clip must be mono and not empty, but this one has shape {waveform.shape}")
        if waveform.size > self.spec.max_frames:
            raise DataError(
                f"a clip of {waveform.size / SAMPLING_RATE:.1f} s is longer than the encoder's {MAX_SECONDS} s; cut it"
            )
        output = self.extractor(waveform, sampling_rate=SAMPLING_RATE, padding=False)
        samples: NDArray[np.float32] = np.asarray(output["input_values"], dtype=np.float32)
        return samples, waveform.size


def _read_preprocessor(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EncoderError(f"{path}: is missing, and it alone says how the waveform is normalised; fetch it too")
    config = read_json(path)
    rate = config.get("sampling_rate", SAMPLING_RATE)
    if rate != SAMPLING_RATE:
        raise EncoderError(f"{path}: sampling_rate is {rate}, but this encoder reads {SAMPLING_RATE}; fetch it again")
    return config


def _convolutions(source: EncoderSource) -> tuple[Window, ...]:
    kernels, strides = source.config.get("conv_kernel"), source.config.get("conv_stride")
    if not isinstance(kernels, list) or not isinstance(strides, list) or len(kernels) != len(strides):
        raise EncoderError(
            f"{source.folder}: conv_kernel and conv_stride in config.json must be lists of one length; fetch it again"
        )
    return tuple(Window(int(kernel), int(stride), 0) for kernel, stride in zip(kernels, strides, strict=True))


def _load(spec: EncoderSpec, dtype: torch.dtype, device: str) -> AudioEncoder:
    if spec.family == "wavlm":
        from tuner.encoders.wav2vec2.wavlm import load_wavlm

        return load_wavlm(spec, dtype, device)
    from tuner.encoders.wav2vec2.tower import load_wav2vec2

    return load_wav2vec2(spec, dtype, device)


FAMILIES = tuple(
    Family(
        model_type=name,
        prefixes=prefixes,
        inspect=inspect,
        load=_load,
        load_features=WaveformFeatures,
        paths=("full_forward",),
    )
    for name, prefixes in PREFIXES.items()
)
