"""One recording from its file or bytes to a mono waveform at the encoder's sampling rate."""

from __future__ import annotations

import hashlib
import io
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tuner.lfs import is_pointer
from tuner.places import is_file

# Below -80 dBFS a 16-bit recording moves by three steps at most: dither, not sound.
SILENCE_PEAK = 1e-4
# Terms of the resampling ratio. 441/160 (44.1 kHz to 16 kHz) is exact; 11127 Hz would need a kernel of 1.4 GB.
MAX_RATIO_TERM = 2000
# Of full scale. Whole numbers of 16 bits that were saved as floats come to 32,768; the square of a float of 1e20, which
# a spectrogram takes, is infinite.
LOUDEST = 1e6
# Hz. Below is no sound, above no recorder; a damaged header may hold any number up to 2 ** 31.
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
# Bytes that a writer may count too many in a header; the size of the header itself is the usual mistake.
HEADER_SLACK = 64
# Programs that write into a pipe do not know the length, and leave a number from here on in its place.
UNKNOWN_LENGTH = 0x7FFF0000
# libsndfile reads what is there of a cut file, and only its log says so: `data : 64000 (should be 31978)`.
_CUT = re.compile(r"^ *(?:data|SSND|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)


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

    Never reads more than `max_seconds` and one sample, even if the header claims more.

    Raises:
        UnusableAudioError: missing, unreadable, truncated, empty, silent (nothing but a constant within -80 dBFS), not
            finite or too long, or of a sampling rate outside 1 kHz to 768 kHz.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            rate = int(file.samplerate)
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise UnusableAudioError("sampling rate", f"{rate} Hz is outside 1 kHz to 768 kHz")
            _check_whole(file.extra_info)
            longest = math.floor(max_seconds * rate)
            channels = file.read(longest + 1, dtype="float32", always_2d=True)
    except FileNotFoundError:
        raise UnusableAudioError("missing") from None
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        if is_pointer(source):
            raise UnusableAudioError("Git LFS pointer", "run `git lfs pull` in its repository") from None
        missing = isinstance(source, Path) and not is_file(source)
        raise UnusableAudioError("missing" if missing else "unreadable", " ".join(str(error).split())) from None
    with np.errstate(over="ignore", invalid="ignore"):
        samples = channels.mean(axis=1, dtype=np.float32)
    _check_samples(samples, longest, max_seconds)
    return Recording(samples, rate)


def _check_whole(log: str) -> None:
    for claimed, found in ((int(match[1]), int(match[2])) for match in _CUT.finditer(log)):
        if claimed < UNKNOWN_LENGTH and claimed - found > HEADER_SLACK:
            raise UnusableAudioError("truncated", f"holds {found:,} of {claimed:,} bytes of sound")


def _check_samples(samples: np.ndarray, longest: int, max_seconds: float) -> None:
    if len(samples) == 0:
        raise UnusableAudioError("empty")
    if len(samples) > longest:
        raise UnusableAudioError("too long", f"longer than {max_seconds:g} s")
    peak = float(np.abs(samples).max())
    if not math.isfinite(peak):
        raise UnusableAudioError("unreadable", "samples are not finite")
    if peak > LOUDEST:
        raise UnusableAudioError("unreadable", f"peak {peak:.1e} of full scale")
    # A constant is what a dead input or a wrong sample format leaves: it is not heard either.
    peak = float(np.abs(samples - samples.mean(dtype=np.float64)).max())
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


def at_rate(recording: Recording, rate: int, max_seconds: float) -> np.ndarray:
    """What an encoder is given: samples [S] at `rate` Hz, at most `max_seconds` of them.

    Half of all odd rates resample a clip at the limit to a sample more, since the number of samples is rounded up.
    """
    return resample(recording, rate)[: int(max_seconds * rate)]


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
