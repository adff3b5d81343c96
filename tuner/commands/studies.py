"""`tuner studies`, `status`, `logs`, `stop`: searches on a cluster, from a laptop that may be closed meanwhile."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.study.wording import counted, describe_config, describe_points, describe_time

if TYPE_CHECKING:
    from tuner.service.jobs.cluster import Cluster, StudyJob
    from tuner.study.progress import Progress

Study = Annotated[str, typer.Argument(help="name of the study")]
Address = Annotated[
    str, typer.Option(envvar="TUNER_ADDRESS", help="the head's dashboard, such as http://127.0.0.1:8265")
]
Json = Annotated[bool, typer.Option("--json", help="events as JSON lines")]

# What the head must not be told: it runs on its own cluster, and prints for programs.
NOT_SENT = frozenset({"address", "json", "study", "space", "dashboard", "dry_run", "tflops"})
FAILED = 2
INTERRUPTED = 130


def studies(address: Address) -> None:
    """List the searches of a cluster, the latest first."""
    from tuner.commands.inputs import tell
    from tuner.service.jobs.cluster import connect

    rows = [("STUDY", "SPACE", "USER", "STATE", "STARTED (UTC)", "ENCODER")]
    for job in connect(address).studies():
        started = job.started.strftime("%Y-%m-%d %H:%M") if job.started else ""
        rows.append((job.study, job.space, job.user, job.state.lower(), started, job.encoder))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        tell("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def status(study: Study, address: Address) -> None:
    """Say how far a search is, which trials failed and why, and its front so far."""
    from tuner.commands.inputs import tell
    from tuner.report.live import Tally
    from tuner.service.jobs.cluster import connect
    from tuner.service.jobs.feed import EventFeed

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
    left = "" if ended else f", {describe_time(progress.seconds_left())}"
    front, metric = progress.front(), progress.metric
    lines = [f"{len(progress.trials)} of {counted(progress.started.trials, 'trial')}: {counts}{left}"]
    lines += [f"{trial.trial} {trial.state}: {trial.reason}" for trial in progress.trials if trial.reason]
    lines.append("the front on validation:" if ended else f"{describe_points(len(front))} so far:")
    for trial in front:
        size = f"{trial.parameters or 0:>12,}"
        lines.append(f"  {trial.trial}  {size}  {metric} {trial.value(metric):.3f}  {describe_config(trial.config)}")
    return lines


def logs(study: Study, address: Address, json: Json = False) -> None:
    """Follow a search from its first event to its end, wherever it was started."""
    from tuner.service.jobs.cluster import connect

    cluster = connect(address)
    _follow(cluster, cluster.find(study), address, json)


def stop(study: Study, address: Address) -> None:
    """End a search; what it has trained is kept, and `tuner search --resume` goes on."""
    from tuner.commands.inputs import tell
    from tuner.service.jobs.cluster import connect

    cluster = connect(address)
    ended = cluster.stop(cluster.find(study))
    tell(f"study {study}: {ended.state.lower()}{_how_to_go_on(cluster, ended, address)}")


def _how_to_go_on(cluster: Cluster, job: StudyJob, address: str) -> str:
    """The command that resumes, if a search got as far as making the study."""
    folder = cluster.run_dir(job.study)
    if folder is None:
        return ""
    # To be pasted into a shell, and what is in it came from the cluster.
    again = ["tuner", "search", "--resume", job.study, "--runs", str(folder.parent), "--address", address]
    return f"; go on with `{shlex.join(again)}`"


def submit_search(context: typer.Context, address: str, json: bool) -> None:
    """Run `tuner search` with the options of this command line on the cluster, and follow it.

    Raises:
        ConfigError: an option names a place on this machine, where the cluster cannot look.
        SpaceError: no such space, or its file is not valid.
    """
    from datetime import UTC, datetime

    from tuner.service.jobs.cluster import connect
    from tuner.space import load_space

    options = context.params
    _check_places(options)
    space = load_space(options["space"])
    study = options["resume"] or options["study"] or f"{space.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    arguments = sent_options(context)
    cluster = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(options["space"]) if Path(options["space"]).is_file() else None
        if own:
            shutil.copy(own, folder)
        if not options["resume"]:
            arguments += ["--study", study, "--space", own.name if own else options["space"]]
        shown = _shown(cluster, options, space.name)
        job = cluster.submit(study, *shown, arguments, Path(folder) if own else None)
    _follow(cluster, job, address, json)


def _shown(cluster: Cluster, options: dict[str, Any], space: str) -> tuple[str, str]:
    """Space and encoder of a search as the job shows them, as far as this machine can know the latter."""
    from tuner.data.store import META_FILE, Store

    if options["resume"]:
        earlier = (job for job in cluster.studies() if job.study == options["resume"])
        return next(((job.space, job.encoder) for job in earlier), ("as before", "as before"))
    if options["encoder"]:
        return space, options["encoder"]
    if options["data"] == "demo":
        return space, "Whisper tiny.en of the demo"
    store = Path(options["data"])
    if (store / META_FILE).is_file():
        return space, Store.open(store).encoder.source
    return space, f"that of {store.name}"


def sent_options(context: typer.Context) -> list[str]:
    """The options that the user wrote, as the head is to read them; what was left out is left to the head."""
    sent: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in NOT_SENT or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            sent += [parameter.opts[0] if value else parameter.secondary_opts[0]]
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                sent += [parameter.opts[0], str(item)]
    return sent


def _check_places(options: dict[str, Any]) -> None:
    """With a storage, the run folder is the head's own and lanes ask the storage."""
    from tuner.errors import ConfigError
    from tuner.storage import is_uri

    storage, data = options["storage"], options["data"]
    places = {"data": (data, "/mnt/tuner/stores/NAME or s3://BUCKET/NAME")}
    if storage is None:
        places["runs"] = (options["runs"], "/mnt/tuner/runs, or a --storage")
    else:
        places["storage"] = (storage, "/mnt/tuner/studies or s3://BUCKET/studies")
    if options["audio_root"] is not None:
        places["audio-root"] = (options["audio_root"], "/mnt/tuner/audio")
    for option, (place, example) in places.items():
        if str(place) != "demo" and not is_uri(str(place)) and not Path(place).is_absolute():
            raise ConfigError(
                f"--{option} {place}: on a cluster, give a folder that all its nodes see, such as {example}"
            )


def _follow(cluster: Cluster, job: StudyJob, address: str, json: bool) -> None:
    from tuner.commands.inputs import say
    from tuner.report.live import make_view
    from tuner.service.jobs.feed import EventFeed

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
