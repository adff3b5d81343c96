"""`tuner export`, and `tuner send`, which it runs on the head of a cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import typer

from tuner.commands.actions.places import Place
from tuner.commands.console import progress_bar
from tuner.commands.options import StudyOptions
from tuner.data.writer import disk_faults, new_folder
from tuner.report.handover import choose_points, files_of, write_handover
from tuner.service.jobs.bundle import RECORDS, bundle_lines
from tuner.study.study import Study


def export_points(options: StudyOptions, target: Path, trials: Sequence[str], best: bool) -> None:
    """Write the chosen points of a front into a new folder, and print where each is."""
    place = Place.of(options)
    with tempfile.TemporaryDirectory(prefix="tuner-") as temporary:
        source = place.folder if place.here else Path(temporary)
        if not place.here:
            with progress_bar("bytes received") as progress:
                place.source(progress).points(source, trials, best)
        found = Study.open(source)
        points = choose_points(found, trials, best)
        with disk_faults(target), new_folder(target) as folder:
            write_handover(found, points, source, folder)
    for point in points:
        typer.echo(target / point.trial)


def send_study(folder: Path, adapters: bool, trials: Sequence[str], best: bool) -> None:
    """Print the records of a study, and the adapters of its front if asked for, as lines of text."""
    found = Study.open(folder)
    points = choose_points(found, trials, best) if adapters else []
    names = [*RECORDS, *(name for point in points for name in files_of(point))]
    for line in bundle_lines(folder, names):
        typer.echo(line)
