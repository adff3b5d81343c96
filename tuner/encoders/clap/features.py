"""CLAP's features: the log-mel picture of a clip that fills the window. Imports transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import ClapFeatureExtractor

from tuner.encoders.clap.facts import SAMPLING_RATE, read_settings
from tuner.encoders.spec import EncoderSpec
from tuner.errors import DataError


class ClapFeatures:
    """Log-mel spectrum of the whole window that a clip fills, by the checkpoint's own front end."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        config = read_settings(spec.folder, spec.feature_channels)
        self.extractor: Any = ClapFeatureExtractor.from_dict(config)

    def extract(self, waveform: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """Log-mel levels in dB [C, F] of mono samples [S] at 48 kHz, and F, since the clip fills the window.

        Raises:
            DataError: the clip is empty, not mono, or longer than the window.
        """
        if waveform.ndim != 1 or not waveform.size:
            raise DataError(f"a clip must be mono and not empty, but this one has shape {waveform.shape}")
        # The extractor would take a random part of it.
        if waveform.size > self.extractor.nb_max_samples:
            raise DataError(
                f"a clip of {waveform.size / SAMPLING_RATE:.1f} s is longer than the encoder's "
                f"{self.spec.max_seconds:g} s; cut it"
            )
        output = self.extractor(waveform, sampling_rate=SAMPLING_RATE)
        features: NDArray[np.float32] = np.ascontiguousarray(output["input_features"][0][0].T, dtype=np.float32)
        return features, features.shape[1]
