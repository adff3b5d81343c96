"""Options that several commands have, with nothing heavy behind them: `--help` imports this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tuner.places import is_folder

DEMO = "demo"

AudioRoot = Annotated[
    Path | None, typer.Option(help="folder of a manifest's relative recordings; none may lie outside, links followed")
]


@dataclass(frozen=True)
class Typed:
    """An option on the command line: its flag and its value."""

    flag: str
    value: object


@dataclass(frozen=True)
class DataChoice:
    """The options `--data`, `--encoder`, `--text-encoder`, `--pad-to-30s`, `--audio-root`."""

    data: str = DEMO
    encoder: str | None = None
    text_encoder: str | None = None
    pad_to_30s: bool = False
    audio_root: Path | None = None


@dataclass(frozen=True)
class StudyOptions:
    """What a command line says of the place of a study.

    Attributes:
        study: its name or, on this machine, its folder.
        runs: folder of studies, here or on the head.
        address_typed, runs_typed: whether the user wrote the option, rather than a default or the environment.
    """

    study: str
    runs: Path
    address: str | None
    storage: str | None
    runs_typed: bool
    address_typed: bool


def typed(context: typer.Context, option: str) -> bool:
    """Whether the user wrote this option: not its default, and not a variable of the environment."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def study_folder(runs: Path, study: str) -> Path:
    """The folder of a study that is given by its name in `runs`, or by its folder."""
    path = Path(study)
    return path if is_folder(path) and not is_folder(runs / study) else runs / study


def typed_words(context: typer.Context, without: frozenset[str]) -> tuple[str, ...]:
    """The options that the user wrote, as another machine is to read them, `without` some parameters by name."""
    words: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in without or not typed(context, name):
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words += [parameter.opts[0] if value else parameter.secondary_opts[0]]
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(item)]
    return tuple(words)
