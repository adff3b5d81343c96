"""`tuner diagnose` on the command line: exit codes, JSON for programs, text for people, sentences for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, write_encoder
from terminal import Finished, Terminal
from test_cli import trained  # noqa: F401
from test_diagnose import qwen  # noqa: F401
from trained_adapter import Trained


def steps(finished: Finished) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(finished.out)
    return {step["name"]: step for step in values["steps"]}


def test_a_sound_store_is_told_to_people(terminal: Terminal, tiny: Tiny) -> None:
    finished = terminal.run("diagnose", "--data", tiny.store_folder, "--space", "attention_only")
    assert finished.code == 0, finished
    lines = finished.out.splitlines()
    headings = [line.split() for line in lines if line[0].isdigit() and " of 7" in line]
    names = ["environment", "data", "checkpoint", "features", "forward", "backward", "strategy"]
    assert [heading[3] for heading in headings] == names and {heading[4] for heading in headings} <= {"OK", "warning"}
    assert any(line.split()[:2] == ["tower:", "attention"] and line.endswith("1.00  ") for line in lines)
    assert lines[-1].startswith("0 errors, ")


def test_an_error_is_exit_code_1(terminal: Terminal, qwen: Path) -> None:  # noqa: F811
    options = ("--encoder", qwen, "--placement", "language_model", "--path", "audio_tower")
    finished = terminal.run("diagnose", *options, "--json")
    assert finished.code == 1 and json.loads(finished.out)["errors"] == 2
    assert steps(finished)["strategy"]["state"] == "error" == steps(finished)["backward"]["state"]
    finished = terminal.run("diagnose", *options)
    assert finished.code == 1 and "error  lora.placement: language_model adapts" in finished.out


def test_the_space_decides_the_path(terminal: Terminal, qwen: Path) -> None:  # noqa: F811
    """As `tuner search` does it."""
    finished = terminal.run(
        "diagnose", "--encoder", qwen, "--space", "query_value", "--placement", "both", "--rank", 2, "--json"
    )
    assert finished.code == 0, finished
    assert "taking --path full_forward" in finished.err
    strategy = steps(finished)["strategy"]["values"]
    assert strategy["strategy"] == "full_forward"
    assert strategy["lora"]["tower"]["tensors"] == strategy["lora"]["language_model"]["tensors"] == 24


def test_an_adapter_brings_its_encoder_and_its_lora(terminal: Terminal, trained: Trained) -> None:  # noqa: F811
    finished = terminal.run("diagnose", "--adapter", trained.folder, "--json")
    assert finished.code == 0, finished
    assert steps(finished)["backward"]["values"]["lora_tensors"] == 12
    assert steps(finished)["strategy"]["values"]["adapter_file"] == {"tensors": 12, "tensors_that_miss": 0}


def test_layers_by_name(terminal: Terminal, tiny: Tiny) -> None:
    options = ("diagnose", "--encoder", tiny.encoder.source, "--rank", 3, "--first-layer", -1, "--json")
    finished = terminal.run(*options, "--targets", "q_proj,fc1", "--targets", "o_proj")
    assert finished.code == 0, finished
    assert steps(finished)["strategy"]["values"]["lora"]["tower"]["tensors"] == 6
    finished = terminal.run(*options, "--targets", "all-linear")
    assert steps(finished)["backward"]["values"]["lora_tensors"] == 12
    finished = terminal.run(*options, "--targets", "q_prj")
    assert finished.code == 1 and "did you mean q_proj?" in finished.out


def test_a_store_of_another_encoder_is_found(terminal: Terminal, tiny: Tiny) -> None:
    """Nothing refuses it: to say so is what a diagnosis is for. The clips are then tones."""
    other = write_encoder(terminal.folder / "other", layers=2)
    finished = terminal.run("diagnose", "--data", tiny.store_folder, "--encoder", other, "--json")
    assert finished.code == 1 and steps(finished)["data"]["state"] == "error"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--encoder", "nowhere"], "nowhere: no such folder"),
        (["--data", "nowhere"], "nowhere: no such manifest or store"),
        (["--adapter", "nowhere"], "nowhere: no such folder"),
        (["--space", "nonesuch"], "nonesuch"),
        (["--precision", "fp8"], "--precision fp8: give auto, bf16, fp32"),
        (["--path", "shortcut"], "--path: path:"),
        (["--placement", "cellar"], "placement"),
    ],
)
def test_a_mistake_is_exit_code_2(terminal: Terminal, options: list[str], said: str) -> None:
    assert said in terminal.refused("diagnose", *options)


def test_a_peft_config_that_is_none(terminal: Terminal, qwen: Path) -> None:  # noqa: F811
    finished = terminal.run("diagnose", "--encoder", qwen, "--peft-config", qwen / "config.json", "--json")
    assert finished.code == 1
    (error,) = [finding for finding in steps(finished)["strategy"]["findings"] if finding["level"] == "error"]
    assert "not a" in error["text"] and "\n" not in error["text"]
