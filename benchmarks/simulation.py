"""A search on many GPUs in virtual time: the real coordinator, searcher, study and recorder, and lanes that only sleep.

What is real: `Coordinator` with its queue, leases and waits; `StudySearcher` over Optuna's study in SQLite; `Recorder`
with journal, table and JSON view; the selection of the front. Each of their calls in the driver is timed while it
runs, and the virtual clock moves by as much. What is not: training and nodes take the seconds that they are told,
recalls are the recorded ones, and Tune's loop is a queue with recorded costs, since its own cannot be given a clock.
"""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import optuna

from benchmarks.recorded import RecordedSearch
from benchmarks.virtual_time import VirtualLoop, own_clock, run_virtually
from tuner.config import TrialConfig
from tuner.lanes import coordinator as coordinator_module
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.lane import POLL_SECONDS
from tuner.lanes.trial_client import WAIT_SECONDS
from tuner.patience import Patience
from tuner.report.live import JsonView
from tuner.search.durable.database import PatientStorage
from tuner.search.front import select
from tuner.search.recorder import Recorder
from tuner.search.request import fixed_configurations
from tuner.search.searcher import FINISHED, StudySearcher
from tuner.study.events import SAMPLED, trial_id
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal
from tuner.study.objectives import DEFAULT_OBJECTIVES, choose_objectives
from tuner.study.points import Point, Scores
from tuner.train.results import Candidate, Measured

METRIC, PARAMETERS = DEFAULT_OBJECTIVES
OBJECTIVES = choose_objectives(DEFAULT_OBJECTIVES)
# Of the lane: a poll and a report. Of a trial that follows another: cancel, submit and next, and the poll that drops.
CALLS_OF_AN_EPOCH = 2
CALLS_OF_A_CHANGE = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Attributes:
        gpus: nodes with one GPU and one lane each.
        epoch_seconds: mean duration of an epoch with LoRA on one GPU; each configuration's own follows the recording.
        first_node: seconds until the first node has booted and installed everything; the others come evenly after it.
        last_node: seconds until the last one has.
        head_cores: processors that start the actors of trials.
    """

    gpus: int
    trials: int
    epoch_seconds: float
    first_node: float = 180.0
    last_node: float = 360.0
    head_cores: int = 4
    seed: int = 0


@dataclass
class LaneTimes:
    """When one lane was there, ready, had trained its last epoch and ended; seconds of training and of calls."""

    arrived: float
    ready: float
    worked: float = 0.0
    last: float = 0.0
    calls: float = 0.0
    left: float = 0.0


@dataclass
class Outcome:
    """What came of a simulated search, in virtual seconds; `driver` is by what the driver was doing."""

    lanes: list[LaneTimes]
    trials_end: float = 0.0
    end: float = 0.0
    driver: dict[str, float] = field(default_factory=dict)
    slowest_ask: float = 0.0
    values: list[tuple[float, float]] = field(default_factory=list)  # recall and parameters, in order of completion
    confirmed: int = 0


def simulate(plan: Plan, record: RecordedSearch, folder: Path, clock: Callable[[], float]) -> Outcome:
    """Run one search to its confirmed front.

    Args:
        folder: where the study's database and journal go.
        clock: `time.perf_counter` on a quiet machine; `time.process_time` leaves out waiting for disk and neighbours.
    """
    loop = VirtualLoop()
    with own_clock(loop, coordinator_module):
        return run_virtually(_Simulation(plan, record, folder, clock).run(), loop)


class _Simulation:
    def __init__(self, plan: Plan, record: RecordedSearch, folder: Path, clock: Callable[[], float]) -> None:
        self.plan, self.record, self.clock = plan, record, clock
        self.coordinator = Coordinator("bf16")
        self.events: asyncio.Queue[tuple[_Client, dict[str, Any]]] = asyncio.Queue()
        self.starting = asyncio.Semaphore(plan.head_cores)
        self.outcome = Outcome([])
        self.needed = plan.gpus
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study, patience = StudyFolder(folder), Patience(lambda text: None)
        self.study = optuna.create_study(
            storage=PatientStorage(study.database, patience),
            study_name="s",
            directions=[each.direction for each in OBJECTIVES],
        )
        self.searcher = StudySearcher(
            study=self.study,
            space=record.space,
            objectives=OBJECTIVES,
            known=record.known,
            fixed=fixed_configurations(),
            trials=plan.trials,
            extra={"epochs": record.epochs},
            seed=plan.seed,
        )
        self.journal = Journal(study, patience)
        # What the head's job prints for those who follow it.
        view = JsonView(io.StringIO())
        self.recorder = Recorder(self.journal, view, OBJECTIVES, settled=lambda: True)

    async def run(self) -> Outcome:
        plan, now = self.plan, asyncio.get_running_loop().time
        gap = (plan.last_node - plan.first_node) / max(1, plan.gpus - 1)
        self.lanes = [
            asyncio.create_task(self.lane(f"lane-{index}", plan.first_node + index * gap)) for index in range(plan.gpus)
        ]
        await self.drive()
        self.outcome.trials_end = now()
        selection = select(self.study, OBJECTIVES)
        self.outcome.confirmed = len(selection.trials)
        front = [Candidate(trial_id(trial.number), SAMPLED, TrialConfig()) for trial in selection.trials]
        while (await self.call(self.coordinator.confirm(front, WAIT_SECONDS))).points is None:
            pass
        await self.coordinator.stop()
        await asyncio.gather(*self.lanes)
        self.outcome.end = now()
        self.journal.close()
        return self.outcome

    async def call(self, answer: Awaitable[T]) -> T:
        """A call of the coordinator's actor."""
        await asyncio.sleep(self.record.overheads.call)
        return await answer

    async def busy(self, what: str, work: Callable[[], T], besides: float = 0.0) -> T:
        """Let the driver do something, which takes as long as it takes here, and `besides` in Tune."""
        started = self.clock()
        result = work()
        seconds = self.clock() - started
        self.outcome.driver[what] = self.outcome.driver.get(what, 0.0) + seconds
        self.outcome.driver["tune"] = self.outcome.driver.get("tune", 0.0) + besides
        if what == "ask":
            self.outcome.slowest_ask = max(self.outcome.slowest_ask, seconds)
        await asyncio.sleep(seconds + besides)
        return result

    async def drive(self) -> None:
        """Tune's loop: fill every free slot, then handle one event, and so on."""
        idle = [_Client(self) for _ in range(self.plan.gpus)]
        tune, running, names = self.record.overheads, 0, itertools.count()
        while True:
            while idle:
                name = f"tune-{next(names)}"
                suggestion = await self.busy("ask", partial(self.searcher.suggest, name), tune.tune_trial)
                if suggestion == FINISHED:
                    break
                client, running = idle.pop(0), running + 1
                client.begin(name, suggestion)
                await self.busy("record", partial(self.recorder.on_trial_start, 0, [], client.trial))
            if not running:
                return
            client, row = await self.events.get()
            await self.busy("record", partial(self._note, client, row), tune.tune_epoch)
            if not row["done"]:
                client.go_on.set()
                continue
            await self.busy("tell", partial(self.searcher.on_trial_complete, client.name, row))
            running, idle = running - 1, [*idle, client]
            self.outcome.values.append((row[METRIC], row[PARAMETERS]))
            if (remaining := self.plan.trials - len(self.outcome.values)) < self.plan.gpus:
                await self._let_go(remaining)

    async def _let_go(self, remaining: int) -> None:
        """As `LaneWatch` does: lanes that will have no trial to train nor to confirm end, and their machines can go."""
        needed = max(remaining, len(select(self.study, OBJECTIVES).trials))
        if needed < self.needed:
            self.needed = needed
            await self.coordinator.need(needed)

    def _note(self, client: _Client, row: dict[str, Any]) -> None:
        client.trial.last_result = row
        self.recorder.on_trial_result(0, [], client.trial, row)
        if row["done"]:
            self.recorder.on_trial_complete(0, [], client.trial)

    async def lane(self, name: str, arrival: float) -> None:
        """`LaneWorker.turn` without an encoder."""
        overheads = self.record.overheads
        loop = asyncio.get_running_loop()
        times = LaneTimes(arrival, arrival + overheads.lane_start)
        self.outcome.lanes.append(times)
        await asyncio.sleep(times.ready)
        await self.call(self.coordinator.register(name, "first", "bf16"))
        held: dict[str, list[dict[str, Any]]] = {}
        configs: dict[str, tuple[list[dict[str, Any]], float]] = {}
        while True:
            working = [trial for trial in held if len(held[trial]) < self.record.epochs]
            wait = 0.0 if working else POLL_SECONDS
            orders = await self.call(self.coordinator.poll(name, list(held), 1, wait))
            if orders.stop:
                times.left = loop.time()
                return
            for trial in orders.drop:
                held.pop(trial, None)
            if orders.confirm:
                await self._confirm(name, orders.confirm)
                continue
            for trial, config in orders.new:
                held[trial] = []
                configs[trial] = self.record.train(config)
                times.calls += overheads.change + CALLS_OF_A_CHANGE * overheads.call
            for trial in [trial for trial in held if len(held[trial]) < self.record.epochs]:
                rows, pace = configs[trial]
                seconds = pace * self.plan.epoch_seconds
                await asyncio.sleep(seconds)
                times.worked, times.last = times.worked + seconds, loop.time()
                held[trial].append(rows[len(held[trial])])
                await self.call(self.coordinator.report(name, trial, held[trial]))
                times.calls += CALLS_OF_AN_EPOCH * overheads.call

    async def _confirm(self, lane: str, candidate: Candidate) -> None:
        await asyncio.sleep(self.record.overheads.confirm_epochs * self.plan.epoch_seconds)
        point = Point(
            trial=candidate.trial,
            origin=candidate.origin,
            config=candidate.config,
            lora_parameters=0,
            trainable_parameters=0,
            validation=Scores(),
            on_front=True,
        )
        await self.call(self.coordinator.confirmed(lane, point.trial, Measured(point, {}, {}), None))


class _Client:
    """`TrialClient` without its process: one actor that serves one trial after another."""

    def __init__(self, simulation: _Simulation) -> None:
        self.simulation = simulation
        self.name = ""
        # The part of Tune's trial that the recorder uses.
        self.trial: Any = SimpleNamespace(config={}, last_result=None)
        self.go_on = asyncio.Event()
        self._started = False

    def begin(self, name: str, suggestion: dict[str, Any]) -> None:
        """Become this trial."""
        self.name, self.trial = name, SimpleNamespace(config=suggestion, last_result=None)
        self._task = asyncio.create_task(self._serve(suggestion))

    async def _serve(self, suggestion: dict[str, Any]) -> None:
        simulation, overheads = self.simulation, self.simulation.record.overheads
        coordinator = simulation.coordinator
        await self._be_ready(overheads.client_start, overheads.change)
        config = TrialConfig.model_validate(suggestion["config"])
        trial, epochs, cursor = suggestion["trial"], suggestion["epochs"], 0
        lease = None
        while True:
            if lease is None:
                lease = await simulation.call(coordinator.submit(trial, config))
            update = await simulation.call(coordinator.next(trial, lease, cursor, WAIT_SECONDS))
            if update.kind != "epoch":
                assert update.kind in ("wait", "unknown"), f"{trial}: {update}"
                lease = lease if update.kind == "wait" else None
                continue
            assert update.row is not None
            cursor += 1
            final = cursor == epochs
            if final:
                await simulation.call(coordinator.cancel(trial, lease))
            self.go_on.clear()
            simulation.events.put_nowait((self, {**update.row, "trial": trial, "final": final, "done": final}))
            if final:
                return
            await self.go_on.wait()

    async def _be_ready(self, start: float, change: float) -> None:
        if not self._started:
            async with self.simulation.starting:
                await asyncio.sleep(start)
            self._started = True
            return
        await asyncio.sleep(change)
