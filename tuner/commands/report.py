"""`tuner report` and `tuner export`: what a search found, as a page and as adapters, wherever it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.options import StudyOptions, typed
from tuner.commands.paths import check_new_folder, check_output_file
from tuner.errors import ConfigError, Field

Study = Annotated[str, typer.Argument(help="name of the study, or its folder")]
Runs = Annotated[Path, typer.Option(help="folder of studies, with --address that on the head")]
# The same variable as for `tuner status`; a study that is here is not looked for there on its account.
Address = Annotated[
    str | None, typer.Option(envvar="TUNER_ADDRESS", help="the head's dashboard; default: a study on this machine")
]
StorageUri = Annotated[str | None, typer.Option("--storage", help="where `tuner search --storage` put the study")]
Live = Annotated[bool, typer.Option("--live", help="serve the page on loopback, refreshed while the search runs")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="with --live; 0 takes any that is free")]
Trials = Annotated[list[str] | None, typer.Option("--trial", help="a point of the front; repeat for several")]


def report(
    context: typer.Context,
    study: Study,
    runs: Runs = Path("runs"),
    svg: Annotated[Path | None, typer.Option(help="also save the picture of the front here")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the page to write; default: report.html in the study's folder, or STUDY.html")
    ] = None,
    live: Live = False,
    port: Port = 0,
    address: Address = None,
    storage: StorageUri = None,
) -> None:
    """Write the report page of a study, finished or running, or serve it while the search runs."""
    if live and (svg or out or storage):
        others = (Field("svg"), ", ", Field("out"), " and ", Field("storage"))
        raise ConfigError(Field("live"), ": serves the page and writes nothing; omit ", *others)
    if out is not None:
        check_output_file("out", out)
    if svg is not None:
        check_output_file("svg", svg)
    options = StudyOptions(study, runs, address, storage, typed(context, "runs"), typed(context, "address"))
    from tuner.commands.actions.report import serve_report, write_report

    if live:
        serve_report(options, port)
    else:
        write_report(options, out, svg)


def export(
    context: typer.Context,
    study: Study,
    runs: Runs = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="new folder to write; default: STUDY-adapters")] = None,
    trial: Trials = None,
    best: Annotated[bool, typer.Option("--best", help="only the best point of the front on validation")] = False,
    address: Address = None,
    storage: StorageUri = None,
) -> None:
    """Write the adapters of a front into a folder: PEFT files, heads, a card with the numbers of each, checksums."""
    if best and trial:
        raise ConfigError(Field("best"), ": chooses the trial; omit ", Field("trial"))
    target = out or Path(f"{Path(study).name}-adapters")
    check_new_folder("out", target)
    options = StudyOptions(study, runs, address, storage, typed(context, "runs"), typed(context, "address"))
    from tuner.commands.actions.export import export_points

    export_points(options, target, trial or (), best)


def send(
    folder: Annotated[Path, typer.Argument(help="folder of a study")],
    adapters: Annotated[bool, typer.Option("--adapters", help="adapters of the front too")] = False,
    trial: Trials = None,
    best: Annotated[bool, typer.Option("--best", help="of the best point alone")] = False,
) -> None:
    """Print files of a study as lines of text: what `tuner report` and `export` run on the head."""
    from tuner.commands.actions.export import send_study

    send_study(folder, adapters, trial or (), best)
