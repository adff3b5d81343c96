"""The trainer of a lane: Ray Train's data-parallel trainer without the helper actors that a lane has no use for."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# TorchTrainer is this class with a backend that makes the process group, and importing it brings torch into the
# driver and into Train's controller: 0.4 GB and seconds each. `tuner.lanes.group.join_group` makes the group instead.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LaneTrainer(DataParallelTrainer):
    """Starts no actor for datasets (a lane reads its store itself) and, in an embedded Ray, none that outlives it.

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
