"""`tuner report`: the page of a study, written or served."""

from __future__ import annotations

from pathlib import Path

import typer

from tuner.commands.actions.places import Place
from tuner.commands.options import StudyOptions
from tuner.commands.paths import check_output_file
from tuner.report.charts import save_front_svg
from tuner.report.html import save_page
from tuner.report.serve import LiveReport
from tuner.report.watch import Watched, WatchedFolder
from tuner.service.jobs.live_job import WatchedJob
from tuner.study.study import Study


def write_report(options: StudyOptions, out: Path | None, svg: Path | None) -> None:
    """Write the page, and the picture of the front if asked for, and print where the page is."""
    place = Place.of(options)
    with place.records() as folder:
        found = Study.open(folder)
        page = out or (found.folder.report if place.here else Path(f"{place.name}.html"))
        check_output_file("out", page)
        save_page(found, page, elsewhere=not place.here)
        typer.echo(page)
        if svg is not None:
            save_front_svg(found, svg)


def serve_report(options: StudyOptions, port: int) -> None:
    """Serve the page on loopback until Ctrl-C."""
    place = Place.of(options)
    with LiveReport(_watched(place), port) as server:
        typer.echo(f"{server.url} shows study {place.name} while it runs; Ctrl-C ends this page alone")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            # The only way to end it, so no fault.
            typer.echo("")


def _watched(place: Place) -> Watched:
    if place.here:
        return WatchedFolder(place.folder)
    source = place.cluster_source()
    return WatchedJob(source.cluster, source.cluster.find(place.study), source)
