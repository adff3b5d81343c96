"""`tuner report` and `tuner export`: what a search found, as a page and as adapters, wherever it ran."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.commands.options import study_folder

if TYPE_CHECKING:
    from tuner.report.watch import Watched
    from tuner.service.jobs.fetch import ClusterSource, OnBytes, StudySource

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


@dataclass(frozen=True)
class Place:
    """Where a study is, as its command line says; `study` is its name or, on this machine, its folder too."""

    study: str
    runs: Path
    address: str | None
    storage: str | None
    runs_given: bool

    @property
    def folder(self) -> Path:
        """On this machine."""
        return study_folder(self.runs, self.study)

    @property
    def here(self) -> bool:
        """Whether the study is in a folder of this machine."""
        return self.address is None and self.storage is None


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
    from tuner.errors import ConfigError
    from tuner.report.charts import save_front_svg
    from tuner.report.html import save_page
    from tuner.study.study import Study

    place = _place(context, study, runs, address, storage)
    if live:
        if svg or out or place.storage:
            raise ConfigError("--live: serves the page and writes nothing; leave --svg, --out and --storage away")
        _serve(place, port)
        return
    with _records(place) as folder:
        found = Study.open(folder)
        page = out or (found.folder.report if place.here else Path(f"{Path(study).name}.html"))
        save_page(found, page, elsewhere=not place.here)
        typer.echo(page)
        if svg is not None:
            save_front_svg(found, svg)


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
    from tuner.commands.inputs import progress_bar
    from tuner.data.writer import disk_faults, new_folder
    from tuner.errors import ConfigError
    from tuner.report.handover import choose_points, write_handover
    from tuner.study.study import Study

    if best and trial:
        raise ConfigError("--best: chooses the trial; leave --trial away")
    place = _place(context, study, runs, address, storage)
    target = out or Path(f"{Path(study).name}-adapters")
    if target.exists():
        raise ConfigError(f"--out {target}: exists; give a new folder")
    with tempfile.TemporaryDirectory(prefix="tuner-") as temporary:
        source = place.folder if place.here else Path(temporary)
        if not place.here:
            with progress_bar("bytes received") as progress:
                _source(place, progress).points(source, trial or (), best)
        found = Study.open(source)
        points = choose_points(found, trial or (), best)
        with disk_faults(target), new_folder(target) as folder:
            write_handover(found, points, source, folder)
    for point in points:
        typer.echo(target / point.trial)


def send(
    folder: Annotated[Path, typer.Argument(help="folder of a study")],
    adapters: Annotated[bool, typer.Option("--adapters", help="adapters of the front too")] = False,
    trial: Trials = None,
    best: Annotated[bool, typer.Option("--best", help="of the best point alone")] = False,
) -> None:
    """Print files of a study as lines of text: what `tuner report` and `export` run on the head."""
    from tuner.report.handover import choose_points, files_of
    from tuner.service.jobs.bundle import RECORDS, bundle_lines
    from tuner.study.study import Study

    found = Study.open(folder)
    points = choose_points(found, trial or (), best) if adapters else []
    names = [*RECORDS, *(name for point in points for name in files_of(point))]
    for line in bundle_lines(folder, names):
        typer.echo(line)


def _place(context: typer.Context, study: str, runs: Path, address: str | None, storage: str | None) -> Place:
    from tuner.errors import ConfigError
    from tuner.study.folder import RECORD_FILE

    def given(option: str) -> bool:
        source = context.get_parameter_source(option)
        return source is not None and source.name == "COMMANDLINE"

    place = Place(study, runs, address, storage, given("runs"))
    if address is not None and not given("address") and (storage or (place.folder / RECORD_FILE).is_file()):
        place = Place(study, runs, None, storage, place.runs_given)
    if place.address is not None and storage is not None:
        raise ConfigError("--address and --storage: give one of them; the study is the same in both")
    return place


@contextmanager
def _records(place: Place) -> Iterator[Path]:
    """A folder with what a report is drawn from."""
    if place.here:
        yield place.folder
        return
    with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
        _source(place).records(Path(folder))
        yield Path(folder)


def _quiet(done: int, total: int) -> None:
    """Records are small."""


def _source(place: Place, on_bytes: OnBytes = _quiet) -> StudySource:
    from tuner.service.jobs.fetch import StorageSource
    from tuner.storage import Storage

    if place.storage is not None:
        return StorageSource(Storage.parse(place.storage), place.study)
    return _cluster_source(place, on_bytes)


def _cluster_source(place: Place, on_bytes: OnBytes = _quiet) -> ClusterSource:
    from tuner.service.jobs.cluster import connect
    from tuner.service.jobs.fetch import ClusterSource

    assert place.address is not None
    on_head = place.runs / place.study if place.runs_given else None
    return ClusterSource(connect(place.address), place.study, on_head, on_bytes)


def _serve(place: Place, port: int) -> None:
    from tuner.report.serve import LiveReport

    with LiveReport(_watched(place), port) as server:
        typer.echo(f"{server.url} shows study {Path(place.study).name} while it runs; Ctrl-C ends this page alone")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            # The only way to end it, so no fault.
            typer.echo("")


def _watched(place: Place) -> Watched:
    from tuner.report.watch import WatchedFolder
    from tuner.service.jobs.live_job import WatchedJob

    if place.here:
        return WatchedFolder(place.folder)
    source = _cluster_source(place)
    return WatchedJob(source.cluster, source.cluster.find(place.study), source)
