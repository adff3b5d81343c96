"""What a lane's worker reports of itself, as metrics of Ray and in its log: its time, its speed, what it holds.

Prometheus asks every few seconds, so nothing here is set more often than once a second inside an epoch.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil
import ray
from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    from tuner.train.prefix import PrefixUse

Activity = Literal["loading", "waiting", "attaching", "training", "validating", "saving", "confirming"]
STEP_SECONDS = 1.0
logger = logging.getLogger(__name__)


def log_to_stdout() -> None:
    """Let what a lane says be found on the page of its actor in Ray's dashboard; by default only warnings would be."""
    ours = logging.getLogger("tuner")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)


@dataclass(frozen=True)
class LaneTags:
    """Which worker of which lane."""

    study: str
    space: str
    lane: str
    rank: int

    def values(self) -> dict[str, str]:
        """As Ray wants them."""
        return {"study": self.study, "space": self.space, "lane": self.lane, "rank": str(self.rank)}


class LaneMetrics:
    """Gauges and counters of one worker; they end with its process, which is how a lane that is gone is seen."""

    def __init__(self, tags: LaneTags) -> None:
        self._tags = tags.values()
        self._process = psutil.Process()
        self._since = time.perf_counter()
        self._prefix: PrefixUse | None = None
        self._seconds = self._counter("tuner_lane_seconds", "time of a lane's worker by what it did", "activity")
        self._epochs = self._counter("tuner_lane_epochs", "epochs that this worker has trained")
        self._speed = self._gauge("tuner_clips_per_second", "clips trained a second in the last epoch of a trial")
        self._epoch_seconds = self._gauge("tuner_epoch_seconds", "training time of the last epoch of a trial")
        self._validation = self._gauge("tuner_validation_seconds", "validation time of the last epoch of a trial")
        self._memory = self._gauge("tuner_lane_memory_bytes", "resident memory of a lane's worker")
        self._gpu_memory = self._gauge("tuner_lane_gpu_memory_bytes", "GPU memory of a lane's worker", "kind")
        self._files = self._gauge("tuner_prefix_files", "prefix caches in use: found, or made by this worker", "origin")
        self._file_bytes = self._gauge("tuner_prefix_file_bytes", "size of the prefix caches in use")
        self._read_bytes = self._counter("tuner_prefix_read_bytes", "frozen states read instead of computed")
        self._read_clips = self._counter("tuner_prefix_read_clips", "clips read from a prefix cache")
        self._announce()

    def _announce(self) -> None:
        """Say where this worker is: node and actor lead to its page in Ray's dashboard, node and GPU to Ray's own
        metrics of that GPU."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        place = {
            "ip": ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            "pid": str(self._process.pid),
            "actor": context.get_actor_id() or "",
            # Named as Ray names it, so that the two can be joined.
            "GpuIndex": gpus[0] if gpus else "",
        }
        self._up = self._gauge("tuner_lane_up", "1 for each worker of a lane that is there", *place)
        self._up.set_default_tags(self._tags | place)

    def spent(self, activity: Activity) -> None:
        """The time since the last call went into this."""
        now = time.perf_counter()
        if now > self._since:
            self._seconds.inc(now - self._since, {"activity": activity})
        self._since = now
        # Again and again: what is set before Ray has found its agent is lost.
        self._up.set(1)

    def step(self, step: int, steps: int) -> None:
        """An optimiser step is done: an epoch may take an hour, and its time should not come all at once."""
        if time.perf_counter() - self._since > STEP_SECONDS:
            self.spent("training")

    def epoch(self, trial: str, row: Mapping[str, Any], prefix: PrefixUse) -> None:
        """A trial has trained and validated an epoch; `row` is what it reports."""
        self._epochs.inc()
        self._speed.set(row["clips_per_second"])
        self._epoch_seconds.set(row["train_seconds"])
        self._validation.set(row["validation_seconds"])
        self._sample(prefix)
        logger.info(
            "%s epoch %d: loss %.4f, recall@10 %.3f, %.1f s training and %.1f s validating",
            *(trial, row["epoch"], row["loss"], row["recall@10"], row["train_seconds"], row["validation_seconds"]),
        )

    def _sample(self, prefix: PrefixUse) -> None:
        """What the worker holds now, and what it has read from its prefix caches since the last time."""
        self._memory.set(self._process.memory_info().rss)
        for kind, value in _gpu_memory().items():
            self._gpu_memory.set(value, {"kind": kind})
        self._files.set(prefix.files - prefix.made, {"origin": "found"})
        self._files.set(prefix.made, {"origin": "made"})
        self._file_bytes.set(prefix.file_bytes)
        before = self._prefix
        for counter, now, then in (
            (self._read_bytes, prefix.read_bytes, before.read_bytes if before else 0),
            (self._read_clips, prefix.read_clips, before.read_clips if before else 0),
        ):
            if now > then:
                counter.inc(now - then)
        self._prefix = prefix

    def _gauge(self, name: str, description: str, *tags: str) -> Gauge:
        gauge = Gauge(name, description, (*self._tags, *tags))
        gauge.set_default_tags(self._tags)
        return gauge

    def _counter(self, name: str, description: str, *tags: str) -> Counter:
        counter = Counter(name, description, (*self._tags, *tags))
        counter.set_default_tags(self._tags)
        return counter


def _gpu_memory() -> dict[str, int]:
    """Bytes of tensors, of what torch holds for them, and of the tensors' peak; nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "tensors": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "peak": torch.cuda.max_memory_allocated(),
    }
