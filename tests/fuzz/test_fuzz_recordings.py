"""Recordings with damaged headers, odd formats and samples, prepared beside sound ones."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import Tiny
from fuzzing import Bench
from generators import maybe_torn
from hypothesis import strategies as st
from in_process import RECORDINGS, prepare_words

RATES = (16_000, 1, 0, 999, 1_000, 7_919, 44_100, 767_999, 768_000, 768_001, 2**31 - 1, 2**32 - 1)
SAMPLES = {
    "tone": np.sin(np.arange(4_000) * 0.1),
    "long": np.sin(np.arange(20_000) * 0.1),
    "short": np.sin(np.arange(3)),
    "none": np.zeros(0),
    "silence": np.zeros(2_000),
    "constant": np.full(2_000, 0.5),
    "NaN": np.full(2_000, np.nan),
    "infinite": np.full(2_000, np.inf),
    "loud": np.full(2_000, 3e38) * np.cos(np.arange(2_000)),
}
FORMATS = (
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "IMA_ADPCM"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_24"),
    ("AU", "ULAW"),
    ("W64", "PCM_32"),
    ("CAF", "ALAC_16"),
    ("RF64", "PCM_16"),
    ("RAW", "PCM_16"),
    ("VOC", "PCM_U8"),
    ("NIST", "PCM_16"),
)


@st.composite
def wav_files(draw: st.DrawFn) -> bytes:
    """A WAV file whose header says anything."""
    channels = draw(st.sampled_from([1, 1, 1, 2, 6, 0, 255, 65_535]))
    bits = draw(st.sampled_from([32, 32, 16, 8, 24, 64, 0, 7]))
    rate = draw(st.sampled_from(RATES))
    kind = draw(st.sampled_from([3, 3, 1, 1, 6, 7, 2, 17, 85, 65_534, 0]))
    data: bytes = draw(st.sampled_from(list(SAMPLES.values()))).astype("<f4").tobytes()
    size = draw(st.sampled_from([len(data), len(data), 0, 2 * len(data), 2**31 - 1, 2**31, 2**32 - 1]))
    align = draw(st.sampled_from([channels * bits // 8 & 0xFFFF, 0, 1, 65_535]))
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    chunks = b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", size) + data
    whole = draw(st.sampled_from([len(chunks) + 4, len(chunks) + 4, 0, 2**32 - 1]))
    header: bytes = b"RIFF" + struct.pack("<I", whole) + b"WAVE"
    return header + chunks


@st.composite
def written_files(draw: st.DrawFn) -> bytes:
    """A file as soundfile writes it, whole or torn."""
    kind, subtype = draw(st.sampled_from(FORMATS))
    rate, channels = draw(st.sampled_from([8_000, 16_000, 44_100, 48_000])), draw(st.sampled_from([1, 2, 5]))
    samples = np.stack([draw(st.sampled_from(list(SAMPLES.values())))] * channels, axis=1)
    if subtype not in ("FLOAT", "DOUBLE"):
        # Encoders crash on what is no sound.
        samples = np.clip(np.nan_to_num(samples), -1, 1)
    file = io.BytesIO()
    try:
        with np.errstate(all="ignore"):
            soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    except (soundfile.SoundFileError, ValueError, AssertionError):
        pass  # Not every format takes every number of channels; what is written so far is a file too.
    return draw(maybe_torn(file.getvalue(), 2))


def test_recordings(bench: Bench, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One recording that cannot be used refuses the manifest, or is listed as a reject."""
    words = prepare_words(tiny.encoder.source, tmp_path, monkeypatch)
    rows = [{"audio": name, "caption": f"A tone {name}"} for name in ("0.wav", "1.wav", "2.wav", "odd.wav")]
    manifest = "\n".join(map(json.dumps, rows)).encode()
    bench.lay({**RECORDINGS, "rows.jsonl": manifest, "odd.wav": RECORDINGS["3.wav"]})
    bench.sound(*words, "rows.jsonl", "--max-rejects", 0)

    @bench.inputs(
        st.tuples(wav_files() | written_files() | st.binary(max_size=64), st.sampled_from([0, 0, 0.5])), suite=50
    )
    def one(case: tuple[bytes, float]) -> None:
        bench.lay({**RECORDINGS, "rows.jsonl": manifest, "odd.wav": case[0]})
        bench.run(*words, "rows.jsonl", "--max-rejects", case[1])
