"""One recording from its file or bytes to a mono waveform at the encoder's sampling rate."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

# Below -80 dBFS a 16-bit recording moves by three steps at most: dither, not sound.
SILENCE_PEAK = 1e-4
# Terms of the resampling ratio. 441/160 (44.1 kHz to 16 kHz) is exact; 11127 Hz would need a kernel of 1.4 GB.
MAX_RATIO_TERM = 2000


class UnusableAudioError(Exception):
    """This recording is rejected. `reason` is the phrase counted over all rows, `detail` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Recording:
    """A decoded recording: mono float32 samples [S] in [-1, 1] at `rate` Hz."""

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    @property
    def digest(self) -> str:
        """Digest of the sound itself: the same recording under another name, or as wav and flac, has the same one."""
        return hashlib.blake2b(np.ascontiguousarray(self.samples).data, digest_size=16).hexdigest()


def decode(source: Path | bytes, max_seconds: float) -> Recording:
    """Decode wav, flac, ogg or mp3 and mix the channels to mono by their mean.

    Never reads more than `max_seconds` and one sample, whatever the header claims.

    Raises:
        UnusableAudioError: missing, unreadable, empty, silent (peak below -80 dBFS), not finite or too long.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            rate = int(file.samplerate)
            longest = math.floor(max_seconds * rate)
            channels = file.read(longest + 1, dtype="float32", always_2d=True)
    except FileNotFoundError:
        raise UnusableAudioError("missing") from None
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        missing = isinstance(source, Path) and not source.exists()
        raise UnusableAudioError("missing" if missing else "unreadable", " ".join(str(error).split())) from None
    samples = channels.mean(axis=1, dtype=np.float32)
    _check_samples(samples, longest, max_seconds)
    return Recording(samples, rate)


def _check_samples(samples: np.ndarray, longest: int, max_seconds: float) -> None:
    if len(samples) == 0:
        raise UnusableAudioError("empty")
    if len(samples) > longest:
        raise UnusableAudioError("too long", f"longer than {max_seconds:g} s")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise UnusableAudioError("unreadable", "samples are not finite")
    if peak < SILENCE_PEAK:
        raise UnusableAudioError("silent", f"peak {peak:.1e} of full scale")


def resample(recording: Recording, rate: int) -> np.ndarray:
    """Resample to `rate` Hz with torchaudio's windowed sinc filter.

    A ratio of large coprime terms is replaced by the nearest one with terms of at most `MAX_RATIO_TERM`; the pitch
    changes by at most 1 in 4000 then, less than a hundredth of a semitone.

    Returns:
        float32 samples [S].
    """
    if recording.rate == rate:
        return recording.samples
    import torch

    ratio = bounded_ratio(recording.rate, rate)
    length = len(recording.samples)
    # oneDNN compiles a convolution for each new length, which takes five times as long as the convolution. Few lengths
    # occur after rounding up, and the zeros are those that the filter assumes behind the clip anyway.
    rounded = -(-length // (recording.rate // 2 + 1)) * (recording.rate // 2 + 1)
    waveform = torch.nn.functional.pad(torch.from_numpy(recording.samples), (0, rounded - length))
    resampled: np.ndarray = _resampler(ratio)(waveform).numpy()
    return resampled[: math.ceil(length / ratio)]


@lru_cache(maxsize=32)
def _resampler(ratio: Fraction) -> Any:
    # The transform keeps its kernel; torchaudio.functional.resample would build it again for each clip.
    import torchaudio

    return torchaudio.transforms.Resample(ratio.numerator, ratio.denominator)


def bounded_ratio(source: int, target: int) -> Fraction:
    """Source over target rate with terms of at most `MAX_RATIO_TERM`, exact where that is possible."""
    ratio = Fraction(source, target)
    if max(ratio.numerator, ratio.denominator) <= MAX_RATIO_TERM:
        return ratio
    largest = MAX_RATIO_TERM if ratio <= 1 else max(1, int(MAX_RATIO_TERM / ratio))
    return ratio.limit_denominator(largest)
