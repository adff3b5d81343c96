"""Where a lane is hosted: a thread of the driver that runs its Ray Train run and waits for its end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import ray

from tuner.lanes.lane import LaneConfig, lane_loop


def host_lane(config: LaneConfig, embedded: bool) -> None:
    """Run one lane until the coordinator says stop; a dead worker restarts the lane's worker group.

    Runs on a thread of the driver: Train's controller is a process of its own, and this only waits for it.

    Args:
        embedded: this process started Ray, and Ray ends with it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from tuner.lanes.named import NamedWorkers
    from tuner.lanes.trainer import LaneTrainer

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
            ray.get(coordinator.fatal.remote(f"{config.lane} ended: {' '.join(str(error).split())[:300]}"))
