"""`tuner diagnose`: sound parts give no finding, and each known fault is caught by the step that looks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import soundfile
import torch
import transformers
from conftest import Tiny, write_encoder, write_store
from safetensors.torch import load_file, save_file
from test_families import NORMALISED, qwen2_audio, waveform
from trained_adapter import train_and_export

from tuner.config import EncoderRef, LoraSpec, TrialConfig
from tuner.data.store import Store
from tuner.diagnose import environment
from tuner.diagnose.backward import check_backward, try_training
from tuner.diagnose.data import _duplicates, check_data
from tuner.diagnose.features import check_features
from tuner.diagnose.findings import Diagnosis, Step
from tuner.diagnose.forward import check_forward
from tuner.diagnose.recordings import Recordings, store_recordings
from tuner.diagnose.sample import draw_sample
from tuner.diagnose.steps import diagnose
from tuner.diagnose.strategy import check_strategy
from tuner.diagnose.subject import DiagnoseRequest, Sample, Subject
from tuner.diagnose.whole import whole_model
from tuner.encoders.registry import inspect_encoder, load_encoder, load_feature_extractor
from tuner.encoders.spec import EncoderSpec
from tuner.lora.cost import Lengths, training_flops
from tuner.lora.placement import trainable_parameters
from tuner.space import load_space
from tuner.train.embed import Clips
from tuner.train.member import Member

RATE = 16_000
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TRIAL = TrialConfig(lora=LoraSpec(rank=2, targets=ATTENTION))
PEFT_WARNING = "ignore:.*is_gradient_checkpointing:FutureWarning"  # PEFT 0.21 asks transformers 5 by the old name


@pytest.fixture(autouse=True)
def quick_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing the number formats takes seconds where tests share a core; tests/test_pack.py has it."""
    monkeypatch.setattr(environment, "measured_precision", lambda device: "fp32")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2-Audio as it lies on disk."""
    folder = tmp_path_factory.mktemp("qwen2-audio")
    torch.manual_seed(0)
    qwen2_audio().save_pretrained(folder)
    return folder


def request(tiny: Tiny, **changes: Any) -> DiagnoseRequest:
    values: dict[str, Any] = {"encoder": tiny.encoder, "trial": TRIAL, "store": tiny.store()} | changes
    return DiagnoseRequest(**values)


def qwen_request(folder: Path, **changes: Any) -> DiagnoseRequest:
    values: dict[str, Any] = {"encoder": EncoderRef(source=str(folder)), "trial": TRIAL} | changes
    return DiagnoseRequest(**values)


def states(diagnosis: Diagnosis) -> dict[str, str]:
    return {step.name: step.state for step in diagnosis.steps}


def said(step: Step, level: str) -> list[str]:
    return [f"{finding.text}; {finding.advice}" for finding in step.findings if finding.level == level]


def found(diagnosis: Diagnosis, name: str, level: str = "error") -> str:
    """The one finding of this level in the step."""
    (step,) = (step for step in diagnosis.steps if step.name == name)
    (text,) = said(step, level)
    return text


# Nothing wrong


def test_sound_parts_pass_every_step(tiny: Tiny) -> None:
    found = diagnose(request(tiny, space=load_space("attention_only"), trials=4, batch_size=12), "fp32")
    assert (found.count("error"), found.count("warning")) == (0, 0), found.to_dict()
    assert set(states(found).values()) == {"ok"}
    _, data, checkpoint, features, forward, backward, strategy = (step.values for step in found.steps)
    assert data["splits"] == {"train": 36, "validation": 12, "test": 12} and data["shared_captions"] > 0
    tower = sum(
        parameter.numel() for parameter in load_encoder(inspect_encoder(tiny.encoder), torch.float32).parameters()
    )
    assert checkpoint["parameters"] == tower and checkpoint["memory_bytes"] == 4 * tower == checkpoint["bytes_read"]
    assert checkpoint["bytes"] > checkpoint["bytes_read"] and checkpoint["formats"] == {
        "F32": checkpoint["tensors_read"]
    }
    assert features["truncation_difference"] < 1e-5
    assert forward["width"] == 32 and forward["linears_on_path"] == 18 and -1 < forward["mean_cosine"] < 1
    assert backward["lora_tensors"] == 24 and backward["dead"] == [] and backward["activation_bytes"] > 0
    assert backward["loss"][0] > backward["loss"][1]
    assert strategy["lora"]["tower"] == {"tensors": 24, "parameters": 24 * 32 * 2}
    assert strategy["search"]["steps"] == 3 * 3


def test_without_data_the_encoder_is_tried_on_tones(qwen: Path) -> None:
    """Every step that can run does, and the one that cannot says why."""
    found = diagnose(qwen_request(qwen), "fp32")
    assert states(found) == dict.fromkeys(states(found), "ok") | {"data": "skipped"}
    assert found.steps[1].skipped == "no --data was given"
    assert "tones in noise" in found.steps[3].values["sample"]
    assert found.steps[3].values["last_frame_difference"] <= 1e-4


def test_the_json_is_stable(tiny: Tiny) -> None:
    values = diagnose(request(tiny), "fp32").to_dict()
    assert list(values) == ["format", "errors", "warnings", "steps"] and json.loads(json.dumps(values)) == values
    assert [step["step"] for step in values["steps"]] == [1, 2, 3, 4, 5, 6, 7]
    for step in values["steps"]:
        assert list(step) == ["step", "name", "state", "skipped", "findings", "values"]
        assert all(list(finding) == ["level", "text", "advice"] for finding in step["findings"])


# Step 1


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        (lambda patch: patch.setattr(environment, "PYTHONS", ((3, 99), (4, 0))), "error", "use Python 3.11 or 3.12"),
        (
            lambda patch: patch.setattr(environment, "LIBRARIES", ("torch", "nonesuch")),
            "error",
            "not installed: nonesuch",
        ),
        (lambda patch: patch.setattr(environment, "MIN_MEMORY", 2**60), "warning", "memory available"),
        (lambda patch: patch.setattr(environment, "MIN_DISK", 2**60), "warning", "TUNER_CACHE"),
        (lambda patch: patch.setattr(environment, "MIN_SHARED_MEMORY", 2**60), "warning", "--shm-size"),
        (lambda patch: patch.setattr("os.access", lambda *_: False), "error", "cannot be written"),
    ],
)
def test_a_poor_machine(change: Callable[[pytest.MonkeyPatch], None], level: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        step = environment.check_environment()
    (finding,) = said(step, level)
    assert text in finding and step.state == level


# Step 2


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Tiny:
    """A store whose features may be changed."""
    return Tiny(tiny.encoder, write_store(tmp_path / "store", tiny.encoder))


def change_features(store: Path, change: Callable[[list[list[float]], Store], None]) -> Store:
    """Rewrite the features of a store of one shard and one batch."""
    import pyarrow as pa

    from tuner.data.writer import FeatureWriter

    opened = Store.open(store)
    maps = [opened.features(clip).reshape(-1).tolist() for clip in range(len(opened))]
    change(maps, opened)
    with FeatureWriter(store) as writer:
        writer.add(range(len(maps)), pa.array(maps, pa.list_(pa.float32())))
    return Store.open(store)


def data_step(tiny: Tiny, store: Store) -> Step:
    return check_data(Subject(request(tiny, store=store), inspect_encoder(tiny.encoder)), lambda *_: None)


def test_the_same_sound_in_two_splits_of_a_store(copied: Tiny) -> None:
    """Clip 50 is of the test, and becomes clip 3 of the training clips that has as many frames."""
    frames = copied.store().frames
    pairs = [(a, b) for a in range(36) for b in range(48, 60) if frames[a] == frames[b]]

    def leak(maps: list[list[float]], store: Store) -> None:
        first, second = pairs[0]
        maps[second] = maps[first]

    step = data_step(copied, change_features(copied.store_folder, leak))
    (text,) = said(step, "error")
    assert step.values["leaks"] == 1
    assert f"recordings in two splits: 1, for example {pairs[0][0]}.wav (train) and {pairs[0][1]}.wav (test)" in text


@pytest.mark.parametrize("shared", ["content", "file", "clip_id", None])
def test_a_leak_shows_by_each_key_alone(tiny: Tiny, shared: str | None) -> None:
    """Two recordings in two splits that have the same sound, or file, or clip id, and nothing else in common."""
    second = {key: f"{key} {'1' if key == shared else '2'}" for key in ("content", "file", "clip_id")}
    found = Recordings(
        names=["1.wav", "2.wav"],
        splits=["train", "test"],
        contents=["content 1", second["content"]],
        identities=[("file 1", "clip_id 1"), (second["file"], second["clip_id"])],
    )
    step = Step("data")
    _duplicates(step, found)
    assert step.values["leaks"] == (1 if shared else 0)
    assert store_recordings(tiny.store()).identities[0] == ("file 0.wav", "clip_id clip-0")


def test_a_repeated_sound_and_shared_captions_are_notes(copied: Tiny) -> None:
    frames = copied.store().frames
    first, second = next((a, b) for a in range(36) for b in range(a + 1, 36) if frames[a] == frames[b])

    def repeat(maps: list[list[float]], store: Store) -> None:
        maps[second] = maps[first]

    step = data_step(copied, change_features(copied.store_folder, repeat))
    assert step.state == "ok" and (step.values["duplicates"], step.values["leaks"]) == (1, 0)
    notes = " ".join(said(step, "note"))
    assert "of their split: 1" in notes and "captions are in more than one split" in notes


@pytest.mark.parametrize(("silent", "level"), [(60, "error"), (2, "warning")])
def test_a_silent_store(copied: Tiny, silent: int, level: str) -> None:
    def hush(maps: list[list[float]], store: Store) -> None:
        for clip in range(silent):
            maps[clip] = [-1.5 + 0.0 * clip] * len(maps[clip])

    step = data_step(copied, change_features(copied.store_folder, hush))
    assert step.values["silent"] == silent
    assert any("silent" in text for text in said(step, level))


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def manifest_step(tiny: Tiny, manifest: Path) -> Step:
    subject = Subject(request(tiny, store=None, manifest=manifest), inspect_encoder(tiny.encoder))
    return check_data(subject, lambda *_: None)


def test_a_manifest_that_leaks(tiny: Tiny, tmp_path: Path) -> None:
    """The copy has another name and another format; it is the sound that counts."""
    random = np.random.default_rng(0)
    for index in range(6):
        soundfile.write(tmp_path / f"{index}.wav", random.uniform(-0.5, 0.5, 4000 + 500 * index), RATE)
    sound, _ = soundfile.read(tmp_path / "0.wav", dtype="int16")
    soundfile.write(tmp_path / "copy.flac", sound, RATE)
    splits = ["train", "train", "train", "validation", "validation", "test"]
    rows = [{"audio": f"{index}.wav", "caption": f"{index % 2}", "split": split} for index, split in enumerate(splits)]
    step = manifest_step(tiny, write_manifest(tmp_path, rows))
    assert step.state == "ok" and step.values["shared_captions"] == 2
    step = manifest_step(
        tiny, write_manifest(tmp_path, [*rows, {"audio": "copy.flac", "caption": "x", "split": "test"}])
    )
    (text,) = said(step, "error")
    assert "0.wav (train)" in text and "copy.flac (test)" in text


def test_a_silent_manifest(tiny: Tiny, tmp_path: Path) -> None:
    for index in range(3):
        soundfile.write(tmp_path / f"{index}.wav", np.zeros(8000), RATE)
    rows = [{"audio": f"{index}.wav", "caption": "x"} for index in range(3)]
    errors = said(manifest_step(tiny, write_manifest(tmp_path, rows)), "error")
    assert any("all 3 recordings are silent" in text for text in errors)


def test_rejects_of_a_manifest_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "0.wav", np.random.default_rng(0).uniform(-1, 1, 8000), RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows = [{"audio": name, "caption": "x"} for name in ("0.wav", "broken.wav", "missing.wav")]
    step = manifest_step(tiny, write_manifest(tmp_path, rows))
    assert step.values["rejects"] == {"missing": 1, "unreadable": 1}
    assert "2 of 3 rows cannot be used" in said(step, "warning")[0]


def test_a_store_of_another_encoder(tiny: Tiny, tmp_path: Path) -> None:
    other = EncoderRef(source=str(write_encoder(tmp_path / "other", layers=2)))
    step = check_data(Subject(request(tiny, encoder=other), inspect_encoder(other)), lambda *_: None)
    assert "prepared for another encoder" in said(step, "error")[0]


# Step 3


def test_of_a_whole_model_the_tower_alone_is_read(qwen: Path) -> None:
    values = diagnose(qwen_request(qwen), "fp32").steps[2].values
    tensors = load_file(qwen / "model.safetensors")
    tower = [tensor for name, tensor in tensors.items() if "audio_tower." in name]
    assert (values["tensors_read"], values["tensors"]) == (len(tower), len(tensors))
    assert values["bytes_read"] == sum(tensor.nbytes for tensor in tower) == values["memory_bytes"]
    assert values["bytes"] == values["memory_of_everything_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_damaged_checkpoint_leaves_the_rest_to_say_what_it_can(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.encoder.source, tmp_path / "damaged"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    found = diagnose(request(tiny, encoder=EncoderRef(source=str(folder)), store=None), "fp32")
    assert states(found) == {
        "environment": "ok",
        "data": "skipped",
        "checkpoint": "error",
        "features": "ok",
        "forward": "skipped",
        "backward": "skipped",
        "strategy": "ok",
    }
    assert [step.skipped for step in found.steps[4:6]] == ["the encoder is not loaded (step 3)"] * 2
    assert "damaged safetensors file" in said(found.steps[2], "error")[0]
    (folder / "config.json").write_text("{}")
    found = diagnose(request(tiny, encoder=EncoderRef(source=str(folder))), "fp32")
    assert "model_type None" in said(found.steps[2], "error")[0]
    assert [found.steps[index].state for index in (1, 3, 6)] == ["ok", "skipped", "skipped"]


# Steps 4 and 5


def subject_of(tiny: Tiny, clips: list[int] | None = None, **changes: Any) -> Subject:
    subject = Subject(request(tiny, **changes), inspect_encoder(tiny.encoder))
    subject.encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    subject.sample = Sample(tiny.store(), np.array(clips or range(12)), "clips of the test")
    return subject


def test_a_front_end_that_mirrors_the_end_of_a_clip(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' extractor does to a clip without silence behind it."""
    spec = inspect_encoder(EncoderRef(source=str(qwen)))
    extractor: Any = load_feature_extractor(spec)

    class Mirroring:
        def extract(self, wave: Any) -> Any:
            whole = extractor.extractor(wave, sampling_rate=RATE, padding=False, return_tensors="np").input_features[0]
            return np.asarray(whole, dtype=np.float32), whole.shape[1]

    monkeypatch.setattr("tuner.diagnose.features.load_feature_extractor", lambda spec: Mirroring())
    step = check_features(Subject(qwen_request(qwen), spec))
    assert "last frame changes by" in said(step, "error")[0]


def test_padding_that_leaks_into_a_clip(tiny: Tiny) -> None:
    subject = subject_of(tiny, store=None)
    encoder: Any = subject.encoder
    finish = encoder.finish

    def leaky(hidden: Any, packing: Any, frames: Any) -> Any:
        states, lengths = finish(hidden, packing, frames)
        return states + len(lengths), lengths

    encoder.finish = leaky
    subject.sample = None
    whole = Clips([tiny.store().features(clip) for clip in range(6)], tiny.store().frames[:6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.diagnose.features.load_feature_extractor", lambda spec: None)
        patch.setattr(
            "tuner.diagnose.features.draw_sample", lambda subject, extractor: Sample(whole, np.arange(6), "clips")
        )
        step = check_features(subject)
    assert "padding leaks in" in said(step, "error")[0]


def test_a_collapsed_encoder(tiny: Tiny) -> None:
    subject = subject_of(tiny, clips=[5] * 4)
    step = check_forward(subject)
    assert "all clips have the same embedding" in said(step, "error")[0]
    assert step.values["mean_cosine"] == pytest.approx(1, abs=1e-4)


def test_embeddings_that_are_not_finite(tiny: Tiny) -> None:
    subject = subject_of(tiny)
    encoder: Any = subject.encoder
    with torch.no_grad():
        encoder.model.layers[1].fc1.bias[0] = float("nan")
    forward, backward = check_forward(subject), check_backward(subject)
    assert "12 of 12 embeddings have values that are not finite" in said(forward, "error")[0]
    assert "the loss is not finite" in said(backward, "error")[0]
    assert json.loads(json.dumps(backward.to_dict(), allow_nan=False))["values"]["loss"] == [None, None]


def test_a_sample_shows_all_lengths_and_no_sound_twice(tiny: Tiny) -> None:
    subject = Subject(request(tiny), inspect_encoder(tiny.encoder))
    check_data(subject, lambda *_: None)
    extractor: Any = None
    sample = draw_sample(subject, extractor)
    chosen = tiny.store().frames[sample.clips]
    assert len(set(sample.clips.tolist())) == len(sample.clips) > 4
    assert (np.diff(chosen) >= 0).all() and chosen.max() == tiny.store().frames[:36].max()


# Step 6


@pytest.fixture
def member(tiny: Tiny) -> Member:
    return Member("t", TRIAL, load_encoder(inspect_encoder(tiny.encoder), torch.float32), 8, 2)


def train(member: Member, tiny: Tiny) -> Step:
    step = Step("backward")
    try_training(step, member, Sample(tiny.store(), np.arange(12), "clips"))
    return step


def test_every_gradient_is_there(member: Member, tiny: Tiny) -> None:
    assert train(member, tiny).state == "ok"
    assert all(parameter.grad is None for parameter in member.shared_parameters()), "and is gone again"


def test_a_frozen_projection(member: Member, tiny: Tiny) -> None:
    member.head.requires_grad_(False)
    step = train(member, tiny)
    assert step.values["dead"] == ["projection layers.0.weight", "projection layers.0.bias"]
    assert "set requires_grad on the projection" in said(step, "error")[0]


def test_dead_and_stray_tensors_are_named(member: Member, tiny: Tiny) -> None:
    """An A without gradient, a B whose layer is bypassed, and a base weight that would be trained."""
    tower: Any = member.encoder.model
    tower.layers[0].self_attn.k_proj.lora_A["t"].weight.register_hook(torch.zeros_like)
    tower.layers[2].self_attn.out_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    tower.layers[1].fc1.weight.requires_grad_(True)
    step = train(member, tiny)
    dead = {name for name in step.values["dead"] if "layers.2" not in name}
    assert dead == {"layers.0.self_attn.k_proj.lora_A.t.weight"}
    assert {name.split(".")[3] for name in step.values["dead"] if "layers.2" in name} == {
        f"{n}_proj" for n in "qkv"
    } | {"out_proj"}
    assert step.values["base_with_gradient"] == ["layers.1.fc1.weight"]
    assert len(said(step, "error")) == 2


# Step 7


def strategy(request: DiagnoseRequest) -> Step:
    return check_strategy(Subject(request, inspect_encoder(request.encoder)))


def write_config(folder: Path, targets: list[str] | str, rank: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    peft.LoraConfig(r=rank, target_modules=targets).save_pretrained(str(folder))
    return folder / "adapter_config.json"


def test_a_name_that_the_tower_does_not_have(qwen: Path, tmp_path: Path) -> None:
    """The strategy document's own list: no output projection in the tower, and four layers in the language model."""
    config = write_config(tmp_path, list(ATTENTION))
    step = strategy(qwen_request(qwen, peft_config=config))
    missed, leaked = said(step, "error")
    assert "'o_proj' matches no module of the tower; its name there is out_proj" in missed
    assert "24 to the language model, which the path audio_tower never runs" in leaked
    assert step.values["peft_config"]["tower"]["tensors"] == 18
    assert step.values["peft_config"]["language_model"]["tensors"] == 24


def test_a_list_that_leaks_into_the_language_model(qwen: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, ["q_proj", "k_proj", "v_proj", "out_proj"])
    (leaked,) = said(strategy(qwen_request(qwen, peft_config=config)), "error")
    assert "24 LoRA tensors (12,288 parameters) in the tower, 18 (" in leaked
    assert "model.language_model.layers.0.self_attn.q_proj" in leaked
    full = EncoderRef(source=str(qwen), path="full_forward")
    assert strategy(qwen_request(qwen, encoder=full, peft_config=config)).state == "ok", "there it runs"
    pattern = write_config(tmp_path / "pattern", r"model\.audio_tower\.layers\.\d+\.self_attn\.(q|k|v|out)_proj")
    step = strategy(qwen_request(qwen, peft_config=pattern))
    assert step.state == "ok" and step.values["peft_config"]["tower"]["tensors"] == 24


def test_lora_on_a_language_model_that_never_runs(qwen: Path) -> None:
    trial = TrialConfig(lora=LoraSpec(rank=2, targets=ATTENTION, placement="language_model"))
    found = diagnose(qwen_request(qwen, trial=trial), "fp32")
    assert states(found)["backward"] == states(found)["strategy"] == "error"
    for step in found.steps[5:]:
        assert "which the path audio_tower never runs; give path full_forward" in said(step, "error")[0]
    full = EncoderRef(source=str(qwen), path="full_forward")
    found = diagnose(qwen_request(qwen, encoder=full, trial=trial), "fp32")
    assert found.count("error") == 0, found.to_dict()
    assert found.steps[6].values["lora"]["tower"]["tensors"] == 0
    assert found.steps[6].values["lora"]["language_model"]["tensors"] == 24 == found.steps[5].values["lora_tensors"]


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_an_adapter_whose_names_are_of_transformers_4(qwen: Path, tmp_path: Path) -> None:
    """PEFT loads it with a warning and every layer stays as it was."""
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(qwen)
    config = peft.LoraConfig(r=2, target_modules=r".*audio_tower\.layers\.\d+\.self_attn\.(q|k|v|out)_proj")
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    step = strategy(qwen_request(qwen, adapter=tmp_path))
    assert step.state == "ok" and step.values["adapter_file"] == {"tensors": 24, "tensors_that_miss": 0}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    older = {name.replace("model.model.audio_tower", "model.audio_tower"): tensor for name, tensor in tensors.items()}
    assert set(older) != set(tensors)
    save_file(older, tmp_path / "adapter_model.safetensors")
    step = strategy(qwen_request(qwen, adapter=tmp_path))
    (text,) = said(step, "error")
    assert "24 of 24 tensors match no module" in text and "they are the names of transformers 4" in text


def test_an_exported_adapter_fits(tiny: Tiny, tmp_path: Path) -> None:
    exported = train_and_export(tiny, TRIAL, tmp_path)
    step = strategy(request(tiny, adapter=exported.folder))
    assert step.state == "ok" and step.values["adapter_file"]["tensors_that_miss"] == 0
    assert step.values["peft_config"]["tower"]["tensors"] == 24
    (exported.folder / "adapter_model.safetensors").unlink()
    assert "is missing" in said(strategy(request(tiny, adapter=exported.folder)), "error")[0]


def test_an_encoder_without_a_tower_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    waveform("Hubert", False)().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(NORMALISED))
    found = diagnose(qwen_request(tmp_path), "fp32")
    assert found.count("error") == 0, found.to_dict()
    assert found.steps[6].values["strategy"] == "full_forward"
    assert "the whole encoder runs (full_forward)" in said(found.steps[6], "note")[0]
    assert any("reads the waveform" in text for text in said(found.steps[3], "ok"))


def test_a_space_with_a_layer_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    values = {
        "name": "deep",
        "description": "Blocks that the encoder does not have.",
        "target_sets": {"pair": ["q_proj", "v_proj"]},
        "dimensions": {
            "lora.rank": {"int": [2, 4]},
            "lora.targets": {"choice": ["pair"]},
            "lora.first_layer": {"choice": [0, 7]},
        },
    }
    step = strategy(request(tiny, space=type(load_space("full")).from_dict(values, "deep")))
    assert "space deep: lora.first_layer: 7 is outside the 3 blocks" in said(step, "error")[0]


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    """Qwen2-Audio-7B by its configuration; of weights one number, since none is read."""
    folder = tmp_path_factory.mktemp("qwen2-audio-7b")
    text = {"model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008}
    transformers.Qwen2AudioConfig(
        text_config=text, architectures=["Qwen2AudioForConditionalGeneration"]
    ).save_pretrained(folder)
    save_file({"audio_tower.layer_norm.weight": torch.ones(1)}, folder / "model.safetensors")
    return inspect_encoder(EncoderRef(source=str(folder)))


def test_the_measured_ratio_at_real_size(real_size: EncoderSpec) -> None:
    """On the meta device: 256 tensors and 5.24M parameters against 448 and 39.98M, 7.6 times and not ten."""
    lora = LoraSpec(rank=16, targets=ATTENTION)
    ref = EncoderRef(source=real_size.source)
    step = check_strategy(Subject(DiagnoseRequest(ref, TrialConfig(lora=lora)), real_size))
    rows = {row["placement"]: row for row in step.values["comparison"]["rows"]}
    attention, language_model = rows["tower: attention"], rows["language model: all linear"]
    assert (attention["tensors"], attention["parameters"]) == (256, 5_242_880)
    assert (rows["tower: attention and MLP"]["tensors"], rows["tower: attention and MLP"]["parameters"]) == (
        384,
        11_796_480,
    )
    assert (language_model["tensors"], language_model["parameters"]) == (448, 39_976_960)
    assert language_model["ratio"] == 7.62
    assert any("7.6 times the 5.24M" in text for text in said(step, "note"))


def test_the_cost_of_a_step_is_that_of_its_clips(tiny: Tiny) -> None:
    """Of an epoch the share of one batch; time and memory follow the tokens that step 6 measured."""
    found = diagnose(request(tiny, batch_size=12), "fp32")
    backward, cost = found.steps[5].values, found.steps[6].values["step"]
    store, spec = tiny.store(), inspect_encoder(tiny.encoder)
    frames = store.frames[store.split("train")].tolist()
    assert cost["step_flops"] == training_flops(spec, TRIAL, Lengths.of(frames), store.text_dim) / 3
    assert cost["tokens"] == pytest.approx(sum(map(spec.sequence_length, frames)) / 3)
    assert cost["seconds"] == pytest.approx(backward["seconds"] * cost["tokens"] / backward["tokens"])
    kept = backward["activation_bytes"] * cost["tokens"] / backward["tokens"]
    trained = trainable_parameters(spec, TRIAL, store.text_dim)
    assert cost["memory_bytes"] == pytest.approx(found.steps[2].values["memory_bytes"] + 16 * trained + kept)


def test_parts_of_a_whole_model(qwen: Path) -> None:
    whole = whole_model(inspect_encoder(EncoderRef(source=str(qwen))))
    assert (whole.tower, whole.language_model) == ("model.audio_tower", "model.language_model")
    assert {whole.part(name) for name in whole.behind_tower()} == {"language_model"}
    assert len(whole.behind_tower()) == 21 and whole.part("model.multi_modal_projector.linear") == "elsewhere"
