"""The benchmarks measure what they say: the peer trains the same thing, the levers too, memory is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import soundfile
import torch
from conftest import Tiny, write_encoder
from torch.utils.data import DataLoader

from benchmarks import peer, peer_training
from benchmarks.levers import PaddedPack
from benchmarks.peak import PeakSampler, label
from benchmarks.session import Event, run_session, search_times
from benchmarks.table import factor, render
from tuner.config import EncoderRef, LoraSpec, OptimSpec, RunSettings, TrialConfig
from tuner.data.splits import SPLITS
from tuner.data.store import Store
from tuner.data.writer import FeatureWriter, write_captions, write_clips, write_meta
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.train.batches import epoch_batches
from tuner.train.pack import Pack, PackContext, retrieve_split

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA = LoraSpec(rank=4, targets=ATTENTION)
CONFIG = TrialConfig(lora=LORA, optim=OptimSpec(lora_lr=5e-3, head_lr=2e-3), seed=3)
TEXT_DIM = 8
MIB = 2**20


# The peer


@dataclass(frozen=True)
class Spoken:
    """Noises as wav files with captions, in the peer's manifest and in a store."""

    manifest: Path
    store: Store
    text_MD: torch.Tensor


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    """24 clips of 0.2 to 1.9 s (the tiny encoder's window is 2 s) with 9 captions, so that batches repeat some."""
    folder = tmp_path_factory.mktemp("spoken")
    reference = EncoderRef(source=str(write_encoder(folder / "encoder")), pad_to_30s=True)
    spec = inspect_encoder(reference)
    random = np.random.default_rng(0)
    captions = [f"caption {index}" for index in range(9)]
    rows, extracted = [], []
    for clip in range(24):
        samples = (0.1 * random.standard_normal(random.integers(3200, 30400))).astype(np.float32)
        soundfile.write(folder / f"{clip}.wav", samples, 16_000, subtype="FLOAT")
        split = "train" if clip < 16 else "validation"
        rows.append({"audio": str(folder / f"{clip}.wav"), "caption": captions[clip % 9], "split": split})
        extracted.append(load_feature_extractor(spec).extract(samples))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embeddings = random.standard_normal((9, TEXT_DIM)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    write_spoken_store(folder / "store", reference, rows, extracted, embeddings)
    return Spoken(manifest, Store.open(folder / "store"), torch.from_numpy(embeddings))


def write_spoken_store(
    folder: Path,
    encoder: EncoderRef,
    rows: list[dict[str, str]],
    extracted: list[tuple[np.ndarray, int]],
    embeddings: np.ndarray,
) -> None:
    folder.mkdir()
    clips = range(len(rows))
    with FeatureWriter(folder) as writer:
        writer.add(clips, pa.array([features.reshape(-1) for features, _ in extracted], pa.list_(pa.float32())))
    places = writer.places(clips)
    frames = [count for _, count in extracted]
    columns = {
        "clip_id": [str(clip) for clip in clips],
        "audio": [row["audio"] for row in rows],
        "language": ["en"] * len(rows),
        "split": [SPLITS.index(row["split"]) for row in rows],
        "frames": frames,
        "seconds": [count / 100 for count in frames],
        "captions": [[clip % 9] for clip in clips],
        **dict(zip(("shard", "batch", "slot"), places.T, strict=True)),
    }
    write_clips(folder, columns)
    write_captions(folder, [f"caption {index}" for index in range(9)], embeddings)
    names = ("fingerprint", "encoder_fingerprint", "text_encoder", "text_fingerprint")
    facts = dict.fromkeys(names, "spoken") | {"encoder": encoder.model_dump(), "shards": writer.shards}
    write_meta(folder, {**facts, "text_dim": TEXT_DIM, "feature_channels": extracted[0][0].shape[0]})


@pytest.fixture
def peer_and_pack(spoken: Spoken) -> tuple[peer_training.Training, Pack]:
    """Both with the same weights: A as the project draws it, B not zero, so that LoRA counts from the first loss."""
    settings = RunSettings(store=str(spoken.store.folder), encoder=spoken.store.encoder, epochs=2, batch_size=8)
    encoder = load_encoder(inspect_encoder(spoken.store.encoder), torch.float32)
    pack = Pack(PackContext(encoder, spoken.store, settings))
    member = pack.attach("t", CONFIG)
    tower = peer_training.load_audio_encoder(Path(spoken.store.encoder.source))
    model = peer_training.ContrastiveModel(tower, CONFIG, TEXT_DIM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, theirs in zip(member.lora_parameters, model.lora_parameters(), strict=True):
            ours.add_(torch.randn(ours.shape, generator=generator), alpha=0.1)
            theirs.copy_(ours)
        model.head.load_state_dict(member.head.layers[0].state_dict())
    return peer_training.Training(model, CONFIG.optim, spoken.text_MD, pack.total_steps), pack


# PEFT still asks transformers 5 by this property's old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_peer_trains_the_same_thing(spoken: Spoken, peer_and_pack: tuple[peer_training.Training, Pack]) -> None:
    """Two epochs on the same batches, without dropout: losses within 1e-4, weights within 1e-3 of what they moved."""
    training, pack = peer_and_pack
    member = pack.members["t"]
    start = torch.cat([parameter.detach().clone().flatten() for parameter in member.lora_parameters])
    for epoch in (1, 2):
        batches = epoch_batches(spoken.store, pack.train_clips, 8, 0, epoch)
        order = [clip for batch in batches for clip in batch.clips_B.tolist()]
        collate = peer_training.Collate(training.model.encoder.get_base_model())
        recordings = peer_training.Recordings(spoken.manifest, "train", peer_training.read_captions(spoken.manifest))
        loader = DataLoader(recordings, 8, sampler=order, collate_fn=collate)
        row = pack.train_epoch(["t"])["t"]
        assert isinstance(row, dict)
        assert training.epoch(loader) == pytest.approx(row["loss"], rel=1e-4)
    ours, theirs = (
        torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameters in (member.lora_parameters, training.model.lora_parameters())
    )
    moved = float((ours - start).norm())
    assert moved > 0.1
    assert float((ours - theirs).norm()) < 1e-3 * moved
    assert sum(parameter.numel() for parameter in training.parameters) == member.trainable_parameters
    check_recall(spoken, training, pack)


def check_recall(spoken: Spoken, training: peer_training.Training, pack: Pack) -> None:
    captions = peer_training.read_captions(spoken.manifest)
    collate = peer_training.Collate(training.model.encoder.get_base_model())
    loader = DataLoader(peer_training.Recordings(spoken.manifest, "validation", captions), 4, collate_fn=collate)
    clips = spoken.store.split("validation")
    expected = retrieve_split(spoken.store, clips, pack.embed("t", clips)).metrics()["recall@10"]
    assert peer_training.recall_at_10(training.model, loader, spoken.text_MD) == expected


def test_search_parameters_of_the_peer_are_the_configuration() -> None:
    config = TrialConfig(lora=LoraSpec(rank=8, alpha_ratio=4.0, dropout=0.05, targets=("v_proj", "o_proj")))
    assert peer.trial_config(peer.trial_params(config)) == config


# Levers and work


def tiny_pack(tiny: Tiny, kind: type[Pack] = Pack, dtype: torch.dtype = torch.float32, **settings: object) -> Pack:
    encoder = load_encoder(inspect_encoder(tiny.encoder), dtype)
    pack = kind(PackContext(encoder, tiny.store(), tiny.settings(**settings)))
    pack.attach("t", TrialConfig(lora=LORA, optim=OptimSpec(lora_lr=1e-2)))
    return pack


def test_a_batch_padded_to_its_longest_trains_as_the_packed_one(tiny: Tiny) -> None:
    """Tolerance 1e-5 on the losses of two epochs, fp32."""
    packed, padded = tiny_pack(tiny), tiny_pack(tiny, PaddedPack)
    for _ in range(2):
        rows = [pack.train_epoch(["t"])["t"] for pack in (packed, padded)]
        assert isinstance(rows[0], dict)
        assert isinstance(rows[1], dict)
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


def test_the_padded_batch_really_carries_its_padding(tiny: Tiny) -> None:
    pack = tiny_pack(tiny, PaddedPack)
    clips = pack.train_clips[:5]
    packing = pack.prefix(0).hidden(clips).packing
    assert set(packing.lengths) == {pack.length_N[clips].max()}
    assert packing.tokens > pack.length_N[clips].sum()


# Memory, sessions, tables

HOLD = "import sys, time; block = b'x' * {bytes}; print(len(block), flush=True); sys.stdin.read()"


def test_the_peak_counts_children_and_stays_after_they_ended() -> None:
    """A parent and its child hold 60 MiB each; the child ends before the last sample."""
    child = HOLD.format(bytes=60 * MIB)
    parent = f"import subprocess, sys; block = b'x' * {60 * MIB}; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", f"{parent}; print('ended', flush=True); sys.stdin.read()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        PeakSampler(process.pid, interval=60) as sampler,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(60 * MIB)
        sampler.sample()
        both = sampler.peak
        psutil.Process(process.pid).children()[0].kill()
        assert process.stdout.readline().strip() == "ended"
        sampler.sample()
        process.stdin.close()
    assert 120 * MIB < both.total < 200 * MIB
    assert sum(both.processes.values()) == 2
    assert sampler.peak.total == both.total
    assert sampler.peak.samples > both.samples
    assert sum(both.by_name.values()) == both.total


def test_a_process_is_named_by_its_script(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("print('ready', flush=True); input()")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert label(psutil.Process(process.pid)) == "waits.py"
        process.kill()


def test_a_session_keeps_events_with_their_times(tmp_path: Path) -> None:
    code = (
        "import json, time; print('words'); print(json.dumps({'event': 'a'}), flush=True); "
        "time.sleep(0.5); print(json.dumps({'event': 'b'}), flush=True)"
    )
    session = run_session([sys.executable, "-c", code], tmp_path / "log")
    assert [event.fields["event"] for event in session.events] == ["a", "b"]
    # A line that is read late on a busy machine shortens or lengthens what is between them.
    assert 0.1 < session.events[1].seconds - session.events[0].seconds < session.seconds
    assert session.seconds > session.events[1].seconds
    assert session.peak.total > MIB
    assert (tmp_path / "log").read_text() == "words\n"


def test_a_session_that_fails_quotes_its_log(tmp_path: Path) -> None:
    code = "import sys; print('the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*the reason"):
        run_session([sys.executable, "-c", code], tmp_path / "log")


def test_the_parts_of_a_search() -> None:
    """Two trials of one epoch: 4 s of start, 2 s and 3 s of work, 0.5 s between them, 1.5 s at the end."""
    timeline: list[tuple[float, dict[str, Any]]] = [
        (1.0, {"event": "trial_started", "trial": "t0"}),
        (6.0, {"event": "epoch_done", "trial": "t0", "train_seconds": 1.5, "validation_seconds": 0.5}),
        (6.1, {"event": "trial_ended", "trial": "t0", "state": "complete"}),
        (6.2, {"event": "trial_started", "trial": "t1"}),
        (9.4, {"event": "epoch_done", "trial": "t1", "train_seconds": 2.5, "validation_seconds": 0.5}),
        (9.5, {"event": "trial_ended", "trial": "t1", "state": "complete"}),
    ]
    times = search_times([Event(seconds, fields) for seconds, fields in timeline], 11.0)
    assert times.start == pytest.approx(4.0)
    assert times.working == pytest.approx(5.0)
    assert times.outside_each == pytest.approx(0.5)
    assert times.outside_mean == pytest.approx((9.5 - 1.0 - 5.0) / 2)
    assert times.after == pytest.approx(1.5)
    assert times.start + times.working + times.outside_each + times.after == pytest.approx(11.0)


def test_a_failed_trial_is_no_result() -> None:
    timeline = [
        Event(1.0, {"event": "trial_ended", "trial": "t0", "state": "complete"}),
        Event(2.0, {"event": "trial_ended", "trial": "t1", "state": "failed"}),
    ]
    with pytest.raises(AssertionError, match="did not end well"):
        search_times(timeline, 3.0)


def test_a_table_shows_every_cell_in_line() -> None:
    lines = render("times", ("part", "seconds"), [("a long name of a part", "1.5"), ("b", "12.25")]).splitlines()
    assert lines[0] == "times"
    assert any(line.split() == ["part", "seconds"] for line in lines)
    assert len({line.index(cell) + len(cell) for line in lines for cell in ("1.5", "12.25") if cell in line}) == 1
    assert "a long name of a part" in "\n".join(lines)
    assert factor(10.0, 4.0) == "2.5x"
