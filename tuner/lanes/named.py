"""Lanes by name in Ray's dashboard: Ray Train starts every worker of every run as an unnamed `RayTrainWorker`.

The class of Train's workers is an attribute of its worker group, and each lane has a controller, hence a process, of
its own: a callback there puts a subclass in its place whose name and representation the dashboard shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup


@dataclass
class NamedWorkers(ControllerCallback):
    """Give the workers of one Train run the class name `Lane` and the lane's name as their representation."""

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
