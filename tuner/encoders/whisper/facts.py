"""The Whisper family: facts from its configuration, and its features. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuner.encoders import ctranslate2
from tuner.encoders.checkpoint import positive, read_json, weight_files
from tuner.encoders.family import PREPROCESSOR, EncoderSource, Family
from tuner.encoders.spec import EncoderSpec, LinearTarget, Stage, Window
from tuner.errors import DataError, EncoderError

if TYPE_CHECKING:
    import torch

    from tuner.encoders.base import AudioEncoder

# How the encoder's tensors are named inside a WhisperForConditionalGeneration, a WhisperModel and a WhisperEncoder.
PREFIXES = ("model.encoder.", "encoder.", "")
SAMPLING_RATE = 16_000  # Hz
HOP = 160  # samples between frames
FFT = 400  # samples of one frame
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
ALIASES = {
    "o_proj": ("out_proj",),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "up_proj": ("fc1",),
    "down_proj": ("fc2",),
}
CONVOLUTIONS = (Window(kernel=3, stride=1, padding=1), Window(kernel=3, stride=2, padding=1))
STRIDE = 2  # frames a token
# Sizes of the large Whisper in the names of newer families, whose towers have them: see `in_whisper_names`.
LARGE_SIZES = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "num_mel_bins": 128,
}
# Below 12 frames the matrix kernels of torch round differently from those of the 30 s run; 64 leaves a margin.
MIN_FRAMES = 64


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
    """The configuration of a tower whose sizes have the names of newer families, for `whisper_spec`.

    Args:
        positions: what the family calls the largest number of positions.
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
    """Facts of a tower that is built like Whisper's encoder, of whatever family.

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
    targets = {name: LinearTarget(f"self_attn.{name}", width, width) for name in ATTENTION}
    targets |= {"fc1": LinearTarget("fc1", width, wide), "fc2": LinearTarget("fc2", wide, width)}
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


def silence_level(features: NDArray[np.float32]) -> np.float32:
    """Value of silent frames in the features [C, F] of one clip.

    The extractor clamps log10 power at 1e-10 and at 8 below the clip's maximum, then maps x to (x + 4) / 4; digital
    silence therefore lies 2 below the clip's maximum, and never below -1.5.
    """
    return max(np.float32(-1.5), np.float32(features.max() - np.float32(2)))


class WhisperFeatures:
    """Log-mel features of a clip: the frames of the 30 s window that the clip reaches, computed without the rest."""

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import WhisperFeatureExtractor

        config = read_json(spec.folder / PREPROCESSOR) if (spec.folder / PREPROCESSOR).is_file() else {}
        self.spec = spec
        self.extractor: Any = WhisperFeatureExtractor.from_dict({"feature_size": spec.feature_channels} | config)
        expected = {"feature_size": spec.feature_channels, "sampling_rate": SAMPLING_RATE, "hop_length": HOP}
        for name, value in (expected | {"n_fft": FFT, "dither": 0.0}).items():
            found = getattr(self.extractor, name)
            if found != value:
                raise EncoderError(
                    f"{spec.folder / PREPROCESSOR}: {name} is {found}, but this encoder reads {value}; "
                    "fetch the model again"
                )

    def extract(self, waveform: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """Log-mel frames [C, F] of mono samples [S] at 16 kHz, and the number of real frames L = ceil(S / 160).

        F = 2 T + 2 for T = (L - 1) // 2 + 1 tokens, or all 3000 for a clip of nearly 30 s: what the convolutions look
        at for T tokens, and one more, after which the 30 s window holds silence alone (`silence_level`). The frames
        are bit for bit those of the extractor's padded run.

        Raises:
            DataError: the clip is empty, not mono, or longer than the window.
        """
        if waveform.ndim != 1 or not waveform.size:
            raise DataError(f"a clip must be mono and not empty, but this one has shape {waveform.shape}")
        frames = -(-waveform.size // HOP)
        if frames > self.spec.max_frames:
            raise DataError(
                f"a clip of {waveform.size / SAMPLING_RATE:.1f} s is longer than the encoder's "
                f"{self.spec.max_seconds:g} s; cut it"
            )
        tokens = -(-frames // STRIDE)
        kept = min(STRIDE * tokens + 2, self.spec.max_frames)
        # Two frames more than the tokens need end the signal with at least 320 zeros. The extractor mirrors the last
        # 200 samples at the end, which would otherwise change the last real frame.
        samples = max(kept, min(MIN_FRAMES, self.spec.max_frames)) * HOP
        padded = np.zeros(samples, dtype=np.float32)
        padded[: waveform.size] = waveform
        output = self.extractor(padded, sampling_rate=SAMPLING_RATE, padding="do_not_pad", truncation=False)
        features: NDArray[np.float32] = np.ascontiguousarray(output["input_features"][0][:, :kept])
        return features, frames


def _load(spec: EncoderSpec, dtype: torch.dtype, device: str) -> AudioEncoder:
    from tuner.encoders.whisper.tower import load_whisper

    return load_whisper(spec, dtype, device)


FAMILY = Family(
    model_type="whisper",
    prefixes=PREFIXES,
    ctranslate2_name="WhisperSpec",
    inspect=inspect,
    load=_load,
    load_features=WhisperFeatures,
)
