"""What stands where a command would start other processes or load large models."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from fuzzing import REACHED_RAY

from tuner.commands.actions import stores
from tuner.data import prepare as prepare_module
from tuner.data.worker import FeatureWorker
from tuner.errors import ClusterError
from tuner.search import driver

TEXT_DIM = 8


def recording(pitch: float) -> bytes:
    """A short tone."""
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(1_600) * pitch), 16_000, format="WAV")
    return file.getvalue()


RECORDINGS = {f"{index}.wav": recording(0.1 + index / 100) for index in range(6)}


def prepare_words(encoder: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """`tuner prepare` without its manifest, with a worker in this process."""
    use_in_process_worker(monkeypatch)
    return ("prepare", "--encoder", encoder, "--text-encoder", text_encoder(folder / "text"), "--out", "store")


def text_encoder(folder: Path) -> Path:
    """A folder that is a text encoder as far as its files say; nobody loads its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": TEXT_DIM}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class LetterEncoder:
    """A text encoder that needs no model: unit vectors of how often each letter occurs."""

    def __init__(self, spec: Any) -> None:
        self.dim = spec.dim

    def encode(self, texts: list[str]) -> np.ndarray:
        counts = np.full((len(texts), self.dim), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for letter in text.encode("utf-8"):
                counts[row, letter % self.dim] += 1
        return np.asarray(counts / np.linalg.norm(counts, axis=1, keepdims=True))


def use_in_process_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare with the encoder's own front end, but without Ray and without a real text encoder."""

    def run_here(work: list[pa.Table], spec: Any, text: Any) -> Iterator[pa.Table]:
        worker = FeatureWorker(spec, text)
        yield from map(worker, work)

    monkeypatch.setattr(prepare_module, "run_on_ray", run_here)
    monkeypatch.setattr("tuner.encoders.text.TextEncoder", LetterEncoder)


@contextmanager
def no_fleet(*_: object, **__: object) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(name="coordinator", slots=1)


def stop(*_: object) -> None:
    raise ClusterError(REACHED_RAY)


def stand_in_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed search opens record, journal and database, and ends where it would train."""
    monkeypatch.setattr(driver, "connected", lambda *_: nullcontext(None))
    monkeypatch.setattr(driver, "Lifeline", lambda *_: SimpleNamespace(watching=nullcontext))
    monkeypatch.setattr(driver, "read_capacity", lambda: None)
    monkeypatch.setattr(driver, "size_fleet", lambda *_: None)
    monkeypatch.setattr(driver, "MeteredView", lambda view: view)
    monkeypatch.setattr(driver, "fleet", no_fleet)
    monkeypatch.setattr(driver, "LaneWatch", lambda *_: SimpleNamespace(look=None))
    monkeypatch.setattr(driver._Search, "_tune", stop)
    monkeypatch.setattr(driver._Search, "_confirm", stop)


def no_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's recordings would be downloaded."""
    monkeypatch.setattr(stores, "fetch_demo", stop)
