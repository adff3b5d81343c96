"""The waveform as wav2vec 2.0, HuBERT and WavLM read it. Imports transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import Wav2Vec2FeatureExtractor

from tuner.encoders.spec import EncoderSpec
from tuner.encoders.wav2vec2.facts import MAX_SECONDS, SAMPLING_RATE, read_settings
from tuner.errors import DataError


class WaveformFeatures:
    """The waveform itself, with zero mean and unit variance if the model was trained that way."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.extractor: Any = Wav2Vec2FeatureExtractor.from_dict(read_settings(spec.folder))

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
