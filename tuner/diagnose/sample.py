"""A few clips to try the encoder on: from the data if there is any, else tones in noise.

Shapes: S samples, C channels, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tuner.data.audio import UnusableAudioError, at_rate, decode
from tuner.data.store import Store
from tuner.data.tables import EmbeddedAudio, read_audio_bytes
from tuner.diagnose.recordings import Recordings
from tuner.diagnose.subject import Sample, Subject
from tuner.encoders.family import FeatureExtractor
from tuner.encoders.spec import EncoderSpec
from tuner.lora.path import MIN_TOKENS
from tuner.train.embed import Clips

CLIPS = 16
WAVEFORMS = 4  # of these, also decoded, for checks that need the recording itself
SYNTHETIC_SECONDS = (0.8, 1.1, 1.5, 2.0, 2.6, 3.1, 3.7, 4.3)


def draw_sample(subject: Subject, extractor: FeatureExtractor) -> Sample:
    """Clips of different sound over the whole range of lengths; for a store, with its own features."""
    spec, store, recordings = subject.spec, subject.request.store, subject.recordings
    assert spec is not None, "a sample is drawn for an encoder"
    if store is not None and recordings is not None and store.encoder_fingerprint == spec.features_fingerprint:
        return _from_store(store, recordings, spec)
    if recordings is not None and recordings.names:
        chosen = _spread(_distinct(recordings, range(len(recordings.names))), np.asarray(recordings.seconds), CLIPS)
        waveforms = decoded([recordings.audio[position] for position in chosen], spec)
        if waveforms:
            return _extracted(waveforms, extractor, f"{len(waveforms)} recordings of the data")
    return _extracted(_tones(spec), extractor, f"{len(SYNTHETIC_SECONDS)} synthetic tones in noise")


def decoded(audio: Sequence[Path | EmbeddedAudio], spec: EncoderSpec) -> tuple[NDArray[np.float32], ...]:
    """Waveforms [S] at the encoder's rate of the recordings that still exist and can be used."""
    waveforms = []
    for source in audio:
        try:
            content = read_audio_bytes([source])[0] if isinstance(source, EmbeddedAudio) else source
            recording = decode(content, spec.max_seconds)
        except UnusableAudioError:
            continue
        waveforms.append(at_rate(recording, spec.sampling_rate, spec.max_seconds))
    return tuple(waveforms)


def _from_store(store: Store, recordings: Recordings, spec: EncoderSpec) -> Sample:
    tokens = np.array([spec.sequence_length(int(frames)) for frames in store.frames])
    train = [clip for clip, split in enumerate(recordings.splits) if split == "train"] or list(range(len(store)))
    distinct = _distinct(recordings, [clip for clip in train if tokens[clip] >= MIN_TOKENS] or train)
    clips = np.asarray(_spread(distinct, store.frames, CLIPS), dtype=np.int64)
    there = [recordings.audio[clip] for clip in clips if _is_file(recordings.audio[clip])]
    return Sample(store, clips, f"{len(clips)} clips of the store", decoded(there[:WAVEFORMS], spec))


def _is_file(audio: Path | EmbeddedAudio) -> bool:
    return isinstance(audio, Path) and audio.is_file()


def _distinct(recordings: Recordings, clips: Sequence[int]) -> list[int]:
    """One clip of each sound, without silent ones if there are others."""
    silent = set(recordings.silent)
    heard = [clip for clip in clips if recordings.names[clip] not in silent] or list(clips)
    return list({recordings.contents[clip]: clip for clip in reversed(heard)}.values())


def _spread(clips: list[int], length_N: NDArray[np.generic], count: int) -> list[int]:
    """`count` of the clips, evenly from the shortest to the longest."""
    ordered = sorted(clips, key=lambda clip: (float(length_N[clip]), clip))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return [ordered[place] for place in places]


def _extracted(waveforms: Sequence[NDArray[np.float32]], extractor: FeatureExtractor, origin: str) -> Sample:
    pairs = [extractor.extract(waveform) for waveform in waveforms]
    clips = Clips([features for features, _ in pairs], np.array([frames for _, frames in pairs], dtype=np.int32))
    return Sample(clips, np.arange(len(pairs)), origin, tuple(waveforms[:WAVEFORMS]))


def _tones(spec: EncoderSpec) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    waveforms = []
    for index, seconds in enumerate(SYNTHETIC_SECONDS):
        time = np.arange(int(min(seconds, spec.max_seconds) * spec.sampling_rate)) / spec.sampling_rate
        tone = 0.3 * np.sin(2 * np.pi * 180 * 1.5**index * time) + 0.05 * random.standard_normal(time.size)
        waveforms.append(tone.astype(np.float32))
    return waveforms
