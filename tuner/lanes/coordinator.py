"""Who trains what: the queue between Tune trials and lanes. Plain asyncio; Ray only hosts it as a named actor.

A trial submits its configuration, receives a lease and then waits for its epochs one by one. A lane polls for work,
reports epochs and is told what to drop. Nothing here must survive: a trial that finds its lease unknown submits again,
a lane that finds itself unknown registers again, with the number format that was agreed, and drops adapters that are
unknown; training goes on from the checkpoint on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tuner.lanes.confirmation import FrontQueue
from tuner.lanes.deaths import Deaths, Nodes
from tuner.lanes.messages import Confirmation, Muster, Orders, Row, Update
from tuner.train.results import Measured

# A trial that has not asked for its next epoch for so long is gone (its actor died for good, or its driver did).
LEASE_SECONDS = 120.0


@dataclass
class _Job:
    config: Row
    lease: int
    seen: float
    lane: str | None = None
    rows: list[Row] = field(default_factory=list)
    reason: str | None = None

    @property
    def open(self) -> bool:
        return self.reason is None


@dataclass
class _Lane:
    attempt: str = ""  # of the workers that are there; empty when there are none
    nodes: Nodes = frozenset()
    alone: str | None = None
    words: str | None = None  # the last that its workers said
    retired: bool = False
    dismissed: bool = False


class Coordinator:
    """Queue of adapters, leases and reports of one study."""

    def __init__(self, precision: str | None = None) -> None:
        self._jobs: dict[str, _Job] = {}
        self._lanes: dict[str, _Lane] = {}
        # A coordinator that was started again must not repeat the leases of the one before.
        self._leases = itertools.count(secrets.randbits(62))
        self._deaths = Deaths()
        self._changed = asyncio.Condition()
        self._stop = False
        self._fatal: str | None = None
        self._precision = precision
        self._front: FrontQueue | None = None
        self._needed: int | None = None
        self._notes: list[str] = []

    # What a trial calls

    async def submit(self, trial: str, config: Row) -> int:
        """Ask for `trial` to be trained; an earlier lease of the same trial ends. Returns the lease."""
        async with self._changed:
            job = self._jobs.get(trial)
            if job is None or job.config != config or not job.open:
                job = self._jobs[trial] = _Job(config, 0, 0.0)
                self._deaths.forget_trial(trial)
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

    async def register(
        self, lane: str, attempt: str, precision: str, nodes: Iterable[str] = (), alive: Iterable[str] | None = None
    ) -> str:
        """The workers of a lane have started, or the coordinator has. Returns the number format that all lanes of the
        study use: the first one's.

        Args:
            attempt: one name for each start of the workers.
            precision: the format that the lane would take, or has taken.
            nodes: ids of the nodes that its workers are on.
            alive: ids of all nodes of the cluster; None where they do not come and go.
        """
        async with self._changed:
            self._deaths.see_nodes(alive)
            known = self._lanes.setdefault(lane, _Lane())
            if known.attempt not in ("", attempt):
                self._bury(lane, known)
            known.attempt, known.nodes = attempt, frozenset(nodes)
            self._precision = self._precision or precision
            self._changed.notify_all()
            return self._precision

    async def poll(self, lane: str, held: list[str], capacity: int, timeout: float) -> Orders:
        """Say what the lane holds and how many it can hold; waits at most `timeout` seconds for something to change."""
        deadline = time.monotonic() + timeout
        async with self._changed:
            while True:
                self._expire()
                known = self._lanes.get(lane)
                if self._stop or self._fatal or (known and known.retired):
                    return Orders(stop=True)
                if known is None:
                    return Orders(register=True)
                if self._front and (candidate := self._front.take(lane)):
                    return Orders(confirm=candidate)
                if self._dismisses(lane, held):
                    return Orders(stop=True)
                drop = tuple(trial for trial in held if not self._belongs(trial, lane))
                kept = len(held) - len(drop)
                new = tuple((trial, job.config) for trial, job in self._assign(lane, held, capacity - kept))
                known.alone = self._deaths.suspect([*(t for t in held if t not in drop), *(t for t, _ in new)])
                if new or drop or not await self._wait(deadline):
                    return Orders(new=new, drop=drop, alone=known.alone)

    async def report(self, lane: str, trial: str, history: list[Row]) -> None:
        """All epochs of a trial so far, as its checkpoint has them: a resumed trial reports its past again."""
        async with self._changed:
            self._deaths.forget_lane(lane)
            job = self._jobs.get(trial)
            if job is not None and job.lane == lane and len(history) > len(job.rows):
                job.rows = list(history)
                self._deaths.forget_trial(trial)
                self._changed.notify_all()

    async def leave(self, lane: str) -> None:
        """The lane's node is about to go: other lanes may take its trials at once, and nobody is to blame."""
        async with self._changed:
            self._release(lane)
            if lane in self._lanes:
                self._lanes[lane].attempt = ""
            self._changed.notify_all()

    async def last_words(self, lane: str, text: str) -> None:
        """What the lane's worker is about to die of, as far as it knows."""
        if lane in self._lanes:
            self._lanes[lane].words = text

    async def fail(self, lane: str, trial: str, reason: str) -> None:
        """This trial cannot go on; the others can."""
        async with self._changed:
            job = self._jobs.get(trial)
            if job is not None and job.lane == lane:
                job.reason = reason
                self._changed.notify_all()

    async def confirmed(self, lane: str, trial: str, measured: Measured | None, reason: str | None) -> None:
        """A trial of the front was measured from its files, or why this cannot be done."""
        async with self._changed:
            self._deaths.forget_lane(lane)
            if self._front:
                self._front.report(trial, measured, reason)
            self._changed.notify_all()

    async def note(self, lane: str, text: str) -> None:
        """Something of this lane that the user should know, and that stops nothing."""
        self._notes.append(f"{lane}: {text}")

    async def fatal(self, reason: str) -> None:
        """No trial of this study can be trained (encoder cannot be loaded, say)."""
        async with self._changed:
            self._fatal = self._fatal or reason
            self._changed.notify_all()

    # What the driver calls

    async def confirm(self, trials: list[Row], timeout: float) -> Confirmation:
        """Have the lanes confirm a front and wait at most `timeout` seconds for it; asked again, it is not begun again.

        Args:
            trials: `trial`, `origin` and `config` of each, what `tuner.train.front_point.confirm_trial` takes.
        """
        deadline = time.monotonic() + timeout
        async with self._changed:
            if self._front is None:
                self._front = FrontQueue(trials)
                self._changed.notify_all()
            while True:
                answer = self._front.answer
                if answer.left is None:
                    return answer
                if self._fatal:
                    return Confirmation(reason=self._fatal)
                if not await self._wait(deadline):
                    return self._front.answer

    async def need(self, lanes: int) -> None:
        """From now on the study has work for so many lanes (one at least, for its front): others that idle may end.
        While a front is confirmed, it has work for as many as there are trials left to measure."""
        async with self._changed:
            self._needed = max(1, lanes)
            self._changed.notify_all()

    async def muster(self) -> Muster:
        """Which lanes are up, and what they have to say."""
        return Muster(tuple(name for name, lane in self._lanes.items() if lane.attempt), tuple(self._notes))

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

    def _dismisses(self, lane: str, held: list[str]) -> bool:
        """Whether this lane ends now, so that its machine can go: it idles, and the study needs fewer lanes."""
        asking = self._lanes.get(lane, _Lane())
        if not asking.dismissed and not held and self._needed is not None:
            staying = sum(bool(known.attempt) and not known.dismissed for known in self._lanes.values())
            idle = not any(job.open and job.lane in (lane, None) for job in self._jobs.values())
            needed = max(1, self._front.left) if self._front else self._needed
            asking.dismissed = idle and staying > needed
        return asking.dismissed

    def _held(self, lane: str) -> list[str]:
        return [trial for trial, job in self._jobs.items() if job.lane == lane and job.open]

    def _release(self, lane: str) -> None:
        """Everything that the lane had goes back into the queue."""
        if self._front:
            self._front.release(lane)
        for trial in self._held(lane):
            self._jobs[trial].lane = None

    def _bury(self, lane: str, known: _Lane) -> None:
        """The lane's workers have died: give their work to whoever asks next, and end what they died of."""
        verdict = self._deaths.died(lane, known.nodes, self._held(lane), known.alone, known.words)
        self._release(lane)
        known.alone = known.words = None
        for trial, reason in verdict.trials.items():
            self._jobs[trial].reason = reason
        if verdict.lane:
            known.retired = True
            self._notes.append(verdict.lane)
            if all(other.retired or other.dismissed for other in self._lanes.values()):
                self._fatal = self._fatal or verdict.lane

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
