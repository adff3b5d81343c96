"""Start and stop what a search needs on a Ray cluster: the coordinator and its lanes."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from tuner.config import Precision, RunSettings
from tuner.errors import ConfigError, Field, StudyError
from tuner.lanes.capacity import HEAD_NODE, Capacity, NodeGroup, count_cpus, count_gpus
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.hosting import host_lane
from tuner.lanes.lane import LaneConfig
from tuner.lanes.memory import LEAN_MEMORY, set_lean_memory
from tuner.lanes.messages import Confirmation, Muster
from tuner.loopback import embedded_ray, environment
from tuner.ray_cluster import joined_ray
from tuner.ray_start import NO_AUTO_INIT
from tuner.storage import Storage
from tuner.train.results import Candidate

# The embedded Ray moves only small dictionaries; its default store would reserve a third of the machine's memory.
LOCAL_OBJECT_STORE_BYTES = 200 * 1024**2
STOP_SECONDS = 20.0
# A cloud may take minutes to bring a machine; Ray Train would give up a lane after one minute and ask again.
CLOUD_START_SECONDS = "1800"


@dataclass(frozen=True)
class FleetOptions:
    """How many lanes, workers a lane, adapters a pack, GPUs in all; None lets the cluster's resources decide.

    Raises:
        ConfigError: lanes and workers ask for more GPUs than `max_gpus`.
    """

    lanes: int | None = None
    workers: int = 1
    pack: int = 1
    max_gpus: int | None = None

    def __post_init__(self) -> None:
        if self.max_gpus is not None and (self.lanes or 1) * self.workers > self.max_gpus:
            raise ConfigError(
                *self.asked,
                f" need {(self.lanes or 1) * self.workers} GPUs, more than ",
                Field("max_gpus"),
                f" {self.max_gpus}; lower them or raise it",
            )

    @property
    def asked(self) -> tuple[str | Field, ...]:
        """Lanes and workers as parts of a message."""
        workers = (Field("workers"), f" {self.workers}")
        return (Field("lanes"), f" {self.lanes} with ", *workers) if self.lanes else workers

    def lanes_on(self, places: int, trials: int) -> int:
        """Lanes that so many places for workers hold, not more than are allowed or have a trial to train."""
        allowed = places if self.max_gpus is None else min(places, self.max_gpus)
        return self.lanes or max(1, min(allowed // self.workers, math.ceil(trials / self.pack)))


@dataclass
class Fleet:
    """A running coordinator with its lanes."""

    coordinator: Any
    name: str
    lanes: int
    capacity: int

    @property
    def slots(self) -> int:
        """How many adapters train at once."""
        return self.lanes * self.capacity

    def confirm(self, trials: Sequence[Candidate], timeout: float) -> Confirmation:
        """As `Coordinator.confirm`."""
        answer: Confirmation = ray.get(self.coordinator.confirm.remote(trials, timeout))
        return answer

    def precision(self) -> Precision | None:
        """The number format that the first lane chose, or None before."""
        agreed: Precision | None = ray.get(self.coordinator.precision.remote())
        return agreed

    def muster(self) -> Muster:
        """Which lanes are up, and what they have to report."""
        muster: Muster = ray.get(self.coordinator.muster.remote())
        return muster

    def need(self, lanes: int) -> None:
        """As `Coordinator.need`; does not wait."""
        self.coordinator.need.remote(lanes)


@contextmanager
def connected(address: str | None, dashboard: bool) -> Iterator[str | None]:
    """Connect to a cluster, or start Ray inside this process. Yields the dashboard's URL, if any.

    Raises:
        ClusterError: Ray does not start, or the cluster cannot be joined.
    """
    if ray.is_initialized():
        yield None
        return
    # Workers inherit these: no usage ping on the way up, no idle workers before anything is asked for.
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}
    variables["RAY_TRAIN_METRICS_ENABLED"] = "0"
    if address is not None or dashboard:
        # Lanes are Train runs of Ray's dashboard then; it costs a process of its own.
        variables["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "1"
    if address is None:
        # One machine, ours until the search ends: nobody will preempt it.
        variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    else:
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = CLOUD_START_SECONDS
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        options["runtime_env"] = {"env_vars": LEAN_MEMORY | NO_AUTO_INIT}
    set_lean_memory()
    if address is None:
        options |= {"include_dashboard": dashboard, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    cluster = joined_ray(address, **options) if address is not None else embedded_ray(**options)
    with environment(variables), cluster as context:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None


@dataclass(frozen=True)
class FleetSize:
    """What a cluster gives the lanes of a study."""

    lanes: int
    threads: int  # CPUs reserved for one worker
    use_gpu: bool
    capacity: Capacity


def size_fleet(options: FleetOptions, trials: int, capacity: Capacity) -> FleetSize:
    """Fit the lanes to what the cluster has and its autoscaler may add.

    Args:
        trials: of the study; more lanes than that would have nothing to do.

    Raises:
        StudyError: the cluster can never have the resources for them.
    """
    use_gpu = capacity.gpus > 0
    if options.max_gpus is not None and not use_gpu:
        raise StudyError(
            Field("max_gpus"),
            f" {options.max_gpus}: there are no GPUs{_unread(capacity)}; drop it to train on CPUs",
        )
    places = capacity.places(use_gpu)
    lanes = options.lanes_on(places, trials) if use_gpu else options.lanes or 1
    needed = lanes * options.workers
    if needed > places:
        asked = replace(options, lanes=lanes).asked
        if use_gpu and needed > capacity.gpus:
            raise StudyError(*asked, f" need {needed} GPUs; {_supply(capacity, count_gpus)}")
        if needed > capacity.cpus:
            raise StudyError(*asked, f" need as many CPUs; {_supply(capacity, count_cpus)}")
        there = f"there are {places}{_unread(capacity)}"
        raise StudyError(*asked, f" need as many GPUs with a CPU on the same node; {there}")
    return FleetSize(lanes, capacity.threads(needed, use_gpu), use_gpu, capacity)


def _supply(capacity: Capacity, count: Callable[[Iterable[NodeGroup]], int]) -> str:
    have = count(capacity.present)
    if capacity.possible is None:
        return f"there are {have}{_unread(capacity)}"
    return f"the cluster has {have} and its autoscaler may add {max(0, count(capacity.possible) - have)}"


def _unread(capacity: Capacity) -> str:
    return f" ({capacity.unread})" if capacity.unread else ""


@contextmanager
def fleet(
    study: str,
    space: str,
    settings: RunSettings,
    run_dir: Path,
    precision: str | None,
    options: FleetOptions,
    size: FleetSize,
    storage: Storage | None = None,
    embedded: bool = False,
    rungs: tuple[int, ...] = (),
) -> Iterator[Fleet]:
    """Start the lanes of a study and stop them at the end; they load while the driver goes on."""
    name = f"tuner-coordinator:{study}"
    actor: Any = ray.remote(Coordinator).options(
        name=name, num_cpus=0, max_concurrency=1000, max_restarts=-1, max_task_retries=-1, resources=HEAD_NODE
    )
    coordinator = actor.remote(precision)
    config = LaneConfig(
        lane="",
        study=study,
        space=space,
        coordinator=name,
        settings=settings,
        run_dir=str(run_dir.resolve()),
        storage=storage,
        capacity=options.pack,
        workers=options.workers,
        threads=size.threads,
        use_gpu=size.use_gpu,
        rungs=rungs,
    )
    # Our lanes report nothing through Ray Train, so its controllers need not look at their workers often.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    hosts = {
        lane: threading.Thread(target=host_lane, args=(replace(config, lane=lane), embedded), daemon=True)
        for lane in (f"tuner-lane-{study}-{index}" for index in range(size.lanes))
    }
    for thread in hosts.values():
        thread.start()
    try:
        yield Fleet(coordinator, name, size.lanes, options.pack)
    finally:
        ray.get(coordinator.stop.remote())
        muster: Muster = ray.get(coordinator.muster.remote())
        deadline = time.monotonic() + STOP_SECONDS
        # A lane that still waits for its machine hears nothing; it goes with this process.
        for lane in muster.up:
            hosts[lane].join(max(0.0, deadline - time.monotonic()))
        ray.kill(coordinator)
