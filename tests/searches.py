"""Whole searches as a user starts them: `tuner search` in a process of its own, watched through its journal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import pyarrow.parquet as pq
from conftest import Tiny

STUDY = "study"
# Ray names a process after its actor's class, and while a method runs after its representation.
LANE_WORKER = re.compile(r"ray::(Lane\b|tuner-lane-)")
PATIENCE = 300.0  # seconds for anything that a search does, on a busy machine
# Prints what a driver has imported, after the command has ended as it would. A shell starts what runs in its background
# with SIGINT ignored, the tests themselves perhaps too.
SCRIPT = """
import json, signal, sys
from tuner.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    main()
finally:
    heavy = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
    print(json.dumps({"imported": heavy}), file=sys.stderr)
"""


@dataclass
class Runs:
    """A folder of studies, with a cache of its own, and drivers started on it one after another.

    Attributes:
        before: Python that each driver runs first.
    """

    folder: Path
    tiny: Tiny
    before: str = field(default="", kw_only=True)

    @property
    def study(self) -> Path:
        return self.folder / "runs" / STUDY

    def new(self, *options: object) -> list[object]:
        """Arguments of a new study, of which no trial is stopped: a few clips make any trial look hopeless."""
        data = ["--data", self.tiny.store_folder, "--batch-size", 12, "--precision", "fp32", "--stopping", "never"]
        return [*data, "--objective", "recall@1", "--objective", "trainable_parameters", "--study", STUDY, *options]

    @contextmanager
    def driver(self, *options: object) -> Iterator[Driver]:
        """A search in a process group of its own; whatever is left of it at the end is killed."""
        command = [
            sys.executable,
            "-c",
            self.before + SCRIPT,
            "search",
            "--runs",
            "runs",
            "--no-dashboard",
            *map(str, options),
        ]
        environment = {**os.environ, "TUNER_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        driver = Driver(process, self.study)
        try:
            yield driver
        finally:
            driver.kill()

    def finish(self, *options: object) -> Ended:
        """Run a search to its end."""
        with self.driver(*options) as driver:
            ended = driver.wait()
        assert ended.code == 0, ended
        return ended

    def journal(self) -> list[dict[str, Any]]:
        return read_journal(self.study)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """The study's trials, read as any Optuna program would."""
        study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{self.study / 'study.db'}")
        return study.trials

    def front(self) -> dict[str, Any]:
        front: dict[str, Any] = json.loads((self.study / "front.json").read_text())
        return front

    def states(self) -> dict[str, str]:
        """How each trial ended according to `trials.parquet`."""
        rows = pq.read_table(self.study / "trials.parquet").to_pylist()
        return {row["trial"]: row["state"] for row in rows}


@dataclass
class Ended:
    code: int
    out: str
    err: str


@dataclass
class Driver:
    """A running `tuner search`."""

    process: subprocess.Popen[str]
    study: Path

    def wait(self) -> Ended:
        out, err = self.process.communicate(timeout=PATIENCE)
        return Ended(self.process.returncode, out, err)

    def until(self, reached: Callable[[list[tuple[str, int]]], bool]) -> list[tuple[str, int]]:
        """Wait until the (trial, epoch) pairs in the journal satisfy `reached`; returns them."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            epochs = epochs_of(read_journal(self.study))
            if reached(epochs):
                return epochs
            time.sleep(0.05)
        raise AssertionError(f"the search did not get there: {self.process.poll()}, {read_journal(self.study)[-3:]}")

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def lane_worker(self) -> psutil.Process:
        """The process that trains: the only lane's only worker."""
        (worker,) = (p for p in self.descendants() if LANE_WORKER.match(" ".join(p.cmdline())))
        return worker

    def kill(self) -> None:
        """SIGKILL, like a power cut for the driver and Ray's daemons; its workers notice and end."""
        below = self.descendants()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        for pipe in (self.process.stdout, self.process.stderr):
            # Where the output goes into a file, there is none.
            if pipe is not None:
                pipe.close()
        _, left = psutil.wait_procs(below, timeout=30)
        for process in left:
            process.kill()


def read_journal(study: Path) -> list[dict[str, Any]]:
    """Whole lines only: a driver may be writing one now."""
    path = study / "journal.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def epochs_of(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(event["trial"], event["epoch"]) for event in events if event["event"] == "epoch_done"]
