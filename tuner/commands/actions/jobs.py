"""`tuner studies`, `status`, `logs`, `stop`, and a search that is submitted: jobs of a cluster."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import typer

from tuner.commands.console import FAILED, INTERRUPTED, say, tell
from tuner.commands.options import DEMO
from tuner.data.store import META_FILE, Store
from tuner.errors import ConfigError, Field
from tuner.report.live import Tally, make_view
from tuner.service.jobs.cluster import Cluster, StudyJob, connect
from tuner.service.jobs.feed import EventFeed
from tuner.space import load_space
from tuner.storage import is_uri
from tuner.study.progress import Progress
from tuner.study.wording import counted, describe_config, describe_points


@dataclass(frozen=True)
class Submitted:
    """What a submitted search is shown as, and the places that it names.

    Attributes:
        arguments: the options that the user wrote, as the head reads them, without study and space.
    """

    space: str
    data: str
    encoder: str | None
    audio_root: Path | None
    study: str | None
    resume: str | None
    runs: Path
    storage: str | None
    arguments: tuple[str, ...]


def list_studies(address: str) -> None:
    """Print a table of the searches of a cluster."""
    rows = [("STUDY", "SPACE", "USER", "STATE", "STARTED (UTC)", "ENCODER")]
    for job in connect(address).studies():
        started = job.started.strftime("%Y-%m-%d %H:%M") if job.started else ""
        rows.append((job.study, job.space, job.user, job.state.lower(), started, job.encoder))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        tell("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_status(study: str, address: str) -> None:
    """Print how far a search is, failed trials with their reasons, and its front so far."""
    cluster = connect(address)
    job = cluster.find(study)
    view, said = Tally(), list[str]()
    feed = EventFeed(view, said.append)
    for line in cluster.lines(job):
        feed.line(line)
    tell(f"study {job.study}, space {job.space}, encoder {job.encoder}, of {job.user}: {job.state.lower()}")
    if view.progress.plan is not None:
        for text in _describe(view.progress, job.ended):
            tell(text)
    for line in said:
        if line.startswith("tuner: "):
            tell(line)


def _describe(progress: Progress, ended: bool) -> list[str]:
    counts = ", ".join(f"{count} {state}" for state, count in progress.states.items())
    left = "" if ended else f", {progress.outlook()}"
    front, metric = progress.front(), progress.metric
    lines = [f"{len(progress.trials)} of {counted(progress.started.trials, 'trial')}: {counts}{left}"]
    lines += [f"{trial.trial} {trial.state}: {trial.reason}" for trial in progress.trials if trial.reason]
    lines.append("the front on validation:" if ended else f"{describe_points(len(front))} so far:")
    for trial in front:
        size = f"{trial.parameters or 0:>12,}"
        lines.append(f"  {trial.trial}  {size}  {metric} {trial.value(metric):.3f}  {describe_config(trial.config)}")
    return lines


def follow_logs(study: str, address: str, json: bool) -> None:
    """Show a search from its first event to its end."""
    cluster = connect(address)
    _follow(cluster, cluster.find(study), address, json)


def stop_study(study: str, address: str) -> None:
    """End a search, and print the command that resumes it."""
    cluster = connect(address)
    ended = cluster.stop(cluster.find(study))
    tell(f"study {study}: {ended.state.lower()}{_how_to_go_on(cluster, ended, address)}")


def submit_search(search: Submitted, address: str, json: bool) -> None:
    """Run `tuner search` with these options on the cluster, and follow it.

    Raises:
        ConfigError: an option names a place on this machine, where the cluster cannot look.
        SpaceError: no such space, or its file is not valid.
    """
    _check_places(search)
    space = load_space(search.space)
    study = search.resume or search.study or f"{space.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    arguments: Sequence[str] = search.arguments
    cluster = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(search.space) if Path(search.space).is_file() else None
        if own:
            shutil.copy(own, folder)
        if not search.resume:
            arguments = [*arguments, "--study", study, "--space", own.name if own else search.space]
        shown = _shown(cluster, search, space.name)
        job = cluster.submit(study, *shown, arguments, Path(folder) if own else None)
    _follow(cluster, job, address, json)


def _how_to_go_on(cluster: Cluster, job: StudyJob, address: str) -> str:
    """The command that resumes, if a search got as far as making the study."""
    folder = cluster.run_dir(job.study)
    if folder is None:
        return ""
    # To be pasted into a shell, and what is in it came from the cluster.
    again = ["tuner", "search", "--resume", job.study, "--runs", str(folder.parent), "--address", address]
    return f"; resume it with `{shlex.join(again)}`"


def _shown(cluster: Cluster, search: Submitted, space: str) -> tuple[str, str]:
    """Space and encoder of a search as the job shows them, as far as this machine can know the latter."""
    if search.resume:
        earlier = (job for job in cluster.studies() if job.study == search.resume)
        return next(((job.space, job.encoder) for job in earlier), ("as before", "as before"))
    if search.encoder:
        return space, search.encoder
    if search.data == DEMO:
        return space, "Whisper tiny.en of the demo"
    store = Path(search.data)
    if (store / META_FILE).is_file():
        return space, Store.open(store).encoder.source
    return space, f"that of {store.name}"


def _check_places(search: Submitted) -> None:
    """With a storage, the run folder is the head's own and lanes ask the storage."""
    places = {"data": (search.data, "/mnt/tuner/stores/NAME or s3://BUCKET/NAME")}
    if search.storage is None:
        places["runs"] = (str(search.runs), "/mnt/tuner/runs, or a --storage")
    else:
        places["storage"] = (search.storage, "/mnt/tuner/studies or s3://BUCKET/studies")
    if search.audio_root is not None:
        places["audio_root"] = (str(search.audio_root), "/mnt/tuner/audio")
    for field, (place, example) in places.items():
        if place != DEMO and not is_uri(place) and not Path(place).is_absolute():
            needed = f" {place}: on a cluster, give a folder that all its nodes see, such as {example}"
            raise ConfigError(Field(field), needed)


def _follow(cluster: Cluster, job: StudyJob, address: str, json: bool) -> None:
    view = make_view("json" if json else "auto")
    try:
        ended = cluster.follow(job, EventFeed(view, say).line)
    except KeyboardInterrupt:
        where = shlex.join([job.study, "--address", address])
        say(f"tuner: the search goes on; follow it with `tuner logs {where}`, end it with `tuner stop {where}`")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        view.close()
    if ended.state != "SUCCEEDED":
        say(f"tuner: study {job.study} ended as {ended.state.lower()}")
        raise typer.Exit(FAILED)
