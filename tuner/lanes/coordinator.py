"""Who trains what: the queue between Tune trials and lanes. Plain asyncio; Ray only hosts it as a named actor.

A trial submits its configuration, receives a lease and then waits for its epochs one by one. A lane polls for work,
reports epochs and is told what to drop. Nothing here must survive: a trial that finds its lease unknown submits again,
a lane that holds an unknown adapter drops it, and training goes on from the checkpoint on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]

# A trial that has not asked for its next epoch for so long is gone (its actor died for good, or its driver did).
LEASE_SECONDS = 120.0
# A trial whose lane dies this often without finishing an epoch is what kills the lane.
DEATHS_PER_TRIAL = 3
# A lane that starts this often without finishing an epoch will not work the next time either.
STARTS_PER_LANE = 4


@dataclass(frozen=True)
class Update:
    """Answer to a waiting trial: `epoch` with its row, `failed` with a reason, `wait`, or `unknown` lease.

    `fatal` says that no trial can be trained, and is no fault of this one: a resumed study trains it again.
    """

    kind: Literal["epoch", "failed", "fatal", "wait", "unknown"]
    row: Row | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Confirmation:
    """Answer to the driver that waits for its front: the points, or why there are none; both None: not yet."""

    points: list[Row] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Orders:
    """Answer to a polling lane: adapters to take up (trial, configuration), adapters to drop, a front to confirm, or
    stop."""

    new: tuple[tuple[str, Row], ...] = ()
    drop: tuple[str, ...] = ()
    confirm: Row | None = None
    stop: bool = False


@dataclass
class _Job:
    config: Row
    lease: int
    seen: float
    lane: str | None = None
    rows: list[Row] = field(default_factory=list)
    reason: str | None = None
    deaths: int = 0

    @property
    def open(self) -> bool:
        return self.reason is None


@dataclass
class _Lane:
    starts: int = 0
    attempt: str = ""


class Coordinator:
    """Queue of adapters, leases and reports of one study."""

    def __init__(self, precision: str | None = None) -> None:
        self._jobs: dict[str, _Job] = {}
        self._lanes: dict[str, _Lane] = {}
        self._leases = itertools.count(1)
        self._changed = asyncio.Condition()
        self._stop = False
        self._fatal: str | None = None
        self._precision = precision
        self._plan: Row | None = None
        self._planned_lane: str | None = None
        self._confirmation = Confirmation()

    # What a trial calls

    async def submit(self, trial: str, config: Row) -> int:
        """Ask for `trial` to be trained; an earlier lease of the same trial ends. Returns the lease."""
        async with self._changed:
            job = self._jobs.get(trial)
            if job is None or job.config != config or not job.open:
                job = self._jobs[trial] = _Job(config, 0, 0.0)
            job.lease, job.seen = next(self._leases), time.monotonic()
            self._changed.notify_all()
            return job.lease

    async def next(self, trial: str, lease: int, cursor: int, timeout: float) -> Update:
        """Wait at most `timeout` seconds for row number `cursor` (0 = the first epoch) of this trial."""
        deadline = time.monotonic() + timeout
        async with self._changed:
            while True:
                job = self._jobs.get(trial)
                if job is None or job.lease != lease:
                    return Update("unknown")
                job.seen = time.monotonic()
                if cursor < len(job.rows):
                    return Update("epoch", row=job.rows[cursor])
                if self._fatal:
                    return Update("fatal", reason=self._fatal)
                if job.reason:
                    return Update("failed", reason=job.reason)
                if not await self._wait(deadline):
                    return Update("wait")

    async def cancel(self, trial: str, lease: int) -> None:
        """The trial has ended or was stopped: its adapter leaves its lane at the next poll."""
        async with self._changed:
            job = self._jobs.get(trial)
            if job is not None and job.lease == lease:
                del self._jobs[trial]
                self._changed.notify_all()

    # What a lane calls

    async def register(self, lane: str, attempt: str, precision: str) -> str:
        """A lane process has started (again). Returns the precision all lanes of the study use: the first one's."""
        async with self._changed:
            known = self._lanes.setdefault(lane, _Lane())
            if known.attempt != attempt:
                known.starts, known.attempt = known.starts + 1, attempt
                self._requeue(lane)
            if known.starts > STARTS_PER_LANE:
                self._fatal = f"lane {lane} died {known.starts - 1} times in a row; its log tells why"
            self._precision = self._precision or precision
            self._changed.notify_all()
            return self._precision

    async def poll(self, lane: str, held: list[str], capacity: int, timeout: float) -> Orders:
        """Say what the lane holds and how many it can hold; waits at most `timeout` seconds for something to change."""
        deadline = time.monotonic() + timeout
        async with self._changed:
            while True:
                self._expire()
                if self._stop or self._fatal:
                    return Orders(stop=True)
                if self._takes_plan(lane):
                    return Orders(confirm=self._plan)
                drop = tuple(trial for trial in held if not self._belongs(trial, lane))
                kept = len(held) - len(drop)
                new = tuple((trial, job.config) for trial, job in self._assign(lane, held, capacity - kept))
                if new or drop or not await self._wait(deadline):
                    return Orders(new=new, drop=drop)

    async def report(self, lane: str, trial: str, history: list[Row]) -> None:
        """All epochs of a trial so far, as its checkpoint has them: a resumed trial reports its past again."""
        async with self._changed:
            self._lanes.setdefault(lane, _Lane()).starts = 0
            job = self._jobs.get(trial)
            if job is not None and job.lane == lane and len(history) > len(job.rows):
                job.rows, job.deaths = list(history), 0
                self._changed.notify_all()

    async def fail(self, lane: str, trial: str, reason: str) -> None:
        """This trial cannot go on; the others can."""
        async with self._changed:
            job = self._jobs.get(trial)
            if job is not None and job.lane == lane:
                job.reason = reason
                self._changed.notify_all()

    async def confirmed(self, lane: str, points: list[Row] | None, reason: str | None) -> None:
        """The front's points, measured from their files, or why this cannot be done."""
        async with self._changed:
            self._lanes.setdefault(lane, _Lane()).starts = 0
            self._plan, self._confirmation = None, Confirmation(points, reason)
            self._changed.notify_all()

    async def fatal(self, reason: str) -> None:
        """No trial of this study can be trained (encoder cannot be loaded, say)."""
        async with self._changed:
            self._fatal = self._fatal or reason
            self._changed.notify_all()

    # What the driver calls

    async def confirm(self, plan: Row, timeout: float) -> Confirmation:
        """Have one lane confirm a front and wait at most `timeout` seconds for it; asked again, it is not begun again.

        Args:
            plan: what `tuner.train.confirm.confirm_trials` takes, as plain values.
        """
        deadline = time.monotonic() + timeout
        async with self._changed:
            while True:
                if self._confirmation != Confirmation():
                    return self._confirmation
                if self._fatal:
                    return Confirmation(reason=self._fatal)
                if self._plan is None:
                    self._plan, self._planned_lane = plan, None
                    self._changed.notify_all()
                if not await self._wait(deadline):
                    return Confirmation()

    async def stop(self) -> None:
        """Lanes end at their next poll."""
        async with self._changed:
            self._stop = True
            self._changed.notify_all()

    async def precision(self) -> str | None:
        """The number format the first lane measured or was told."""
        return self._precision

    def _belongs(self, trial: str, lane: str) -> bool:
        job = self._jobs.get(trial)
        return job is not None and job.open and job.lane == lane

    def _assign(self, lane: str, held: list[str], free: int) -> list[tuple[str, _Job]]:
        """Jobs of this lane that it does not hold (it lost them), then waiting ones, oldest first."""
        lost = [(t, job) for t, job in self._jobs.items() if job.open and job.lane == lane and t not in held]
        waiting = [(t, job) for t, job in self._jobs.items() if job.open and job.lane is None]
        chosen = (lost + waiting)[: max(0, free)]
        for _, job in chosen:
            job.lane = lane
        return chosen

    def _takes_plan(self, lane: str) -> bool:
        """Whether this lane is to confirm the front now: the first one that asks."""
        if self._plan is None or self._planned_lane is not None:
            return False
        self._planned_lane = lane
        return True

    def _requeue(self, lane: str) -> None:
        if self._planned_lane == lane:
            self._planned_lane = None
        for job in self._jobs.values():
            if job.lane == lane and job.open:
                job.lane = None
                job.deaths += 1
                if job.deaths >= DEATHS_PER_TRIAL:
                    job.reason = f"the lane's worker died {job.deaths} times while training it (out of memory?)"

    def _expire(self) -> None:
        limit = time.monotonic() - LEASE_SECONDS
        for trial in [trial for trial, job in self._jobs.items() if job.seen < limit]:
            del self._jobs[trial]

    async def _wait(self, deadline: float) -> bool:
        """Sleep until something changes; False when the deadline has passed."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        try:
            await asyncio.wait_for(self._changed.wait(), remaining)
        except TimeoutError:
            return False
        return True
