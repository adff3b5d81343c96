"""What stands between trials, through real Ray and real Tune: lanes that train nothing, and everything else as it is.

The driver's own time is that of its thread on a processor, so that neighbours on the machine do not count; what is
left of the time on the clock is waiting for other processes, and neighbours make it longer.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from benchmarks.recorded import RecordedSearch
from tuner.config import EncoderRef, RunSettings, TrialConfig
from tuner.lanes.capacity import HEAD_NODE, read_capacity
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.fleet import Fleet, FleetSize
from tuner.lanes.lane import POLL_SECONDS
from tuner.lanes.trial_client import WAIT_SECONDS
from tuner.patience import Patience
from tuner.report.live import JsonView
from tuner.search.driver import _Search
from tuner.search.lane_watch import LaneWatch
from tuner.search.recorder import Recorder
from tuner.search.request import SearchRequest
from tuner.search.searcher import StudySearcher
from tuner.search.stopping import NeverStop
from tuner.study.config import DataFacts, EncoderFacts, StudyRecord
from tuner.study.events import Message
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal

CALLS = 200
MEASURED = (
    (StudySearcher, "suggest"),
    (StudySearcher, "on_trial_complete"),
    (Recorder, "on_trial_start"),
    (Recorder, "on_trial_result"),
    (Recorder, "on_trial_complete"),
)
MEASURED_NAMES = [f"{owner.__name__}.{name}" for owner, name in MEASURED]


@dataclass(frozen=True)
class DriverTimes:
    """Seconds of one search without training: on the clock, and of the driver's thread on a processor.

    `own` are the seconds of searcher and recorder, by method; the rest of `thread` is Tune's.
    """

    trials: int
    epochs: int
    wall: float
    thread: float
    own: dict[str, float]

    @property
    def tune(self) -> float:
        """The driver's seconds in Tune itself."""
        return self.thread - sum(self.own.values())


class IdleLanes:
    """Lanes that report recorded rows at once, all in one process."""

    def __init__(self, coordinator: str, record: RecordedSearch, epochs: int) -> None:
        self.coordinator = ray.get_actor(coordinator)
        self.rows = [record.trials[0].rows[0] | {"epoch": epoch + 1} for epoch in range(epochs)]

    async def run(self, lanes: int) -> None:
        """Serve until the coordinator says stop."""
        await asyncio.gather(*(self._serve(f"lane-{index}") for index in range(lanes)))

    async def _serve(self, lane: str) -> None:
        tell: Any = self.coordinator
        await tell.register.remote(lane, "first", "bf16")
        held: dict[str, int] = {}
        while True:
            behind = [trial for trial, epoch in held.items() if epoch < len(self.rows)]
            orders = await tell.poll.remote(lane, list(held), 1, 0.0 if behind else POLL_SECONDS)
            if orders.stop:
                return
            if orders.register:
                await tell.register.remote(lane, "first", "bf16")
            for trial in orders.drop:
                held.pop(trial, None)
            held |= {trial: 0 for trial, _ in orders.new}
            for trial in [trial for trial, epoch in held.items() if epoch < len(self.rows)]:
                held[trial] += 1
                await tell.report.remote(lane, trial, self.rows[: held[trial]])


class Clients:
    """Trials without Tune, all in one process: each takes the next number until there are none."""

    def __init__(self, coordinator: str, trials: int, epochs: int) -> None:
        self.coordinator = ray.get_actor(coordinator)
        self.left, self.epochs = list(range(trials)), epochs

    async def run(self, clients: int) -> float:
        """Seconds until all trials have been served by so many clients side by side."""
        started = time.perf_counter()
        await asyncio.gather(*(self._serve() for _ in range(clients)))
        return time.perf_counter() - started

    async def _serve(self) -> None:
        ask: Any = self.coordinator
        while self.left:
            trial = f"t{self.left.pop():04d}"
            lease, cursor = await ask.submit.remote(trial, TrialConfig()), 0
            while cursor < self.epochs:
                update = await ask.next.remote(trial, lease, cursor, WAIT_SECONDS)
                cursor += update.kind == "epoch"
            await ask.cancel.remote(trial, lease)


class Probe:
    """A process like that of a trial, asked what it took to start and what a call takes from it."""

    def start_seconds(self) -> float:
        """Processor seconds of this process so far, with the imports of a trial."""
        import tuner.lanes.trial_client  # noqa: F401

        return time.process_time()

    def call_seconds(self, coordinator: str) -> float:
        """Median seconds of a call of the coordinator."""
        actor: Any = ray.get_actor(coordinator)
        seconds = []
        for _ in range(CALLS):
            started = time.perf_counter()
            ray.get(actor.precision.remote())
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[CALLS // 2]


def hosted(kind: type[Any], *arguments: Any) -> Any:
    """An actor in a process of its own, which needs no CPU to be free."""
    actor: Any = ray.remote(kind)
    return actor.options(num_cpus=0).remote(*arguments)


@contextmanager
def hosted_coordinator(name: str) -> Iterator[Any]:
    """A coordinator as `tuner.lanes.fleet` hosts it; told to stop at the end."""
    host: Any = ray.remote(Coordinator)
    coordinator = host.options(name=name, num_cpus=0, max_concurrency=1000, resources=HEAD_NODE).remote("bf16")
    try:
        yield coordinator
    finally:
        ray.get(coordinator.stop.remote())
        ray.kill(coordinator)


def run_without_training(record: RecordedSearch, path: Path, trials: int, epochs: int, lanes: int = 1) -> DriverTimes:
    """One search of `tuner.search.driver` whose lanes train nothing. Ray must be up."""
    name, folder = f"tuner-coordinator:{path.name}", StudyFolder(path)
    path.mkdir()
    study = empty_study(record, folder, trials, epochs)
    view = JsonView(io.StringIO())
    patience = Patience(lambda text: view.show(Message(text=text)))
    own = dict.fromkeys(MEASURED_NAMES, 0.0)
    with hosted_coordinator(name) as coordinator, closing(Journal(folder, patience)) as journal:
        serving = hosted(IdleLanes, name, record, epochs)
        done = serving.run.remote(lanes)
        size, lanes_up = FleetSize(lanes, 1, False, read_capacity()), Fleet(coordinator, name, lanes, 1)
        request = SearchRequest(study, folder)
        search = _Search(request, study, journal, view, record.known, size, (), patience, NeverStop())
        with timed(own):
            started, thread = time.perf_counter(), time.thread_time()
            database = search._open_study()
            watch = LaneWatch(lanes_up, size, 1, view)
            search._tune(database, search._searcher(database, lanes_up), lanes_up, watch)
            times = DriverTimes(trials, epochs, time.perf_counter() - started, time.thread_time() - thread, own)
        ray.get(coordinator.stop.remote())
        ray.get(done)
        ray.kill(serving)
    return times


def empty_study(record: RecordedSearch, folder: StudyFolder, trials: int, epochs: int) -> StudyRecord:
    """The record of a study of the recorded search's encoder and space, whose data nobody reads."""
    spec = record.spec
    return StudyRecord(
        study=folder.name,
        space=record.space,
        settings=RunSettings(store=str(folder.path), encoder=EncoderRef(source=spec.source), epochs=epochs),
        trials=trials,
        encoder=EncoderFacts(
            family=spec.family, source=spec.source, num_layers=spec.num_layers, hidden_size=spec.hidden_size
        ),
        data=DataFacts(train=0, validation=0, test=0, captions=0),
        created=datetime.now(UTC),
        precision="bf16",
    )


@contextmanager
def timed(own: dict[str, float]) -> Iterator[None]:
    """Add up the thread's seconds in each measured method."""

    def wrapped(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return method(*arguments, **named)
            finally:
                own[name] += time.thread_time() - started

        return call

    patches = [
        patch.object(owner, name, wrapped(getattr(owner, name), f"{owner.__name__}.{name}")) for owner, name in MEASURED
    ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def coordinator_rate(record: RecordedSearch, side_by_side: int, trials: int, epochs: int) -> float:
    """Epochs a second that pass through the coordinator's actor, with so many lanes and trials at once. Needs Ray."""
    name = f"tuner-coordinator:rate-{side_by_side}"
    with hosted_coordinator(name) as coordinator:
        serving = hosted(IdleLanes, name, record, epochs)
        done = serving.run.remote(side_by_side)
        clients = hosted(Clients, name, trials, epochs)
        seconds: float = ray.get(clients.run.remote(side_by_side))
        ray.get(coordinator.stop.remote())
        ray.get(done)
        for actor in (serving, clients):
            ray.kill(actor)
    return trials * epochs / seconds


def probe() -> tuple[float, float]:
    """Processor seconds to start a trial's actor, and seconds of a call of the coordinator. Ray must be up."""
    name = "tuner-coordinator:probe"
    with hosted_coordinator(name):
        actor = hosted(Probe)
        return ray.get(actor.start_seconds.remote()), ray.get(actor.call_seconds.remote(name))


@dataclass(frozen=True)
class TuneCosts:
    """What one more trial and one more epoch cost, in seconds."""

    trial: float  # the driver's, in Tune
    epoch: float
    change: float  # on the clock and not the driver's, from a trial to the next one in its lane


def tune_costs(record: RecordedSearch, folder: Path, trials: int = 40, epochs: int = 6) -> TuneCosts:
    """Three searches that differ by trials or by epochs, so that what all of them do once falls out. Ray must be up."""
    run_without_training(record, folder / "warm", 2, 1)  # imports
    few = run_without_training(record, folder / "few", 5, 1)
    more = run_without_training(record, folder / "more", trials, 1)
    longer = run_without_training(record, folder / "longer", trials, epochs)
    epoch = (longer.tune - more.tune) / (trials * (epochs - 1))
    added = trials - few.trials
    trial = (more.tune - few.tune) / added - epoch
    change = (more.wall - few.wall - (more.thread - few.thread)) / added
    return TuneCosts(trial, epoch, change)
