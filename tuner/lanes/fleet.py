"""Start and stop what a search needs on a Ray cluster: the coordinator and its lanes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from tuner.config import RunSettings
from tuner.errors import StudyError
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.lane import LaneConfig, host_lane
from tuner.lanes.memory import LEAN_MEMORY, set_lean_memory
from tuner.loopback import start_ray

# A fraction of the head node's own resource: keeps drivers, coordinator and trial clients off nodes that may go away.
HEAD_NODE = {"node:__internal_head__": 0.001}
# The embedded Ray moves only small dictionaries; its default store would reserve a third of the machine's memory.
LOCAL_OBJECT_STORE_BYTES = 200 * 1024**2
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class FleetOptions:
    """How many lanes, workers a lane, adapters a pack; None lets the cluster's resources decide."""

    lanes: int | None = None
    workers: int = 1
    pack: int = 1


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


@contextmanager
def connected(address: str | None, dashboard: bool) -> Iterator[str | None]:
    """Connect to a cluster, or start Ray inside this process. Yields the dashboard's URL, if any."""
    if ray.is_initialized():
        yield None
        return
    # Workers inherit these: no usage ping on the way up, no idle workers before anything is asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    if address is None:
        # One machine, ours until the search ends: nobody will preempt it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        options["runtime_env"] = {"env_vars": LEAN_MEMORY}
    set_lean_memory()
    if address is None:
        options |= {"include_dashboard": dashboard, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    try:
        context = ray.init(address, **options) if address is not None else start_ray(**options)
    except ConnectionError as error:
        raise StudyError(
            f"--address {address}: no Ray cluster answers there ({error}); start one with `ray up`"
        ) from None
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class FleetSize:
    """What a cluster gives the lanes of a study."""

    lanes: int
    threads: int  # CPU threads of one worker
    use_gpu: bool


def size_fleet(options: FleetOptions) -> FleetSize:
    """Fit the lanes to the cluster that is connected.

    Raises:
        StudyError: the cluster has too few resources for them.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    use_gpu = gpus > 0
    lanes = options.lanes or (max(1, gpus // options.workers) if use_gpu else 1)
    needed = lanes * options.workers
    if use_gpu and needed > gpus:
        raise StudyError(f"--lanes {lanes} with --workers {options.workers} need {needed} GPUs; there are {gpus}")
    if needed > cpus:
        raise StudyError(f"--lanes {lanes} with --workers {options.workers} need as many CPUs; there are {cpus}")
    return FleetSize(lanes, max(1, cpus // needed), use_gpu)


@contextmanager
def fleet(
    study: str,
    settings: RunSettings,
    run_dir: Path,
    prefix_root: Path,
    precision: str | None,
    options: FleetOptions,
    size: FleetSize,
) -> Iterator[Fleet]:
    """Start the lanes of a study and stop them at the end; they load while the driver goes on."""
    name = f"tuner-coordinator:{study}"
    actor: Any = ray.remote(Coordinator).options(
        name=name, num_cpus=0, max_concurrency=1000, max_restarts=-1, max_task_retries=-1, resources=HEAD_NODE
    )
    coordinator = actor.remote(precision)
    config = LaneConfig(
        lane="",
        coordinator=name,
        settings=settings,
        run_dir=str(run_dir.resolve()),
        prefix_root=str(prefix_root),
        capacity=options.pack,
        workers=options.workers,
        threads=size.threads,
        use_gpu=size.use_gpu,
    )
    # Our lanes report nothing through Ray Train, so its controllers need not look at their workers often.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    threads_of_lanes = [
        threading.Thread(target=host_lane, args=(replace(config, lane=f"tuner-lane-{study}-{index}"),), daemon=True)
        for index in range(size.lanes)
    ]
    for thread in threads_of_lanes:
        thread.start()
    try:
        yield Fleet(coordinator, name, size.lanes, options.pack)
    finally:
        ray.get(coordinator.stop.remote())
        deadline = time.monotonic() + STOP_SECONDS
        for thread in threads_of_lanes:
            thread.join(max(0.0, deadline - time.monotonic()))
        ray.kill(coordinator)
