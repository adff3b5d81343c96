"""Log-mel features of a clip, for Whisper and the towers built like it. Imports transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from tuner.encoders.preprocessor import preprocessor_file, read_preprocessor
from tuner.encoders.spec import EncoderSpec
from tuner.encoders.whisper.facts import HOP, SAMPLING_RATE
from tuner.errors import DataError, EncoderError

FFT = 400  # samples of one frame
# Below 12 frames torch's matrix kernels round differently from the 30 s run; 64 leaves a margin.
MIN_FRAMES = 64


def silence_level(features: NDArray[np.float32]) -> np.float32:
    """Value of silent frames in the features [C, F] of one clip.

    The extractor clamps log10 power at 1e-10 and at 8 below the clip's maximum, then maps x to (x + 4) / 4; digital
    silence therefore lies 2 below the clip's maximum, and never below -1.5.
    """
    return max(np.float32(-1.5), np.float32(features.max() - np.float32(2)))


class WhisperFeatures:
    """Log-mel features of a clip: only the frames of the 30 s window that it fills are computed."""

    def __init__(self, spec: EncoderSpec) -> None:
        config = read_preprocessor(spec.folder) or {}
        self.spec = spec
        self.extractor: Any = WhisperFeatureExtractor.from_dict({"feature_size": spec.feature_channels} | config)
        expected = {"feature_size": spec.feature_channels, "sampling_rate": SAMPLING_RATE, "hop_length": HOP}
        for name, value in (expected | {"n_fft": FFT, "dither": 0.0}).items():
            found = getattr(self.extractor, name)
            if found != value:
                raise EncoderError(
                    f"{preprocessor_file(spec.folder)}: {name} is {found}, but this encoder reads {value}; "
                    "download the model again"
                )

    def extract(self, waveform: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """Log-mel frames [C, F] of mono samples [S] at 16 kHz, and the number of real frames L = ceil(S / 160).

        F is what the convolutions read for the clip's tokens, plus one frame. After that the 30 s window holds only
        silence (`silence_level`). For a clip of nearly 30 s, F is all frames of the window. The frames equal those of
        the extractor's padded run bit for bit.

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
        kept = min(self.spec.frames_read(self.spec.real_length(frames)) + 1, self.spec.max_frames)
        # Two frames more than the tokens need end the signal with at least 320 zeros. The extractor mirrors the last
        # 200 samples at the end, which would otherwise change the last real frame.
        samples = max(kept, min(MIN_FRAMES, self.spec.max_frames)) * HOP
        padded = np.zeros(samples, dtype=np.float32)
        padded[: waveform.size] = waveform
        output = self.extractor(padded, sampling_rate=SAMPLING_RATE, padding="do_not_pad", truncation=False)
        features: NDArray[np.float32] = np.ascontiguousarray(output["input_features"][0][:, :kept])
        return features, frames
