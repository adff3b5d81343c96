"""Words of command lines: odd values for every option of every command that works on this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import Tiny
from finished_study import write_study
from fuzzing import Bench, Files
from generators import FLOATS, NUMBERS
from hypothesis import strategies as st
from in_process import RECORDINGS, no_demo, prepare_words, stand_in_for_ray
from test_fuzz_stores import files_of

from tuner import cli
from tuner.commands.actions import adapters as adapter_actions

# They connect to a cluster or wait for a cloud.
ELSEWHERE = {"studies", "status", "logs", "stop", "cluster spot-watch"}
# They serve, search or connect, whatever else is given.
LEFT_OUT = {"--live", "--address", "--resume", "--help", "--logger", "--dashboard"}
WORDS = (
    "",
    " ",
    "-",
    "--",
    ".",
    "..",
    "/",
    "~",
    "~nobody/x",
    "nowhere",
    "file",
    "mine",
    "mine/study.json",
    "rows.jsonl",
    "store",
    "é" * 128,
    "x" * 256,
    "x/" * 2_100,
    "x" * 120_000,
    "a://b:" * 20_000,
    "?token" * 20_000,
    "/dev/null",
    "/dev/null/x",
    "/dev/full",
    "/proc/self/mem",
    "/proc/nowhere/x",
    "s3://",
    "s3://user:password@bucket",
    "ftp://x/y",
    "file://x",
    "file:///nowhere/x",
    "a\x1b[31mb",
    "line\nline",
    "\u2028",
    "\udcff",
    "caf\udce9/x",
    "%20?#",
    "0.7,0.2",
    "nan,nan,nan",
    "1e308,1e308,-2e308",
    "0.5,0.5,0",
    "t0001",
    "recall@10",
    "train",
    "both",
    "demo",
    *map(str, NUMBERS[:-1]),
    *map(str, FLOATS),
    "9" * 5_000,
)


def commands(folder: str) -> dict[str, list[str]]:
    """A sound command line of each command."""
    return {
        "search": ["search", "--dry-run", "--data", "store", "--tflops", "1", "--trials", "2"],
        "report": ["report", "mine", "--runs", ".", "--out", "page.html"],
        "export": ["export", "mine", "--runs", ".", "--out", "taken"],
        "send": ["send", "mine"],
        "evaluate": ["evaluate", "mine/adapters/t0001", "--data", "store"],
        "embed": ["embed", "mine/adapters/t0001", "0.wav", "--out", "embedded.parquet"],
        "train": ["train", "mine/adapters/t0001/trial.yaml", "--out", "again"],
        "spaces show": ["spaces", "show", "attention_only", "--encoder", folder],
        "diagnose": ["diagnose", "--data", "store", "--trials", "2"],
        "cluster check": ["cluster", "check", "rows.jsonl"],
        "cluster monitoring": ["cluster", "monitoring", "monitoring"],
    }


def options(words: list[str]) -> dict[str, bool]:
    """The options of a command, and whether each takes a value."""
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    found = {parameter.opts[0]: not parameter.is_flag for parameter in command.params if parameter.opts[0][0] == "-"}
    return {name: takes for name, takes in found.items() if name not in LEFT_OUT}


@st.composite
def lines(draw: st.DrawFn, sound: dict[str, list[str]], known: dict[str, dict[str, bool]]) -> tuple[str, ...]:
    """A sound command line with odd values in place of some words, and with further options."""
    name = draw(st.sampled_from(sorted(sound)))
    start = len(name.split())
    line = list(sound[name])
    odd = st.sampled_from(WORDS) | st.text(max_size=8).filter(lambda text: "\0" not in text)
    for _ in range(draw(st.integers(1, 2))):
        places = [place for place in range(start, len(line)) if not line[place].startswith("--")]
        option = draw(st.sampled_from(sorted(known[name]) or [""]))
        match draw(st.sampled_from(["replace", "option", "option", "drop"])):
            case "replace" if places:
                line[draw(st.sampled_from(places))] = draw(odd)
            case "drop" if len(line) > start:
                del line[draw(st.integers(start, len(line) - 1))]
            case _ if option:
                line += [option, draw(odd)] if known[name][option] else [option]
    return tuple(line)


@pytest.fixture(scope="module")
def study(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(write_study(tiny, tmp_path_factory.mktemp("study") / "mine"), "mine/")


def test_options(bench: Bench, tiny: Tiny, study: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapter_actions, "train_single", lambda *_: {"recall@10": 0.5})
    stand_in_for_ray(monkeypatch)
    no_demo(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TUNER_STORAGE_PATIENCE", "0")
    prepare = [str(word) for word in prepare_words(tiny.encoder.source, tmp_path, monkeypatch)]
    sound = commands(tiny.encoder.source) | {"prepare": [*prepare, "rows.jsonl"]}
    known = {name: options(name.split()) for name in sound}
    rows = b"\n".join(b'{"audio": "%d.wav", "caption": "Tone %d"}' % (number, number) for number in range(6))
    stored = files_of(tiny.store_folder, "store/")
    files = {**RECORDINGS, **study, **stored, "rows.jsonl": rows, "file": b"x"}
    for line in sound.values():
        bench.lay(files)
        if line[1] != "check":
            bench.sound(*line)

    @bench.inputs(lines(sound, known), suite=25)
    def one(line: tuple[str, ...]) -> None:
        bench.lay(files)
        bench.run(*line)


def test_every_command_is_tried() -> None:
    """A new command is given a sound line above, or a reason to omit it."""
    root: Any = typer.main.get_command(cli.app)
    found = {
        " ".join(filter(None, (name, child)))
        for name, command in root.commands.items()
        for child in getattr(command, "commands", None) or [""]
    }
    assert found == {*commands(""), "prepare", *ELSEWHERE}
