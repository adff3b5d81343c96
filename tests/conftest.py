"""Tiny random encoders and small synthetic stores, shared by the tests of training, lanes and search."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from terminal import Terminal

from tuner.config import EncoderRef, RunSettings
from tuner.data.splits import SPLITS
from tuner.data.store import Store
from tuner.data.writer import FeatureWriter, write_captions, write_clips, write_meta
from tuner.encoders.registry import inspect_encoder

if TYPE_CHECKING:
    from fuzzing import Bench
    from scripted_head import Head
    from transformers import WhisperConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

CAPTIONS = 6
TEXT_DIM = 8
MELS = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that are allowed much time come first: of several workers, none is left with a long one at the end."""
    allowed: dict[Path, float] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        allowed[item.path] = max(allowed.get(item.path, 0.0), limit.args[0] if limit else 0.0)
    items.sort(key=lambda item: -allowed[item.path])


@dataclass(frozen=True)
class Tiny:
    """A folder with an encoder, and a store of its features."""

    encoder: EncoderRef
    store_folder: Path

    def store(self) -> Store:
        return Store.open(self.store_folder)

    def settings(self, **changes: Any) -> RunSettings:
        values: dict[str, Any] = {
            "epochs": 2,
            "batch_size": 12,
            "tokens_per_forward": 64,
            "precision": "fp32",
        } | changes
        return RunSettings(store=str(self.store_folder), encoder=self.encoder, **values)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    reference = EncoderRef(source=str(write_encoder(folder / "encoder")))
    return Tiny(reference, write_store(folder / "store", reference))


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return Terminal(tmp_path, monkeypatch, capsys)


@pytest.fixture
def bench(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> Iterator[Bench]:
    """Where made-up inputs of one kind are tried; the kind is the name of the test."""
    from fuzzing import PROPERTY, Bench

    bench = Bench(request.node.name.removeprefix("test_"), tmp_path, monkeypatch)
    yield bench
    record_property(PROPERTY, bench.row())


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A whole Qwen2-Audio; its reference takes the path of the tower alone."""
    folder = tmp_path_factory.mktemp("tiny-qwen")
    reference = EncoderRef(source=str(write_qwen2_audio(folder / "encoder")))
    return Tiny(reference, write_store(folder / "store", reference))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Head:
    """Whom every address leads to; commands run in a folder of their own."""
    from scripted_head import Head

    from tuner.commands.actions import jobs, places
    from tuner.service.jobs import cluster

    head = Head([], [None])
    head.status = "SUCCEEDED"
    for action in (jobs, places):
        monkeypatch.setattr(action, "connect", lambda address: cluster.Cluster(head))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return head


def clock_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give a module a clock that sleeps at once; `on_sleep` is what happens meanwhile."""
    hand = SimpleNamespace(now=1000.0, on_sleep=lambda: None)

    def sleep(seconds: float) -> None:
        hand.now += seconds
        hand.on_sleep()

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: hand.now, sleep=sleep))
    return hand


def write_qwen2_audio(folder: Path) -> Path:
    """A random Qwen2-Audio as Hugging Face saves it: the tower of `write_encoder`, and a wider language model."""
    import torch
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 48, "num_mel_bins": MELS, "max_source_positions": 100}
    text = {"model_type": "qwen2", "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=50)
    )
    with torch.no_grad():
        # transformers starts so near to zero that attention would hardly matter.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def small_whisper(**changes: Any) -> WhisperConfig:
    """The configuration of a Whisper with three blocks of width 32."""
    from transformers import WhisperConfig

    sizes: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 80,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    }
    return WhisperConfig(**sizes | changes)


def write_encoder(folder: Path, layers: int = 3) -> Path:
    """A random Whisper as Hugging Face saves it."""
    import torch
    from transformers import WhisperModel

    torch.manual_seed(0)
    config = small_whisper(encoder_layers=layers, num_mel_bins=MELS, max_source_positions=100)
    WhisperModel(config).save_pretrained(folder)
    return folder


def write_store(folder: Path, encoder: EncoderRef, clips: int = 60) -> Path:
    """Clips of 3 to 11 tokens, or as many as they all have; a clip's sound says which of a few captions it has, so that
    training can learn it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    spec = inspect_encoder(encoder)
    # Loud, because a random encoder hears positions better than sound.
    patterns = 20 * random.standard_normal((CAPTIONS, MELS, 1))
    frames = random.integers(6, 22, size=clips)
    if spec.fixed_tokens:
        frames[:] = spec.max_frames
    features = []
    for clip in range(clips):
        stored = spec.max_frames if spec.fixed_tokens else 2 * ((int(frames[clip]) - 1) // 2 + 1) + 2
        features.append((patterns[clip % CAPTIONS] + 5 * random.standard_normal((MELS, stored))).astype(np.float32))
    with FeatureWriter(folder) as writer:
        writer.add(range(clips), pa.array([item.reshape(-1) for item in features], pa.list_(pa.float32())))
    places = writer.places(range(clips))
    write_clips(
        folder,
        {
            "clip_id": [f"clip-{clip}" for clip in range(clips)],
            "audio": [f"{clip}.wav" for clip in range(clips)],
            "language": ["en"] * clips,
            "split": [
                SPLITS.index("train" if clip < 36 else "validation" if clip < 48 else "test") for clip in range(clips)
            ],
            "frames": frames,
            "seconds": frames / 100,
            # Every seventh clip has a second caption.
            "captions": [[clip % CAPTIONS] + ([CAPTIONS] if clip % 7 == 0 else []) for clip in range(clips)],
            "shard": places[:, 0],
            "batch": places[:, 1],
            "slot": places[:, 2],
        },
    )
    embeddings = random.standard_normal((CAPTIONS + 1, TEXT_DIM))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    write_captions(folder, [f"caption {index}" for index in range(CAPTIONS + 1)], embeddings)
    write_meta(
        folder,
        {
            "fingerprint": "tiny-store",
            "encoder": encoder.model_dump(),
            "encoder_fingerprint": spec.fingerprint,
            "text_encoder": "random",
            "text_fingerprint": "random-text",
            "text_dim": TEXT_DIM,
            "feature_channels": MELS,
            "shards": writer.shards,
        },
    )
    return folder
