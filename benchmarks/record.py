"""Learning curves of random configurations, for `benchmarks.search_quality`: `python -m benchmarks.record`.

It prepares a share of the demo (800 training clips, all validation clips) and has `tuner search --sampler random
--stopping never` train configurations of the space `attention_only` to the end. The study stays in `--folder`: the
command may be stopped at any time and goes on where it was. Each run adds what is complete to
`recorded_curves.parquet`, a row per trial and epoch. Another `--seed` draws other configurations into the same table,
on whatever machine.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks import run
from benchmarks.session import search_command
from benchmarks.share import make_share
from tuner.data.cache import cache_root
from tuner.study.config import StudyRecord
from tuner.study.folder import StudyFolder
from tuner.study.history import Trial
from tuner.study.journal import read_history

FILE = Path(__file__).with_name("recorded_curves.parquet")
SHARE = {"train": 800, "validation": 520, "test": 100}
TEXT = ("study", "trial", "origin", "config", "event")
FIELDS: list[pa.Field[Any]] = [
    *(pa.field(name, pa.string()) for name in TEXT),
    pa.field("trainable_parameters", pa.int64()),
    pa.field("epoch", pa.int32()),
]
SCHEMA = pa.schema(FIELDS)


def read_curves(folder: StudyFolder) -> pa.Table:
    """Complete trials of a study, a row per epoch; `event` is the epoch's line of the journal.

    The table's metadata name the machine and the number format.
    """
    record = StudyRecord.read(folder)
    history, _ = read_history(folder)
    name = f"{record.study}-{record.seed}-{record.precision}"
    rows = [row for trial in history.trials if trial.state == "complete" for row in _rows(name, trial)]
    return pa.Table.from_pylist(rows, SCHEMA)


def _rows(study: str, trial: Trial) -> list[dict[str, object]]:
    head = {
        "study": study,
        "trial": trial.trial,
        "origin": trial.origin,
        "config": trial.config.model_dump_json(),
        "trainable_parameters": trial.parameters,
    }
    return [{**head, "epoch": number, "event": trial.epochs[number].to_json()} for number in sorted(trial.epochs)]


def merge(old: pa.Table | None, new: pa.Table) -> pa.Table:
    """Both, without what `old` has of the same studies."""
    if old is None:
        return new
    studies = set(new["study"].to_pylist())
    return pa.concat_tables([old.filter(pa.array([s not in studies for s in old["study"].to_pylist()])), new])


def _prepare(folder: Path) -> Path:
    store = folder / "store"
    if not store.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        share = make_share(folder, SHARE)
        encoders = ["--encoder", str(share.audio_encoder), "--text-encoder", str(share.text_encoder)]
        subprocess.run(search_command(["prepare", str(share.manifest), *encoders, "--out", str(store)]), check=True)
    return store


def main(
    trials: int = 120,
    epochs: int = 6,
    seed: int = 0,
    folder: Annotated[Path | None, typer.Option(help="keeps share and study; default: in the cache")] = None,
    out: Path = FILE,
) -> None:
    """Train configurations, and write down those that are complete."""
    folder = folder or cache_root() / "record"
    store, study = _prepare(folder), StudyFolder(folder / f"curves-{seed}")
    place = ["--runs", str(folder)]
    if study.record.is_file():
        command = ["search", "--resume", study.name, "--trials", str(trials), *place]
    else:
        plan = ["--trials", str(trials), "--epochs", str(epochs), "--seed", str(seed)]
        how = ["--sampler", "random", "--stopping", "never", "--study", study.name]
        command = ["search", "--space", "attention_only", "--data", str(store), *plan, *how, *place]
    try:
        subprocess.run(search_command(command), check=True)
    finally:
        table = merge(pq.read_table(out) if out.exists() else None, read_curves(study))
        made = {"machine": f"{platform.machine()}, {_cpu()}", "epochs": str(epochs)}
        pq.write_table(table.replace_schema_metadata(made), out, compression="zstd")
        typer.echo(f"{len(set(zip(*(table[n].to_pylist() for n in ('study', 'trial')), strict=True)))} trials in {out}")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    run(main)
