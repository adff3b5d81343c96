"""Record a real search for `benchmarks.scale`: `python -m benchmarks.recording` writes `recorded_search.json` anew.

It searches the demo from the command line, as `make search` does, or reads a finished study (`--study`); then the same
Tune and the same coordinator run without training, to say what stands between trials (`overheads.py`).
"""

from __future__ import annotations

import json
import platform
import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks import run
from benchmarks.overheads import probe, tune_costs
from benchmarks.recorded import FILE, Overheads, RecordedSearch, RecordedTrial
from benchmarks.session import run_session, search_command
from tuner.config import EncoderRef, TrialConfig
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder
from tuner.lanes.fleet import connected
from tuner.records import FRONT_FILE, JOURNAL_FILE, STUDY_FILE, read_study
from tuner.space import SearchSpace

STUDY = "recorded"
FIGURES = 5  # significant, of measured numbers
UNKNOWN = Overheads(*(0.0,) * 7)


def search(folder: Path, trials: int, epochs: int) -> Path:
    """Search the demo; returns the study's folder."""
    options = ["--trials", str(trials), "--epochs", str(epochs), "--runs", str(folder), "--study", STUDY, "--json"]
    run_session(search_command(["search", *options]), folder / "search.log")
    return folder / STUDY


def read_trials(run_dir: Path) -> list[RecordedTrial]:
    """Configurations and epoch rows of the journal; every trial must have come to its end."""
    configs: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for line in (run_dir / JOURNAL_FILE).read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "trial":
            configs[event["trial"]], rows[event["trial"]] = event["config"], []
        elif event["event"] == "epoch":
            rows[event["trial"]].append({name: _rounded(value) for name, value in event["row"].items()})
    lengths = {len(each) for each in rows.values()}
    assert len(lengths) == 1, f"trials of {sorted(lengths)} epochs"
    return [RecordedTrial(TrialConfig.model_validate(configs[trial]), tuple(rows[trial])) for trial in configs]


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{FIGURES}g}")


def read_search(run_dir: Path) -> RecordedSearch:
    """A study that ran on one lane from beginning to end, with the overheads that its files show."""
    facts = read_study(run_dir)
    reference = EncoderRef.model_validate(facts["settings"]["encoder"])
    name = Path(reference.source).name
    spec = replace(inspect_encoder(reference), source=name, folder=Path(name))
    space = SearchSpace.from_dict(facts["space"], str(run_dir))
    made = {
        "command": f"tuner search --space {space.name} --trials {facts['trials']}",
        "created": facts["created"],
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, no GPU",
        "clips": facts["data"],
    }
    text_dim = Store.open(Path(facts["settings"]["store"])).text_dim
    record = RecordedSearch(made, space, spec, text_dim, tuple(read_trials(run_dir)), UNKNOWN)
    start, confirming = read_times(run_dir, facts["created"], record.trials[0].rows[0])
    points = len(json.loads((run_dir / FRONT_FILE).read_text(encoding="utf-8"))["points"])
    each = confirming / points / record.mean_seconds
    return replace(record, overheads=replace(UNKNOWN, lane_start=start, confirm_epochs=each))


def read_times(run_dir: Path, created: str, first: dict[str, float]) -> tuple[float, float]:
    """Seconds from the study's record to the first step of its first trial, and from the last trial to the front.

    The record is written again when the first epoch has been reported; the journal ends with the last trial.
    """
    changed = {name: (run_dir / name).stat().st_mtime for name in (STUDY_FILE, JOURNAL_FILE, FRONT_FILE)}
    trained = first["train_seconds"] + first["validation_seconds"]
    start = changed[STUDY_FILE] - datetime.fromisoformat(created).timestamp() - trained
    return start, changed[FRONT_FILE] - changed[JOURNAL_FILE]


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
