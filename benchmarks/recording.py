"""Record a real search for `benchmarks.scale`: `python -m benchmarks.recording` writes `recorded_search.json`.

It searches the demo from the command line, as `make search` does, or reads a finished study (`--study`); then the same
Tune and the same coordinator run without training, to say what stands between trials (`overheads.py`).
"""

from __future__ import annotations

import platform
import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks import run
from benchmarks.overheads import probe, tune_costs
from benchmarks.recorded import FILE, Overheads, RecordedSearch, RecordedTrial, Row
from benchmarks.session import run_session, search_command
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder
from tuner.lanes.fleet import connected
from tuner.study.config import StudyRecord
from tuner.study.folder import StudyFolder
from tuner.study.history import Trial
from tuner.study.journal import epoch_row, read_history
from tuner.study.objectives import LORA_PARAMETERS, TRAINABLE_PARAMETERS
from tuner.study.points import ConfirmedFront

STUDY = "recorded"
FIGURES = 5  # significant, of measured numbers
UNKNOWN = Overheads(*(0.0,) * 7)


def search(folder: Path, trials: int, epochs: int) -> Path:
    """Search the demo; returns the study's folder."""
    options = ["--trials", str(trials), "--epochs", str(epochs), "--runs", str(folder), "--study", STUDY, "--json"]
    run_session(search_command(["search", *options]), folder / "search.log")
    return folder / STUDY


def read_trials(folder: StudyFolder) -> list[RecordedTrial]:
    """Configurations and epoch rows of the journal; every trial must have come to its end."""
    history, fault = read_history(folder)
    assert fault is None, fault
    trials = [RecordedTrial(trial.config, tuple(_rows(trial))) for trial in history.trials]
    lengths = {len(trial.rows) for trial in trials}
    assert len(lengths) == 1, f"trials of {sorted(lengths)} epochs"
    return trials


def _rows(trial: Trial) -> list[Row]:
    """Numbers of each epoch, rounded, and the sizes of the trial."""
    known = {LORA_PARAMETERS: trial.lora_parameters, TRAINABLE_PARAMETERS: trial.parameters}
    flat = [epoch_row(epoch) | known for _, epoch in sorted(trial.epochs.items())]
    return [{name: _rounded(value) for name, value in row.items() if isinstance(value, int | float)} for row in flat]


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{FIGURES}g}")


def read_search(run_dir: Path) -> RecordedSearch:
    """A study that ran on one lane from beginning to end, with the overheads that its files show."""
    folder = StudyFolder(run_dir)
    facts, front = StudyRecord.read(folder), ConfirmedFront.read(folder)
    assert front is not None, f"{run_dir} has no front"
    name = Path(facts.settings.encoder.source).name
    spec = replace(inspect_encoder(facts.settings.encoder), source=name, folder=Path(name))
    made = {
        "command": f"tuner search --space {facts.space.name} --trials {facts.trials}",
        "created": facts.created.isoformat(),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, no GPU",
        "clips": facts.data.model_dump(),
    }
    text_dim = Store.open(Path(facts.settings.store)).text_dim
    record = RecordedSearch(made, facts.space, spec, text_dim, tuple(read_trials(folder)), UNKNOWN)
    start, confirming = read_times(folder, facts.created, record.trials[0].rows[0])
    each = confirming / len(front.points) / record.mean_seconds
    return replace(record, overheads=replace(UNKNOWN, lane_start=start, confirm_epochs=each))


def read_times(folder: StudyFolder, created: datetime, first: Row) -> tuple[float, float]:
    """Seconds from the study's record to the first step of its first trial, and from the last trial to the front.

    The record is written again when the first epoch has been reported; the journal ends with the last trial.
    """
    recorded, told, confirmed = (path.stat().st_mtime for path in (folder.record, folder.journal, folder.front))
    trained = first["train_seconds"] + first["validation_seconds"]
    return recorded - created.timestamp() - trained, confirmed - told


def measure(record: RecordedSearch, folder: Path, trials: int) -> RecordedSearch:
    """The same with the overheads of Tune and the coordinator, measured through Ray."""
    with connected(None, False):
        costs = tune_costs(record, folder, trials)
        start, call = probe()
    measured = replace(
        record.overheads,
        client_start=start,
        tune_trial=costs.trial,
        tune_epoch=costs.epoch,
        change=costs.change,
        call=call,
    )
    return replace(record, overheads=measured)


def main(
    trials: int = 24,
    epochs: int = 3,
    study: Annotated[Path | None, typer.Option(help="read this finished study instead of searching")] = None,
    out: Path = FILE,
) -> None:
    """Search the demo for real, or read such a search, and write down what happened."""
    with tempfile.TemporaryDirectory(prefix="tuner-bench-") as name:
        folder = Path(name)
        record = read_search(study or search(folder, trials, epochs))
        typer.echo(f"{len(record.trials)} trials read; now what stands between trials", err=True)
        measure(record, folder, trials=40).save(out)


if __name__ == "__main__":
    run(main)
