"""Options that several commands have, with nothing heavy behind them: `--help` imports this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130  # exit code, as shells have it for SIGINT


@dataclass(frozen=True)
class Typed:
    """An option on the command line: its flag and its value."""

    flag: str
    value: object


AudioRoot = Annotated[
    Path | None, typer.Option(help="folder of a manifest's relative recordings; none may lie outside, links followed")
]


def study_folder(runs: Path, study: str) -> Path:
    """The folder of a study that is given by its name in `runs`, or by its folder."""
    path = Path(study)
    return path if path.is_dir() and not (runs / study).is_dir() else runs / study
