"""`make bench`: this search against the peer, both from the command line, on the same small share of the demo.

First `tuner prepare` and `tuner search` with four trials of one epoch, then the peer (`peer.py`) with the same LoRA
configurations. Trial 0 of every search of this project, the projection alone, is work that the peer is spared. Then
the levers of the training core on the same clips (`levers.py`). Caches of earlier runs are not used.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks import levers, run
from benchmarks.peak import show_peak
from benchmarks.session import SearchTimes, Session, run_session, search_command, search_times, show_search_times
from benchmarks.share import Share, make_share
from benchmarks.table import factor, show
from tuner.config import TrialConfig
from tuner.data.store import Store
from tuner.study.folder import StudyFolder
from tuner.study.journal import epoch_row, read_history

TRIALS = 3  # with LoRA, on both sides
BATCH_SIZE = 24  # a clip padded to 30 s takes the peer a third of a GB in fp32: more does not fit into a usual machine
TARGET = 30.0
STUDY = "bench"


@dataclass(frozen=True)
class Ours:
    """What this project did."""

    prepare: Session
    search: Session
    trials: list[dict[str, Any]]  # configuration and last epoch of each trial with LoRA

    @property
    def times(self) -> SearchTimes:
        """Where the time of the search went."""
        return search_times(self.search.events, self.search.seconds)

    @property
    def seconds(self) -> float:
        """From recordings to the confirmed front."""
        return self.prepare.seconds + self.search.seconds


def run_ours(share: Share, folder: Path, batch_size: int) -> Ours:
    """Prepare and search with fresh caches."""
    environment = {"TUNER_CACHE": str(folder / "cache")}
    store = str(folder / "store")
    encoders = ["--encoder", str(share.audio_encoder), "--text-encoder", str(share.text_encoder)]
    prepared = run_session(
        search_command(["prepare", str(share.manifest), *encoders, "--out", store]),
        folder / "prepare.log",
        environment,
    )
    options = ["--trials", str(TRIALS + 1), "--epochs", "1", "--batch-size", str(batch_size), "--json"]
    searched = run_session(
        search_command(["search", "--data", store, "--study", STUDY, "--runs", str(folder / "runs"), *options]),
        folder / "search.log",
        environment,
    )
    return Ours(prepared, searched, read_trials(folder / "runs" / STUDY))


def read_trials(run_dir: Path) -> list[dict[str, Any]]:
    """Configuration, size and last epoch of each trial with LoRA, from the study's journal."""
    history, _ = read_history(StudyFolder(run_dir))
    return [
        {
            "trial": trial.trial,
            "config": trial.config.model_dump(mode="json"),
            "trainable_parameters": trial.parameters,
            **epoch_row(trial.last),
        }
        for trial in history.trials
        if trial.config.lora and trial.last
    ]


def run_peer(share: Share, folder: Path, configs: list[dict[str, Any]], batch_size: int) -> Session:
    """The peer's search of these configurations."""
    file = folder / "configs.json"
    file.write_text(json.dumps(configs), encoding="utf-8")
    inputs = [str(path) for path in (share.manifest, share.audio_encoder, share.text_encoder, file)]
    command = [sys.executable, "-m", "benchmarks.peer", *inputs, "--batch-size", str(batch_size)]
    return run_session(command, folder / "peer.log")


def show_recalls(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> None:
    """Print what both sides found for each configuration."""
    rows = []
    for mine, theirs in zip(ours, peer, strict=True):
        lora = TrialConfig.model_validate(mine["config"]).lora
        assert lora is not None
        assert mine["trainable_parameters"] == theirs["trainable_parameters"], "the two trained different adapters"
        rows.append(
            (
                f"r={lora.rank} alpha={lora.alpha:g} dropout={lora.dropout:.2f} {','.join(lora.targets)}",
                f"{mine['trainable_parameters']:,}",
                f"{theirs['recall@10']:.3f}",
                f"{mine['recall@10']:.3f}",
                f"{theirs['loss']:.3f}",
                f"{mine['loss']:.3f}",
            )
        )
    columns = ("configuration", "parameters", "recall@10 peer", "recall@10 tuner", "loss peer", "loss tuner")
    show("what both trained, validation", columns, rows)


def show_times(ours: Ours, peer: Session, trials: list[dict[str, Any]]) -> None:
    """Print wall times and the factor, and where the time went on both sides."""
    peer_working = sum(trial["train_seconds"] + trial["validation_seconds"] for trial in trials)
    our_working = sum(trial["train_seconds"] + trial["validation_seconds"] for trial in ours.trials)
    peer_outside = (peer.seconds - peer_working) / len(trials)
    rows = (
        ("training and validation, trials with LoRA", peer_working, our_working),
        ("outside training, each trial", peer_outside, ours.times.outside_each),
        ("prepare (the peer does it in training, in each epoch)", None, ours.prepare.seconds),
        ("search", peer.seconds, ours.search.seconds),
        ("search and prepare", peer.seconds, ours.seconds),
    )
    cells = [
        (name, "" if slow is None else f"{slow:.1f}", f"{fast:.2f}", "" if slow is None else factor(slow, fast))
        for name, slow, fast in rows
    ]
    show("wall time, seconds", ("part", "peer", "tuner", "factor"), cells)
    show_search_times(ours.times, ours.search.seconds)
    typer.echo(
        f"search {factor(peer.seconds, ours.search.seconds)} faster than the peer, with preparation "
        f"{factor(peer.seconds, ours.seconds)}; the target is {TARGET:g}x"
    )


def main(train: int = 300, validation: int = 100, test: int = 100, quick: bool = False) -> None:
    """Compare; `--quick` on a handful of clips only shows that everything runs."""
    batch_size = BATCH_SIZE
    if quick:
        train, validation, test, batch_size = 16, 12, 12, 8
    with tempfile.TemporaryDirectory(prefix="tuner-bench-") as name:
        folder = Path(name)
        share = make_share(folder, {"train": train, "validation": validation, "test": test})
        threads = os.cpu_count() or 1
        torch.set_num_threads(threads)
        typer.echo(f"{platform.machine()}, {threads} cores; {train} training and {validation} validation clips")
        typer.echo(f"{TRIALS} LoRA configurations, 1 epoch, batches of {batch_size} clips")
        typer.echo("running tuner prepare and tuner search", err=True)
        ours = run_ours(share, folder, batch_size)
        typer.echo("running the peer", err=True)
        peer = run_peer(share, folder, [trial["config"] for trial in ours.trials], batch_size)
        trials = peer.events[-1].fields["trials"]
        show_times(ours, peer, trials)
        show_recalls(ours.trials, trials)
        show_peak("peak memory of `tuner search`", ours.search.peak)
        show_peak("peak memory of the peer", peer.peak)
        results = levers.measure(Store.open(folder / "store"), batch_size, lambda text: typer.echo(text, err=True))
        levers.show_levers(results, train)


if __name__ == "__main__":
    run(main)
