"""Where a lane is hosted: a thread of the driver that runs its Ray Train run and waits for its end.

Train's internals that are used here, and by no other module: its workers' class is an attribute of the worker group,
and each lane has a controller, and so a process, of its own, so that a callback there can put a subclass in its place.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

# TorchTrainer is this class with a backend that makes the process group, and importing it brings torch into the
# driver and into Train's controller: 0.4 GB and seconds each. `tuner.lanes.group` makes the group instead.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tuner.lanes.lane import LaneConfig, lane_loop


def host_lane(config: LaneConfig, embedded: bool) -> None:
    """Run one lane until the coordinator says stop; a dead worker restarts the lane's worker group.

    Runs on a thread of the driver: Train's controller is a process of its own, and this only waits for it.

    Args:
        embedded: this process started Ray, and Ray ends with it.
    """
    resources = {"CPU": float(config.threads), **({"GPU": 1.0} if config.use_gpu else {})}
    trainer = LaneTrainer(
        lane_loop,
        embedded=embedded,
        train_loop_config={"lane": config},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=config.lane,
            storage_path=str(Path(config.run_dir).resolve() / "lanes"),
            failure_config=FailureConfig(max_failures=-1),
            # Train takes callbacks of its controller too, though its annotation does not say so.
            callbacks=[NamedWorkers(config.lane)],  # type: ignore[list-item]
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        # Otherwise the trials of this lane would wait for ever. When the cluster itself has gone, nobody waits.
        with suppress(ray.exceptions.RayError, ValueError):
            coordinator = ray.get_actor(config.coordinator)
            ray.get(coordinator.fatal.remote(f"{config.lane} ended: {_reason(config, error)}"))


def _reason(config: LaneConfig, error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        # Of all actors, this waits for the controller alone.
        again = f"tuner search --resume {config.study} --runs {Path(config.run_dir).parent}"
        return f"its Train controller was killed or crashed; nothing is lost, resume with `{again}`"
    return " ".join(str(error).split())[:300]


@dataclass
class NamedWorkers(ControllerCallback):
    """Give the workers of one Train run the class name `Lane` and the lane's name as their representation in Ray's
    dashboard, where every worker of every run would be an unnamed `RayTrainWorker`."""

    lane: str

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Called in the controller, before it starts any worker."""
        lane = self.lane

        class Lane(RayTrainWorker):
            def __repr__(self) -> str:
                return lane

        # As the dashboard shows the class; by default with all that it is defined in.
        Lane.__qualname__ = "Lane"
        WorkerGroup._worker_cls = Lane


class LaneTrainer(DataParallelTrainer):
    """Train's data-parallel trainer without the helper actors that a lane has no use for: none for datasets (a lane
    reads its store itself) and, in an embedded Ray, none that outlives it.

    Each such actor is a process: 0.12 GB, and half a second of a small machine while the lane starts.

    Args:
        embedded: Ray ends with this process, so that no placement group can be left behind; on a cluster the actor
            that removes it when the controller is killed stays.
    """

    def __init__(self, *arguments: Any, embedded: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._needless = (DatasetsCallback, PlacementGroupCleanerCallback) if embedded else (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, self._needless)]
