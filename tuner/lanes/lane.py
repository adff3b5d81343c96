"""A lane: one long-lived Ray Train run whose workers loaded the encoder once and train what the coordinator sends.

`lane_loop` is the train function. Rank 0 alone talks to the coordinator and writes checkpoints; what it decides is
broadcast, so all workers of the lane hold the same pack.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from tuner.config import Precision, RunSettings, TrialConfig
from tuner.errors import StorageError, TrialFailed, TunerError, first_line
from tuner.lanes.capacity import node_group, present_nodes
from tuner.lanes.files import LaneFiles
from tuner.lanes.gauges import LaneMetrics, LaneTags, log_to_stdout
from tuner.lanes.group import LaneGroup
from tuner.lanes.guard import Guard, LaneLeaves
from tuner.lanes.messages import Orders
from tuner.storage import Storage
from tuner.study.rungs import is_due
from tuner.train.results import Candidate

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 5.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaneConfig:
    """What the host passes to the workers of one lane."""

    lane: str
    study: str
    space: str
    coordinator: str  # actor name
    settings: RunSettings
    run_dir: str  # checkpoints/<trial>.pt live below it, unless there is a storage
    storage: Storage | None  # of the study
    capacity: int  # adapters in a pack
    workers: int
    threads: int  # CPUs reserved for one worker
    use_gpu: bool
    rungs: tuple[int, ...] = ()  # epochs after which a trial waits for a decision


def lane_device() -> torch.device:
    """The device Ray gave this worker, if torch can use it: a GPU may be declared where there is no driver for it."""
    import torch
    from ray.train.torch import get_device

    return get_device() if torch.cuda.is_available() else torch.device("cpu")


def host_share() -> int:
    """CPUs that one GPU's worker may use on this node, independent of the other workers' nodes."""
    node = present_nodes()[ray.get_runtime_context().get_node_id()]
    return node_group(node).threads


def lane_loop(arguments: dict[str, Any]) -> None:
    """The train function of every worker."""
    config: LaneConfig = arguments["lane"]
    log_to_stdout()
    worker = LaneWorker(config)
    with closing(worker.files):
        try:
            worker.load()
        except (TunerError, ImportError) as error:
            worker.refuse(str(error))
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
        torch.set_num_threads(host_share() if config.use_gpu else config.threads)
        self.device = lane_device()
        self.group = LaneGroup(self.rank, self.world, self.device)
        self.metrics = LaneMetrics(LaneTags(config.study, config.space, config.lane, self.rank))
        self.files = LaneFiles(Path(config.run_dir), config.storage, config.lane)
        self.guard = Guard(self.rank, self.files, self.tell, self.group.broadcast)

    def load(self) -> None:
        """Load encoder, store and text embeddings, and agree with the other lanes on the number format."""
        from tuner.data.cache import prefix_root
        from tuner.data.remote import open_store
        from tuner.encoders.registry import inspect_encoder, load_encoder
        from tuner.train.pack import Pack, PackContext
        from tuner.train.precision import dtype_of, measured_precision
        from tuner.train.workers import Workers

        settings, device = self.config.settings, self.device
        wanted = settings.precision if settings.precision != "auto" else measured_precision(device)
        agreed = self.precision = self.register(wanted)
        if self.config.use_gpu and device.type == "cpu":
            self.tell("note", f"torch sees no GPU on {socket.gethostname()}, though Ray counts one; trains on the CPU")
        encoder = load_encoder(inspect_encoder(settings.encoder), dtype_of(agreed), str(device))
        context = PackContext(
            encoder=encoder,
            store=open_store(settings.store),
            settings=settings,
            workers=Workers(self.rank, self.world),
            prefix_root=prefix_root(),
        )
        self.pack = Pack(context)
        self.metrics.spent("loading")
        logger.info("%s, worker %d of %d: %s on %s", self.config.lane, self.rank, self.world, agreed, device)

    def register(self, precision: Precision) -> Precision:
        """Make this lane known, and the nodes of its workers and of the cluster; returns the agreed precision."""
        nodes = self.group.gather(ray.get_runtime_context().get_node_id())
        agreed: Precision = self.group.broadcast(
            self.tell("register", self.attempt, precision, nodes, [*present_nodes()])
        )
        return agreed

    def refuse(self, reason: str) -> None:
        """No trial can be trained here: say so until the coordinator, which may be started again, has heard it."""
        self.tell("fatal", reason)
        while not self.group.broadcast(self.tell("poll", [], 0, POLL_SECONDS)).stop:
            self.tell("fatal", reason)

    def turn(self) -> bool:
        """Take orders, then train one epoch of the members that are least far. False when told to stop."""
        self.guard.leave_in_time(self.pack.members.values())
        waiting = self._waiting()
        orders = self.group.broadcast(self._poll(waiting))
        self.metrics.spent("waiting")
        if orders.stop:
            return False
        if orders.register:
            self.register(self.precision)
            return True
        for trial in orders.drop:
            self.pack.detach(trial)
        if orders.confirm:
            self._confirm(orders.confirm)
            self.metrics.spent("confirming")
            return True
        if orders.new and (fault := self._fetch([trial for trial, _ in orders.new])):
            self.tell("fatal", fault)
            return True
        for trial, trial_config in orders.new:
            self._attach(trial, trial_config)
        self.metrics.spent("attaching")
        held_back = self._waiting() - set(orders.go_on)
        behind = {trial: epoch for trial, epoch in self._behind().items() if trial not in held_back}
        if behind:
            first = min(behind.values())
            alone = [orders.alone] if orders.alone in behind else None
            self._epoch(alone or [trial for trial, epoch in behind.items() if epoch == first])
        return True

    def _behind(self) -> dict[str, int]:
        """Members that are not trained to the end, and their finished epochs."""
        epochs = self.config.settings.epochs
        return {trial: member.epoch for trial, member in self.pack.members.items() if member.epoch < epochs}

    def _waiting(self) -> set[str]:
        """Members at a rung: not before their trial has decided is the next epoch begun."""
        rungs, epochs = self.config.rungs, self.config.settings.epochs
        return {t for t, m in self.pack.members.items() if is_due(m.epoch, rungs, epochs) and not m.steps}

    def _poll(self, waiting: set[str]) -> Orders:
        """Rank 0 asks for orders; with nothing to train, the coordinator answers when there is something new."""
        wait = 0.0 if self._behind().keys() - waiting else POLL_SECONDS
        held = list(self.pack.members)
        orders: Orders | None = self.tell("poll", held, self.config.capacity, wait, sorted(waiting))
        return orders or Orders()

    def _fetch(self, trials: list[str]) -> str | None:
        """Have checkpoints of these trials on each node of the lane; says what is wrong with the storage, on all."""
        fault = None
        try:
            for trial in trials:
                self.files.fetch(trial)
        except StorageError as error:
            fault = str(error)
        return next(filter(None, self.group.gather(fault)), None)

    def _attach(self, trial: str, config: TrialConfig) -> None:
        if trial in self.pack.members:
            self.pack.detach(trial)
        try:
            member = self.pack.attach(trial, config, self.files.checkpoint(trial))
        except TunerError as error:
            self.tell("fail", trial, str(error))
            return
        logger.info("%s attached at epoch %d: %s", trial, member.epoch, config.model_dump_json())
        if member.history:
            self.tell("report", trial, member.history)

    def _epoch(self, trials: list[str]) -> None:
        members = [self.pack.members[trial] for trial in trials]

        def after_step(step: int, steps: int) -> None:
            self.metrics.step(step, steps)
            self.guard.between_steps(members)

        with self._last_words():
            rows = self.pack.train_epoch(trials, after_step)
        self.metrics.spent("training")
        for trial in trials:
            row = rows[trial]
            if isinstance(row, TrialFailed):
                self._give_up(trial, str(row))
            else:
                self._finish_epoch(trial, row)

    def _finish_epoch(self, trial: str, row: dict[str, float]) -> None:
        started = time.perf_counter()
        try:
            with self._last_words():
                retrieval = self.pack.validate(trial)
        except TrialFailed as failure:
            self._give_up(trial, str(failure))
            return
        self.metrics.spent("validating")
        member = self.pack.members[trial]
        counts = {
            "lora_parameters": member.placement.lora_parameters if member.placement else 0,
            "trainable_parameters": member.trainable_parameters,
        }
        seconds = {"validation_seconds": time.perf_counter() - started}
        warning = {"warning": member.warning} if member.warning else {}
        ranks = {"ranks": retrieval.ranks().to_text()}
        member.history.append({**row, **seconds, **counts, **retrieval.metrics(), **ranks, **warning})
        if not self.guard.save(member):
            return
        self.metrics.spent("saving")
        self.metrics.epoch(trial, member.history[-1], self.pack.prefix_use)
        self.tell("report", trial, member.history)

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """Report to the coordinator what this worker, on any rank, is about to die of."""
        try:
            yield
        except (TrialFailed, LaneLeaves):
            raise
        except TunerError as error:
            # A cache that cannot be written, say: no trial's fault, and no other trial would fare better.
            ray.get(self.coordinator.fatal.remote(str(error)))
            raise
        except Exception as error:
            ray.get(self.coordinator.last_words.remote(self.config.lane, first_line(error)))
            raise

    def _confirm(self, candidate: Candidate) -> None:
        """Rank 0 measures a trial of the front; the other workers of the lane wait at the next broadcast."""
        from tuner.train.front_point import confirm_trial

        for trial in list(self.pack.members):
            self.pack.detach(trial)
        if self.rank != 0:
            return
        trial = candidate.trial
        try:
            self.files.fetch(trial)
            measured = confirm_trial(self.pack, candidate, self.files.folder, self.precision)
            self.files.keep_adapter(trial)
        except (TunerError, RuntimeError) as error:
            self.tell("confirmed", trial, None, str(error) if isinstance(error, TunerError) else first_line(error))
            return
        self.tell("confirmed", trial, measured, None)

    def _give_up(self, trial: str, reason: str) -> None:
        logger.warning("%s: %s", trial, reason)
        self.pack.detach(trial)
        self.tell("fail", trial, reason)

    def tell(self, method: str, *arguments: Any) -> Any:
        """Call the coordinator from rank 0; the other ranks get None."""
        if self.rank != 0:
            return None
        names = () if method == "fatal" else (self.config.lane,)
        return ray.get(getattr(self.coordinator, method).remote(*names, *arguments))
