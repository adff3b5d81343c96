"""`tuner search`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.commands.options import AudioRoot, study_folder

if TYPE_CHECKING:
    from tuner.search.study import SearchRequest
    from tuner.space import SearchSpace
    from tuner.storage import Storage

# Epoch metrics that can be searched for.
METRICS = tuple(
    [f"recall@{k}" for k in (1, 5, 10)]
    + [f"{way}_{name}" for way in ("audio_to_text", "text_to_audio") for name in ("R@1", "R@5", "R@10", "mAP@10")]
)
PARAMETERS = "trainable_parameters"
DEFAULT_TRIALS = 7
LOST = 2
# What a cluster's head prints into each driver: that a lane waits for a machine, which the search says itself, and that
# it has many small actors.
RAY_CHATTER = "infeasible resource requests|PYTHON worker processes have been started"
INTERRUPTED = 130  # exit code, as shells have it for SIGINT


# Options whose help fills a line of its own.
Placement = Annotated[
    str | None, typer.Option(help="adapt the tower, language_model or both; default: as the space says")
]
EncoderPath = Annotated[
    str | None,
    typer.Option(help="audio_tower, or full_forward through the language model; default: what the space needs"),
]
Objectives = Annotated[
    list[str] | None,
    typer.Option(help="a metric to maximise, and trainable_parameters to minimise; repeat for both (the default)"),
]
Trials = Annotated[
    int | None, typer.Option(min=1, help=f"total number of trials of the study  [default: {DEFAULT_TRIALS}]")
]
Lanes = Annotated[
    int | None, typer.Option(min=1, help="training process groups; default: one a GPU that is or may come, else one")
]
MaxGpus = Annotated[int | None, typer.Option(min=1, help="GPUs that this search may take, over all lanes and workers")]
OffPath = Annotated[
    str, typer.Option(help="LoRA modules that the embedding does not depend on: refuse, or warn of them")
]
Dashboard = Annotated[
    bool, typer.Option(help="start the Ray dashboard too, with the embedded Ray (400 MB); it asks for your token")
]
ClusterAddress = Annotated[
    str | None,
    typer.Option(help="http://HEAD:8265 to submit there, or a Ray address to join; default: Ray inside this process"),
]
Loggers = Annotated[
    list[str] | None,
    typer.Option("--logger", help="also write trials to tensorboard, mlflow or wandb; repeat for several"),
]
StorageUri = Annotated[
    str | None,
    typer.Option(
        help="keep studies here (folder, s3://, gs://), so that nodes share no file system; --runs is then local"
    ),
]
Tflops = Annotated[
    float | None, typer.Option(min=1e-6, help="with --dry-run: TFLOP/s that one worker reaches; default: timed here")
]


def search(
    context: typer.Context,
    space: Annotated[str, typer.Option(help="a space's name (see `tuner spaces`) or a YAML file")] = "attention_only",
    data: Annotated[str, typer.Option(help="manifest, prepared store (folder, s3://, gs://), or 'demo'")] = "demo",
    encoder: Annotated[str | None, typer.Option(help="audio encoder; needed when --data is a manifest")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="text encoder; needed when --data is a manifest")] = None,
    pad_to_30s: Annotated[bool, typer.Option("--pad-to-30s", help="the original 30 s window for every clip")] = False,
    audio_root: AudioRoot = None,
    placement: Placement = None,
    path: EncoderPath = None,
    objective: Objectives = None,
    trials: Trials = None,
    epochs: Annotated[int, typer.Option(min=1, help="of each trial")] = 3,
    batch_size: Annotated[int, typer.Option(min=2, help="clips a step, over all workers of a lane")] = 64,
    study: Annotated[str | None, typer.Option(help="name of the study; default: the space's, numbered")] = None,
    resume: Annotated[str | None, typer.Option(help="go on with this study; a larger --trials extends it")] = None,
    runs: Annotated[Path, typer.Option(help="folder of studies")] = Path("runs"),
    lanes: Lanes = None,
    max_gpus: MaxGpus = None,
    workers: Annotated[int, typer.Option(min=1, help="workers that share each batch of a lane")] = 1,
    pack: Annotated[int, typer.Option(min=1, help="adapters that a lane holds at once")] = 1,
    precision: Annotated[str, typer.Option(help="of the frozen encoder: auto, bf16 or fp32")] = "auto",
    off_path: OffPath = "refuse",
    seed: Annotated[int, typer.Option(min=0, help="of sampler, initialisation, dropout and batches")] = 0,
    address: ClusterAddress = None,
    dashboard: Dashboard = False,
    logger: Loggers = None,
    storage: StorageUri = None,
    json: Annotated[bool, typer.Option("--json", help="events as JSON lines on standard output")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would cost, train nothing")] = False,
    tflops: Tflops = None,
) -> None:
    """Search LoRA configurations; the result is a front of recall against trainable parameters."""
    # Ray reads it once, when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAY_CHATTER)
    from tuner.commands.inputs import DataChoice
    from tuner.commands.studies import submit_search
    from tuner.lanes.fleet import FleetOptions
    from tuner.search.loggers import check_loggers

    options = FleetOptions(lanes, workers, pack, max_gpus)
    check_loggers(logger or ())
    place, runs = _places(context)
    if address is not None and address.startswith(("http://", "https://")) and not dry_run:
        submit_search(context, address, json)
        return
    here = partial(replace, address=address, dashboard=dashboard, fleet=options, loggers=tuple(logger or ()))
    if resume is not None:
        _resume(study_folder(runs, resume), place, trials, here, address, json)
        return
    choice = DataChoice(data, encoder, text_encoder, pad_to_30s, audio_root)
    values = {"epochs": epochs, "batch_size": batch_size, "data_seed": seed, "precision": precision}
    values["off_path"] = off_path
    request = _new_request(_load_space(space, placement), choice, path, objective, study, runs, place, values)
    request = here(replace(request, trials=trials or DEFAULT_TRIALS, seed=seed))
    if dry_run:
        _show_cost(request, tflops, json)
    else:
        _run(request.run_dir, place, lambda: request, address, json, False)


def _resume(
    run_dir: Path,
    place: Storage | None,
    trials: int | None,
    here: Callable[[SearchRequest], SearchRequest],
    address: str | None,
    json: bool,
) -> None:
    """Go on with a study.

    Args:
        place: where it is kept besides its folder; None: as it says itself.
        here: fills in what each driver is told anew.
    """
    from tuner.search.study import kept_in, resumed_request

    place = kept_in(run_dir, place)
    _run(run_dir, place, lambda: here(resumed_request(run_dir, trials, place)), address, json, True)


def _show_cost(request: SearchRequest, tflops: float | None, json: bool) -> None:
    from tuner.commands.dry_run import dry_run

    dry_run(request, tflops, json)


def _places(context: typer.Context) -> tuple[Storage | None, Path]:
    """Where studies are kept besides their folder, and the folder of their folders."""
    from tuner.data.cache import cache_root
    from tuner.errors import ConfigError
    from tuner.storage import Storage

    storage, runs, dry_run = (context.params[name] for name in ("storage", "runs", "dry_run"))
    if dry_run and context.params["resume"]:
        raise ConfigError("--dry-run: reckons new studies; leave --resume away")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(runs)):
        raise ConfigError(f"--runs {runs}: is a folder of this machine; give a bucket as --storage")
    given = context.get_parameter_source("runs")
    if storage and context.params["address"] and (given is None or given.name != "COMMANDLINE"):
        # The folder that a job runs in goes with it.
        runs = cache_root() / "runs"
    # What is only reckoned is put nowhere.
    return Storage.parse(storage) if storage and not dry_run else None, runs


def _run(
    run_dir: Path,
    place: Storage | None,
    prepare: Callable[[], SearchRequest],
    address: str | None,
    json: bool,
    resume: bool,
) -> None:
    """Search as the only head of the study.

    Args:
        place: where the study is kept besides its folder.
        prepare: called when no other head is searching the study: a resumed one is brought here by it.
    """
    from tuner.commands.inputs import say
    from tuner.patience import patience_seconds
    from tuner.report.live import make_view
    from tuner.search.driver import run_search
    from tuner.search.durable.head_lease import only_head

    patience_seconds()  # A value that means nothing is refused now, not when a disk is full.
    again = f"tuner search --resume {run_dir.name} --runs {run_dir.parent}"
    again += f" --address {address}" if address else ""
    view = make_view("json" if json else "auto")

    def end(sentence: str) -> None:
        view.close()
        say(f"tuner: {sentence}")
        # No exception reaches calls that wait for a cluster, and lanes of ours must not upload any more.
        os._exit(LOST)

    gone = f"the Ray cluster has gone; nothing is lost, bring it up and go on with `{again}`"
    try:
        with only_head(run_dir.name, place, say, superseded=end) as lease:
            request = prepare()
            front = run_search(request, view, resume, lambda: end(gone), lease)
    except KeyboardInterrupt:
        # Said here: Typer turns the interrupt itself into a silent exit.
        say(f"tuner: interrupted; nothing is lost, go on with `{again}`")
        raise typer.Exit(INTERRUPTED) from None
    say(_summary(front, request))


def _load_space(name: str, placement: str | None) -> SearchSpace:
    from tuner.space import load_space

    space = load_space(name)
    return space if placement is None else space.with_placement(placement)


def _new_request(
    space: SearchSpace,
    choice: Any,
    path: str | None,
    objective: list[str] | None,
    study: str | None,
    runs: Path,
    storage: Storage | None,
    values: dict[str, Any],
) -> SearchRequest:
    from tuner.commands.inputs import choose_path, find_store, place_of
    from tuner.config import RunSettings
    from tuner.data.store import Store
    from tuner.records import check_study_name
    from tuner.search.study import SearchRequest, check_new

    metric, minimise = parse_objectives(objective)
    run_dir = runs / check_study_name(study or _free_name(runs, storage, space.name))
    check_new(run_dir, storage)
    store = find_store(choice)
    encoder = choose_path(Store.open(store).encoder, path, space)
    place = place_of(store, choice.data, storage)
    settings = RunSettings.parse({"store": place, "encoder": encoder, **values}, "tuner search")
    return SearchRequest(run_dir, space, settings, metric, minimise, storage=storage)


def _free_name(runs: Path, storage: Storage | None, name: str) -> str:
    from tuner.records import STUDY_FILE

    here = {path.name for path in runs.iterdir()} if runs.is_dir() else set()
    there = set(storage.folders()) if storage else set()

    def taken(candidate: str) -> bool:
        # A study that could not start has left an empty folder there.
        kept = storage is not None and candidate in there and storage.at(candidate).exists(STUDY_FILE)
        return candidate in here or kept

    numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(here | there) + 2))
    return next(candidate for candidate in numbered if not taken(candidate))


def parse_objectives(objectives: list[str] | None) -> tuple[str, bool]:
    """The metric to maximise, and whether trainable parameters are minimised too.

    Raises:
        ConfigError: not one metric, an unknown one, or one named twice.
    """
    import difflib

    from tuner.errors import ConfigError

    given = objectives or ["recall@10", PARAMETERS]
    metrics = [name for name in given if name != PARAMETERS]
    for name in metrics:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METRICS)}"
            raise ConfigError(f"--objective {name}: no such metric; {hint}")
    if len(metrics) != 1 or len(set(given)) != len(given):
        raise ConfigError(f"--objective: give one metric, and {PARAMETERS} or not (got {', '.join(given)})")
    return metrics[0], PARAMETERS in given


def _summary(front: dict[str, Any], request: SearchRequest) -> str:
    from tuner.report.answer import headline
    from tuner.report.progress import counted
    from tuner.report.run import read_run

    points = counted(sum(point["on_front"] for point in front["points"]), "point")
    lines = headline(read_run(request.run_dir))
    return "\n".join([*lines, f"{points} on the front; report: {request.run_dir / 'report.html'}"])
