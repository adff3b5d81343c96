"""A lane: one long-lived Ray Train run whose workers loaded the encoder once and train what the coordinator sends.

`lane_loop` is the train function. Rank 0 alone talks to the coordinator and writes checkpoints; what it decides is
broadcast, so all workers of the lane hold the same pack.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tuner.config import RunSettings, TrialConfig
from tuner.errors import TrialFailed, TunerError
from tuner.lanes.coordinator import Orders

POLL_SECONDS = 5.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaneConfig:
    """What the host passes to the workers of one lane."""

    lane: str
    coordinator: str  # actor name
    settings: RunSettings
    run_dir: str  # checkpoints/<trial>.pt live below it
    prefix_root: str
    capacity: int  # adapters in a pack
    workers: int
    threads: int  # CPU threads of one worker
    use_gpu: bool


def host_lane(config: LaneConfig) -> None:
    """Run one lane until the coordinator says stop; a dead worker restarts the lane's worker group.

    Runs on a thread of the driver: Train's controller is a process of its own, and this only waits for it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    # TorchTrainer is this class with a backend that makes the process group, and importing it brings torch into
    # this process and into Train's controller: 0.4 GB and seconds each. `join_group` makes the group instead.
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    resources = {"CPU": float(config.threads), **({"GPU": 1.0} if config.use_gpu else {})}
    trainer = DataParallelTrainer(
        lane_loop,
        train_loop_config={"lane": config},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=config.lane,
            storage_path=str(Path(config.run_dir).resolve() / "lanes"),
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        # Otherwise the trials of this lane would wait for ever. When the cluster itself has gone, nobody waits.
        with suppress(ray.exceptions.RayError, ValueError):
            coordinator = ray.get_actor(config.coordinator)
            ray.get(coordinator.fatal.remote(f"{config.lane} ended: {' '.join(str(error).split())[:300]}"))


def join_group(rank: int, world: int, use_gpu: bool) -> None:
    """Make the process group of a lane's workers; rank 0 says where they meet. One worker needs none."""
    if world == 1:
        return
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero
    from ray.util import get_node_ip_address

    port = 0
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    here = get_node_ip_address()  # type: ignore[no-untyped-call]
    address, port = broadcast_from_rank_zero((here, port))
    dist.init_process_group(
        "nccl" if use_gpu else "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=world
    )


def lane_loop(arguments: dict[str, Any]) -> None:
    """The train function of every worker."""
    config: LaneConfig = arguments["lane"]
    worker = LaneWorker(config)
    try:
        worker.load()
    except (TunerError, ImportError) as error:
        worker.tell("fatal", str(error))
        return
    while worker.turn():
        pass


class LaneWorker:
    """One worker of a lane."""

    def __init__(self, config: LaneConfig) -> None:
        import ray.train
        import torch

        self.config = config
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.coordinator = ray.get_actor(config.coordinator)
        self.attempt = uuid.uuid4().hex
        torch.set_num_threads(config.threads)
        join_group(self.rank, self.world, config.use_gpu)

    def load(self) -> None:
        """Load encoder, store and text embeddings, and agree with the other lanes on the number format."""
        from ray.train.torch import get_device

        from tuner.data.store import Store
        from tuner.encoders.registry import inspect_encoder, load_encoder
        from tuner.train.pack import Pack, PackContext
        from tuner.train.precision import dtype_of, measured_precision
        from tuner.train.workers import Workers

        settings, device = self.config.settings, get_device()
        wanted = settings.precision if settings.precision != "auto" else measured_precision(device)
        agreed = self.precision = self.broadcast(self.tell("register", self.attempt, wanted))
        encoder = load_encoder(inspect_encoder(settings.encoder), dtype_of(agreed), str(device))
        context = PackContext(
            encoder=encoder,
            store=Store.open(Path(settings.store)),
            settings=settings,
            workers=Workers(self.rank, self.world),
            prefix_root=Path(self.config.prefix_root),
        )
        self.pack = Pack(context)

    def turn(self) -> bool:
        """Take orders, then train one epoch of the members that are least far. False when told to stop."""
        orders: Orders = self.broadcast(self._poll())
        if orders.stop:
            return False
        for trial in orders.drop:
            self.pack.detach(trial)
        if orders.confirm:
            self._confirm(orders.confirm)
            return True
        for trial, values in orders.new:
            self._attach(trial, TrialConfig.model_validate(values))
        epochs = self.config.settings.epochs
        behind = {trial: m.epoch for trial, m in self.pack.members.items() if m.epoch < epochs}
        if behind:
            first = min(behind.values())
            self._epoch([trial for trial, epoch in behind.items() if epoch == first])
        return True

    def _poll(self) -> Orders | None:
        """Ask for orders; with nothing to train, the coordinator answers when there is something new."""
        working = any(member.epoch < self.config.settings.epochs for member in self.pack.members.values())
        wait = 0.0 if working else POLL_SECONDS
        orders: Orders | None = self.tell("poll", list(self.pack.members), self.config.capacity, wait)
        return orders

    def _attach(self, trial: str, config: TrialConfig) -> None:
        if trial in self.pack.members:
            self.pack.detach(trial)
        try:
            member = self.pack.attach(trial, config, self._checkpoint(trial))
        except TunerError as error:
            self.tell("fail", trial, str(error))
            return
        if member.history:
            self.tell("report", trial, member.history)

    def _epoch(self, trials: list[str]) -> None:
        try:
            rows = self.pack.train_epoch(trials)
        except RuntimeError as error:
            rows = dict.fromkeys(trials, TrialFailed(_reason(error)))
        for trial in trials:
            row = rows[trial]
            if isinstance(row, TrialFailed):
                self._give_up(trial, str(row))
            else:
                self._finish_epoch(trial, row)

    def _finish_epoch(self, trial: str, row: dict[str, float]) -> None:
        started = time.perf_counter()
        try:
            metrics = self.pack.validate(trial).metrics()
        except RuntimeError as error:
            self._give_up(trial, _reason(error))
            return
        member = self.pack.members[trial]
        counts = {
            "lora_parameters": member.placement.lora_parameters if member.placement else 0,
            "trainable_parameters": member.trainable_parameters,
        }
        seconds = {"validation_seconds": time.perf_counter() - started}
        warning = {"warning": member.warning} if member.warning else {}
        member.history.append({**row, **seconds, **counts, **metrics, **warning})
        if self.rank == 0:
            path = self._checkpoint(trial)
            try:
                member.save(path)
            except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
                self.tell("fatal", f"{path}: the checkpoint cannot be written ({_reason(error)}); free disk space")
                return
        self.tell("report", trial, member.history)

    def _confirm(self, plan: dict[str, Any]) -> None:
        """Rank 0 measures the front; the other workers of the lane wait at the next broadcast."""
        from tuner.train.confirm import confirm_trials

        for trial in list(self.pack.members):
            self.pack.detach(trial)
        if self.rank != 0:
            return
        run_dir = Path(self.config.run_dir)
        try:
            points = confirm_trials(self.pack, plan["trials"], plan["baseline"], run_dir, self.precision)
        except (TunerError, RuntimeError) as error:
            self.tell("confirmed", None, str(error) if isinstance(error, TunerError) else _reason(error))
            return
        self.tell("confirmed", points, None)

    def _give_up(self, trial: str, reason: str) -> None:
        logger.warning("%s: %s", trial, reason)
        self.pack.detach(trial)
        self.tell("fail", trial, reason)

    def _checkpoint(self, trial: str) -> Path:
        from tuner.train.member import checkpoint_path

        return checkpoint_path(Path(self.config.run_dir), trial)

    def tell(self, method: str, *arguments: Any) -> Any:
        """Call the coordinator from rank 0; the other ranks get None."""
        if self.rank != 0:
            return None
        names = () if method == "fatal" else (self.config.lane,)
        return ray.get(getattr(self.coordinator, method).remote(*names, *arguments))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def _reason(error: Exception) -> str:
    """First line of an error inside a training step; CUDA's out-of-memory says so itself."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
