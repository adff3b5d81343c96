"""`tuner search`: options, turned into a `StudyConfig` and the options of one driver."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from tuner.commands.options import AudioRoot, Typed, typed, typed_words
from tuner.commands.paths import check_output_folder
from tuner.config import RunSettings
from tuner.errors import ConfigError
from tuner.patience import patience_seconds
from tuner.study.config import DEFAULT_SPACE, SAMPLERS, StudyConfig
from tuner.study.objectives import DEFAULT_OBJECTIVES, KNOWN

# Options that are not sent to the head: it runs on its own cluster, and prints for programs.
NOT_SENT = frozenset({"address", "json", "study", "space", "dashboard", "dry_run", "tflops"})
# What a cluster's head prints into each driver: that a lane waits for a machine, which the search reports itself, and
# that it has many small actors.
RAY_CHATTER = "infeasible resource requests|PYTHON worker processes have been started"


def _default(model: type[BaseModel], name: str) -> int:
    """A default of the command line, which is the study's."""
    value = model.model_fields[name].default
    assert isinstance(value, int)
    return value


def _named(name: str) -> str:
    """The same for a name."""
    return str(StudyConfig.model_fields[name].default)


EPOCHS, BATCH_SIZE = _default(RunSettings, "epochs"), _default(RunSettings, "batch_size")
TRIALS = _default(StudyConfig, "trials")
# Of a search that is limited by its time.
MANY_TRIALS = 1000
SAMPLER, STOPPING = _named("sampler"), _named("stopping")


# Of every count: the name of a trial has nine digits at most.
LARGEST = 999_999_999

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
    typer.Option(
        help=f"a metric to maximise, or a cost to minimise ({', '.join(KNOWN)}); repeat for several  "
        f"[default: {' and '.join(DEFAULT_OBJECTIVES)}]"
    ),
]
Trials = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, help=f"total number of trials of the study  [default: {TRIALS}]")
]
Hours = Annotated[
    float | None,
    typer.Option(min=0.01, help="end within so many hours, with a confirmed front; as many trials as fit, or --trials"),
]
Sampler = Annotated[str, typer.Option(help=f"what draws configurations: {', '.join(SAMPLERS)}")]
Stopping = Annotated[str, typer.Option(help="trials that end early: hopeless (a cheaper one will be better), or never")]
MaxParameters = Annotated[
    int | None,
    typer.Option("--max-params", min=1, max=10**15, help="draw nothing with more trainable parameters than this"),
]
Lanes = Annotated[
    int | None,
    typer.Option(min=1, max=LARGEST, help="training process groups; default: one a GPU that is or may come, else one"),
]
MaxGpus = Annotated[
    int | None, typer.Option(min=1, max=LARGEST, help="GPUs that this search may take, over all lanes and workers")
]
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
    float | None,
    typer.Option(min=1e-6, max=1e9, help="with --dry-run: TFLOP/s that one worker reaches; default: timed here"),
]


def search(
    context: typer.Context,
    space: Annotated[str, typer.Option(help="a space's name (see `tuner spaces`) or a YAML file")] = DEFAULT_SPACE,
    data: Annotated[str, typer.Option(help="manifest, prepared store (folder, s3://, gs://), or 'demo'")] = "demo",
    encoder: Annotated[str | None, typer.Option(help="audio encoder; needed when --data is a manifest")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="text encoder; needed when --data is a manifest")] = None,
    pad_to_30s: Annotated[bool, typer.Option("--pad-to-30s", help="the original 30 s window for every clip")] = False,
    audio_root: AudioRoot = None,
    placement: Placement = None,
    path: EncoderPath = None,
    objective: Objectives = None,
    trials: Trials = None,
    hours: Hours = None,
    sampler: Sampler = SAMPLER,
    stopping: Stopping = STOPPING,
    max_parameters: MaxParameters = None,
    epochs: Annotated[int, typer.Option(min=1, max=LARGEST, help="of each trial")] = EPOCHS,
    batch_size: Annotated[
        int, typer.Option(min=2, max=LARGEST, help="clips a step, over all workers of a lane")
    ] = BATCH_SIZE,
    study: Annotated[str | None, typer.Option(help="name of the study; default: the space's, numbered")] = None,
    resume: Annotated[str | None, typer.Option(help="resume this study; a larger --trials extends it")] = None,
    runs: Annotated[Path, typer.Option(help="folder of studies")] = Path("runs"),
    lanes: Lanes = None,
    max_gpus: MaxGpus = None,
    workers: Annotated[int, typer.Option(min=1, max=LARGEST, help="workers that share each batch of a lane")] = 1,
    pack: Annotated[int, typer.Option(min=1, max=LARGEST, help="adapters that a lane holds at once")] = 1,
    precision: Annotated[str, typer.Option(help="of the frozen encoder: auto, bf16 or fp32")] = "auto",
    off_path: OffPath = "refuse",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="of sampler, initialisation, dropout and batches")
    ] = 0,
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
    if not dry_run:
        # The driver's small matrices gain nothing from more threads, which would wait for each other and for the lanes.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Ray, Optuna and the encoders' libraries, which `--help` does without.
    from tuner.commands.actions import jobs, run_search

    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(runs)):
        raise ConfigError(f"--runs {runs}: must be a folder of this machine; give a bucket as --storage")
    if dry_run and hours is not None:
        raise ConfigError("--dry-run estimates a number of trials; give --trials instead of --hours")
    if dry_run and resume is not None:
        raise ConfigError("--dry-run estimates new studies only; drop --resume")
    patience_seconds()  # A value that means nothing is refused now, not when a disk is full.
    written = _typed(context)
    driver = run_search.DriverOptions(
        address=address,
        dashboard=dashboard,
        loggers=tuple(logger or ()),
        lanes=lanes,
        workers=workers,
        pack=pack,
        max_gpus=max_gpus,
        json=json,
        hours=hours,
    )
    driver.check()
    if driver.submits and not dry_run:
        words = typed_words(context, NOT_SENT)
        search_there = jobs.Submitted(space, data, encoder, audio_root, study, resume, runs, storage, words)
        run_search.submit(search_there, driver)
        return
    place = run_search.place_of_studies(runs, storage, address, runs_typed="runs" in written, dry_run=dry_run)
    if not dry_run:
        check_output_folder("runs", place.runs)
    if resume is not None:
        run_search.resume_study(place, resume, trials, written, driver)
        return
    wanted = run_search.NewStudy(
        space=space,
        placement=placement,
        data=data,
        encoder=encoder,
        text_encoder=text_encoder,
        pad_to_30s=pad_to_30s,
        audio_root=audio_root,
        path=path,
        objectives=tuple(objective or DEFAULT_OBJECTIVES),
        study=study,
        trials=trials or (MANY_TRIALS if hours else TRIALS),
        sampler=sampler,
        stopping=stopping,
        max_parameters=max_parameters,
        epochs=epochs,
        batch_size=batch_size,
        precision=precision,
        off_path=off_path,
        seed=seed,
    )
    run_search.start_study(place, wanted, driver, estimate_only=dry_run, tflops=tflops)


def _typed(context: typer.Context) -> Mapping[str, Typed]:
    """The options that the user typed, by the names of their parameters."""
    names = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
    return {name: Typed(flag, context.params[name]) for name, flag in names.items() if typed(context, name)}
