"""One search that is disturbed in every way there is: what is lost, and how long it takes to go on.

A local cluster of several nodes, real recordings, `tuner search` as a user starts it. Each fault waits for a new epoch;
then it strikes, and the time runs until the next epoch that was not known before. Beside it stands the usual time
between two epochs, of which a fault that costs nothing costs one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
import typer

from benchmarks import run
from benchmarks.local_cluster import COORDINATOR, LANE, LocalCluster, kill, local_cluster, until
from benchmarks.session import run_session, search_command
from benchmarks.share import make_share
from benchmarks.table import show
from tuner.data.store import Store
from tuner.study.events import EpochDone
from tuner.study.folder import StudyFolder
from tuner.study.journal import read_history

STUDY = "chaos"
FULL_SECONDS = 10.0
NOTICE_SECONDS = 120  # AWS's
# One for each that is lost before the head is restarted with as many, and one that stays.
NODES = 3
DISK_BYTES = 64 * 1024**2
# For anything that a search does between two faults, on a busy machine.
PATIENCE = 600.0


@dataclass
class Search:
    """The disturbed search: its cluster, its folder on a small disk, and the driver of the moment."""

    cluster: LocalCluster
    folder: Path
    options: list[str]
    driver: subprocess.Popen[str] | None = None
    told: dict[tuple[str, int], EpochDone] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """The study's."""
        return self.folder / "disk" / STUDY

    def start(self) -> None:
        """Start a driver: a new study, or what there is of it."""
        given = ["--resume", STUDY] if self.run_dir.exists() else ["--study", STUDY, *self.options]
        command = search_command(["search", *given, "--runs", str(self.folder / "disk")])
        environment = os.environ | {"TUNER_CACHE": str(self.folder / "cache")}
        with (self.folder / "search.log").open("a", encoding="utf-8") as log:
            self.driver = subprocess.Popen(
                [*command, "--lanes", "1", "--address", self.cluster.address],
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def wait(self) -> int:
        """The driver's exit code."""
        assert self.driver is not None
        return self.driver.wait(timeout=PATIENCE)

    def new_epoch(self) -> None:
        """Wait for an epoch that was not known before."""
        known = len(self.told)
        until(lambda: len(self.read()) > known, f"epoch {known + 1}; {self.log_tail()}", PATIENCE)

    def read(self) -> dict[tuple[str, int], EpochDone]:
        """Epochs of the journal by trial and number, as they were first told; a driver may be writing there."""
        history, _ = read_history(StudyFolder(self.run_dir))
        for trial in history.trials:
            for number, epoch in trial.epochs.items():
                self.told.setdefault((trial.trial, number), epoch)
        return self.told

    def log_tail(self) -> str:
        """The last lines that drivers have written."""
        path = self.folder / "search.log"
        return " | ".join(path.read_text(encoding="utf-8").splitlines()[-5:]) if path.exists() else ""


# The faults


def kill_worker(search: Search) -> None:
    """kill -9 of the process that trains."""
    kill(list(search.cluster.actors(LANE)))


def kill_coordinator(search: Search) -> None:
    """kill -9 of the coordinator."""
    kill(list(search.cluster.actors(COORDINATOR)))


def kill_node(search: Search) -> None:
    """kill -9 of the lane's raylet and of all it runs."""
    search.cluster.kill_node(search.cluster.lane_node())


def drain_node(search: Search) -> None:
    """What the watcher of a spot machine does at its notice; the machine goes when its lane has left."""
    node = search.cluster.lane_node()
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", search.cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
    command += ["--deadline-remaining-seconds", str(NOTICE_SECONDS)]
    subprocess.run(command, check=True, capture_output=True)
    until(lambda: search.cluster.lane_node() not in (node, None), "a lane on another node", PATIENCE)
    search.cluster.kill_node(node)


def fill_disk(search: Search) -> None:
    """The disk of the runs is full for some seconds."""
    ballast = search.folder / "disk" / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0")
    time.sleep(FULL_SECONDS)
    ballast.unlink()


def kill_driver(search: Search) -> None:
    """kill -9 of the driver, then `tuner search --resume`."""
    assert search.driver is not None
    os.killpg(search.driver.pid, signal.SIGKILL)
    search.wait()
    search.start()


def restart_head(search: Search) -> None:
    """kill -9 of the head's control service and raylet; once the driver has ended by itself, a new cluster at the same
    address, and `tuner search --resume`."""
    search.cluster.kill_head()
    code = search.wait()
    assert code == 2, f"the driver ended with {code}: {search.log_tail()}"
    assert "the Ray cluster has gone; nothing is lost" in search.log_tail()
    search.cluster.stop()
    search.cluster.start(NODES)
    search.start()


FAULTS: dict[str, Callable[[Search], None]] = {
    "worker killed": kill_worker,
    "coordinator killed": kill_coordinator,
    "node killed": kill_node,
    "node drained, as by a spot notice": drain_node,
    f"disk full for {FULL_SECONDS:.0f} s": fill_disk,
    "driver killed, --resume": kill_driver,
    "head killed and restarted, --resume": restart_head,
}


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at `folder`, so that filling it fills nothing else; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disturb(search: Search) -> tuple[dict[str, float], list[float]]:
    """Seconds from each fault to the next new epoch, and between epochs that nothing disturbed."""
    lost: dict[str, float] = {}
    usual: list[float] = []
    search.start()
    search.new_epoch()
    for name, strike in FAULTS.items():
        typer.echo(f"{name}; {len(search.told)} epochs so far", err=True)
        # The first one after a fault ends an epoch that was begun before it, or in it.
        search.new_epoch()
        started = time.perf_counter()
        search.new_epoch()
        usual.append(time.perf_counter() - started)
        started = time.perf_counter()
        strike(search)
        search.new_epoch()
        lost[name] = time.perf_counter() - started
        typer.echo(f"the next epoch came after {lost[name]:.1f} s", err=True)
    return lost, usual


def trained_again(search: Search) -> int:
    """Epochs that had been told and were trained once more: what their checkpoint remembers of them is not the same."""
    again = 0
    for (trial, number), epoch in search.read().items():
        checkpoint = torch.load(StudyFolder(search.run_dir).checkpoint(trial), weights_only=True)
        again += checkpoint["history"][number - 1]["train_seconds"] != epoch.train_seconds
    return again


def show_faults(search: Search, lost: dict[str, float], usual: list[float], trials: int) -> None:
    """Print what was injected and what it cost."""
    states = {row["trial"]: row["state"] for row in pq.read_table(search.run_dir / "trials.parquet").to_pylist()}
    complete = sum(state == "complete" for state in states.values())
    between = statistics.median(usual)
    rows = [(name, "1", f"{seconds:.1f}", f"{seconds - between:.1f}") for name, seconds in lost.items()]
    show(
        "faults injected into one search",
        ("fault", "times", "seconds to the next new epoch", "seconds lost"),
        [*rows, ("none", str(len(usual)), f"{between:.1f}", "")],
    )
    typer.echo(f"trials lost: {trials - complete} of {trials}")
    typer.echo(f"epochs told: {len(search.read())}, of these trained again after a fault: {trained_again(search)}")


def prepare(folder: Path, train: int) -> Path:
    """A store of so many training clips of the demo."""
    share = make_share(folder, {"train": train, "validation": 24, "test": 24})
    encoders = ["--encoder", str(share.audio_encoder), "--text-encoder", str(share.text_encoder)]
    store = folder / "store"
    command = search_command(["prepare", str(share.manifest), *encoders, "--out", str(store)])
    run_session(command, folder / "prepare.log")
    return store


def main(store: Path | None = None, train: int = 96, trials: int = 5, epochs: int = 8) -> None:
    """Disturb one search once in each way; it must have epochs enough for that. `--store` takes a prepared one."""
    with tempfile.TemporaryDirectory(prefix="tuner-") as name:
        folder = Path(name)
        store = store or prepare(folder, train)
        clips = len(Store.open(store).split("train"))
        typer.echo(f"{platform.machine()}, {os.cpu_count()} cores; {clips} training clips, {trials} x {epochs} epochs")
        options = ["--data", str(store.resolve()), "--batch-size", "24"]
        options += ["--trials", str(trials), "--epochs", str(epochs)]
        with small_disk(folder / "disk"), local_cluster(NODES) as cluster:
            search = Search(cluster, folder, options)
            try:
                lost, usual = disturb(search)
                code = search.wait()
                show_faults(search, lost, usual, trials)
                if code != 0:
                    raise RuntimeError(f"the search ended with {code}: {search.log_tail()}")
            finally:
                if search.driver is not None and search.driver.poll() is None:
                    os.killpg(search.driver.pid, signal.SIGKILL)


if __name__ == "__main__":
    run(main)
