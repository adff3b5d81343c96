"""Small embedded searches whose processes are killed at random moments and resumed until they end: what is lost?

Each search is run once undisturbed and then, as another study, with `kill -9` of one process after another: the driver,
Ray's servers and agents, and our own actors. After each end of a driver the study must open; in the end each trial
must be there once, with the metrics of the undisturbed run to the last bit.

What was killed is kept in `--folder`: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import optuna
import psutil
import typer

from benchmarks import run
from benchmarks.chaos import prepare
from benchmarks.session import search_command
from benchmarks.table import show
from tuner.study.folder import StudyFolder
from tuner.study.history import Trial
from tuner.study.journal import read_history

# Ray names a process after its actor's class, and while a method runs after its representation.
KINDS = {
    "driver": r"tuner\.cli search",
    "lane": r"ray::(Lane\b|tuner-lane-)",
    "Train controller": r"ray::TrainController",
    "coordinator": r"ray::(Coordinator|tuner-coordinator)",
    "trial client": r"ray::(TrialClient|tuner-trial-client)",
    "Train's other actors": r"ray::(SynchronizationActor|_AutoscalingCoordinatorActor)",
    "raylet": r"\S*/raylet/raylet ",
    "control service": r"\S*/gcs/gcs_server ",
    "dashboard agent": r"ray::DashboardAgent",
    "runtime environment agent": r"ray::RuntimeEnvAgent",
    "log monitor, autoscaler, dashboard": r"\S*python\S* .*/ray/\S*(log_monitor|monitor|dashboard)\.py ",
}
# From the moment at which a process is there, or from the kill before.
PAUSE_SECONDS = (0.2, 15.0)
LOOK_SECONDS = 0.5
# For the rest of a search that nobody disturbs any more.
PATIENCE = 600.0
# Our own ends: killed, Ray has gone, and Ray's C++ has ended the driver, whose child prints the sentence then.
KILLED, LOST, WORDLESS = -signal.SIGKILL, 2, 1
# For that child to print.
SENTENCE_SECONDS = 1.0
# What no kill is the cause of.
NOT_STARTED = "Ray did not start in two tries"
FOLDER = Path(tempfile.gettempdir()) / "tuner-kills"


@dataclass
class Kill:
    """One kill, as the state has it.

    Attributes:
        seconds: since the start of its driver.
        code: exit code of the driver, if it ended before the next kill.
        faults: what should not have happened after it.
    """

    study: str
    kind: str
    seconds: float
    code: int | None = None
    faults: list[str] = field(default_factory=list)


@dataclass
class State:
    """All kills so far, and faults of studies that have ended; one file, whole at every moment."""

    path: Path
    kills: list[Kill] = field(default_factory=list)
    ended: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        """What an earlier run has left."""
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kills": [], "ended": {}}
        return cls(path, [Kill(**kill) for kill in kept["kills"]], kept["ended"])

    def write(self) -> None:
        """Keep it."""
        staged = self.path.with_suffix(".tmp")
        kept = {"kills": [asdict(kill) for kill in self.kills], "ended": self.ended}
        staged.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        staged.replace(self.path)

    def rarest(self, dice: random.Random) -> str:
        """A kind that was killed least often."""
        counted = Counter(kill.kind for kill in self.kills)
        return min(KINDS, key=lambda kind: (counted[kind], dice.random()))


class Driver:
    """A running `tuner search`."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.log = folder / "driver.log"
        command = search_command(["search", *arguments, "--runs", str(folder / "runs")])
        environment = os.environ | {"TUNER_CACHE": str(folder / "cache")}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
            )
        self.started = time.monotonic()

    def wait(self, seconds: float) -> int | None:
        """The exit code, None if it still runs after that time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def wait_for(self, kind: str) -> int | None:
        """The exit code, None if a process of this kind runs before that."""
        while (code := self.wait(LOOK_SECONDS)) is None and kind not in self.processes():
            pass
        return code

    def processes(self) -> dict[str, psutil.Process]:
        """One process of each kind that runs."""
        found = {}
        with suppress(psutil.Error):
            us = psutil.Process(self.process.pid)
            for process in [us, *us.children(recursive=True)]:
                with suppress(psutil.Error):
                    title = " ".join(process.cmdline()) + " "
                    kinds = [kind for kind, named in KINDS.items() if re.match(named, title)]
                    found[kinds[0] if kinds else "driver" if process == us else ""] = process
        found.pop("", None)
        return found

    def end(self) -> None:
        """Leave nothing."""
        below = list(self.processes().values())
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for process in below:
            with suppress(psutil.Error):
                process.kill()


class Chaos:
    """The studies, one after another."""

    def __init__(self, folder: Path, options: list[str], state: State) -> None:
        self.folder, self.options, self.state = folder, options, state
        self.dice = random.Random(len(state.kills))

    def study(self, name: str) -> StudyFolder:
        """Its folder."""
        return StudyFolder(self.folder / "runs" / name)

    def undisturbed(self, seed: int) -> str:
        """Name of the search that nobody disturbs, run if it has not been."""
        name = f"calm-{seed}"
        while not self.study(name).front.exists():
            driver = Driver(self.folder, self._again(name) or self._new(name, seed))
            try:
                code = driver.wait(PATIENCE)
            finally:
                driver.end()
            said = driver.log.read_text(encoding="utf-8")
            if code != 0 and NOT_STARTED not in said:
                raise RuntimeError(f"{name}: {said[-2000:]}")
        return name

    def disturb(self, name: str, seed: int, kills: int) -> None:
        """Kill processes of one study until it ends, or until there have been so many kills; then let it end."""
        code, before = None, list[psutil.Process]()
        while code != 0:
            driver = Driver(self.folder, self._again(name) or self._new(name, seed))
            struck = len(self.state.kills)
            try:
                code, before = self._one_driver(driver, name, kills, before)
                time.sleep(SENTENCE_SECONDS)
            finally:
                driver.end()
            said = driver.log.read_text(encoding="utf-8", errors="replace")
            if len(self.state.kills) == struck and NOT_STARTED in said:
                typer.echo("Ray does not start on a machine as busy as this; once more", err=True)
            elif self.state.kills:
                self._judge(said, name, code)

    def _again(self, name: str) -> list[str]:
        return ["--resume", name] if self.study(name).record.exists() else []

    def _new(self, name: str, seed: int) -> list[str]:
        return ["--study", name, "--seed", str(seed), *self.options]

    def _one_driver(
        self, driver: Driver, name: str, kills: int, before: list[psutil.Process]
    ) -> tuple[int, list[psutil.Process]]:
        """Kill processes below one driver until it ends; its exit code, and what it may have left."""
        seen = list[psutil.Process]()
        while len(self.state.kills) < kills:
            kind = self.state.rarest(self.dice)
            code = driver.wait_for(kind)
            code = driver.wait(self.dice.uniform(*PAUSE_SECONDS)) if code is None else code
            if code is not None:
                return code, seen
            there = driver.processes()
            if "raylet" in there and any(process.is_running() for process in before):
                self.state.kills[-1].faults.append("the next search left processes of the one before")
                before = []
            seen = list(there.values())
            if kind in there:
                self._strike(driver, name, kind, there[kind])
        code = driver.wait(PATIENCE)
        if code is None:
            raise RuntimeError(f"{name} does not end: {driver.log.read_text(encoding='utf-8')[-2000:]}")
        return code, seen

    def _strike(self, driver: Driver, name: str, kind: str, process: psutil.Process) -> None:
        seconds = time.monotonic() - driver.started
        with suppress(psutil.NoSuchProcess):
            process.kill()
            self.state.kills.append(Kill(name, kind, round(seconds, 1)))
            self.state.write()
            typer.echo(f"{len(self.state.kills)}: {name}: {kind} after {seconds:.1f} s", err=True)

    def _judge(self, said: str, name: str, code: int) -> None:
        """Note how the driver ended after the last kill, and whether the study opens."""
        last = self.state.kills[-1]
        last.code = code
        sentences = [line for line in said.splitlines() if line.startswith("tuner: ")]
        if code not in (0, LOST, WORDLESS, KILLED) or (code == KILLED and last.kind != "driver"):
            last.faults.append(f"exit code {code}")
        # A driver that was killed before it had begun has nothing to resume.
        if (
            code in (LOST, WORDLESS, KILLED)
            and self.study(name).record.exists()
            and (len(sentences) != 1 or f"--resume {name}" not in sentences[0])
        ):
            last.faults.append(f"{len(sentences)} sentences")
        if "Traceback" in said:
            last.faults.append("traceback")
        if self.study(name).record.exists():
            report = search_command(["report", str(self.study(name).path), "--out", str(self.folder / "page.html")])
            if subprocess.run(report, capture_output=True, check=False).returncode != 0:
                last.faults.append("unreadable")
            read_history(self.study(name))
        if last.faults:
            (self.folder / f"fault-{len(self.state.kills)}.log").write_text(said, encoding="utf-8")
            typer.echo(f"fault: {last.faults}, exit code {code}; {said[-1500:]}", err=True)
        self.state.write()

    def compare(self, name: str, calm: str) -> None:
        """Note what differs from the undisturbed run."""
        expected = read_history(self.study(calm))[0].trials
        found = {trial.trial: trial for trial in read_history(self.study(name))[0].trials}
        lines = self.study(name).journal.read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        told = Counter((event["trial"], event["epoch"]) for event in events if event["event"] == "epoch_done")
        faults = [f"epoch told {count} times: {epoch}" for epoch, count in told.items() if count > 1]
        faults += [f"{trial}: not in the undisturbed run" for trial in found.keys() - {t.trial for t in expected}]
        for trial in expected:
            faults += _difference(trial, found.get(trial.trial))
        if (states := self._in_database(name)) != self._in_database(calm):
            faults.append(f"in the database: {states}")
        self.state.ended[name] = faults
        self.state.write()
        for fault in faults:
            typer.echo(f"fault: {name}: {fault}", err=True)

    def _in_database(self, name: str) -> list[str]:
        """States of the trials that were not failed draws."""
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{self.study(name).database}")
        return [trial.state.name for trial in study.trials if "config" in trial.user_attrs]


def _difference(expected: Trial, found: Trial | None) -> list[str]:
    if found is None:
        return [f"{expected.trial}: lost"]
    if found.state != expected.state:
        return [f"{expected.trial}: {found.state}, {found.reason}"]
    if found.config != expected.config:
        return [f"{expected.trial}: another configuration"]
    ours, theirs = (
        [(epoch.epoch, epoch.loss, epoch.metrics) for epoch in t.epochs.values()] for t in (found, expected)
    )
    return [] if sorted(ours, key=str) == sorted(theirs, key=str) else [f"{expected.trial}: other metrics"]


def show_kills(state: State) -> None:
    """Print what was killed and what became of it."""
    rows = []
    for kind in KINDS:
        kills = [kill for kill in state.kills if kill.kind == kind]
        codes = Counter(kill.code for kill in kills)
        faults = sum(bool(kill.faults) for kill in kills)
        rows.append((kind, str(len(kills)), str(codes[None] + codes[0]), str(codes[LOST]), str(faults)))
    title = "kill -9 of processes of an embedded search"
    show(title, ("process", "kills", "search went on", "ended with 2, resumed", "faults"), rows)
    typer.echo(f"{len(state.kills)} kills, {len(state.ended)} studies")
    for name, lost in state.ended.items():
        typer.echo(f"{name}: {'; '.join(lost) or 'each trial once, equal to the undisturbed run to the last bit'}")
    for number, kill in enumerate(state.kills, 1):
        if kill.faults:
            typer.echo(f"kill {number} ({kill.kind}): {'; '.join(kill.faults)}")


def main(
    folder: Path = FOLDER,
    store: Path | None = None,
    kills: int = 60,
    trials: int = 7,
    epochs: int = 3,
    seeds: int = 2,
) -> None:
    """Kill so many processes. `--store` takes a prepared one."""
    # Whoever stops this stops its search, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder.mkdir(parents=True, exist_ok=True)
    if store is None:
        store = folder / "store" if (folder / "store").exists() else prepare(folder, 48)
    options = ["--data", str(store.resolve()), "--batch-size", "12", "--precision", "fp32", "--lanes", "1"]
    options += ["--trials", str(trials), "--epochs", str(epochs)]
    state = State.read(folder / "kills.json")
    chaos = Chaos(folder, options, state)
    typer.echo(f"{platform.machine()}, {os.cpu_count()} cores, fp32, {trials} trials of {epochs} epochs")
    while len(state.kills) < kills or state.kills[-1].study not in state.ended:
        number = len(state.ended)
        calm = chaos.undisturbed(number % seeds)
        chaos.disturb(f"chaos-{number}", number % seeds, kills)
        chaos.compare(f"chaos-{number}", calm)
    show_kills(state)


if __name__ == "__main__":
    run(main)
