"""The trials that lanes train: who waits, which lane has which, what each has reported. Plain values, no Ray.

Times are seconds of a clock that the caller reads, so tests need none.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tuner.config import TrialConfig
from tuner.lanes.messages import Row, Update

# A trial that has not asked for its next epoch for so long is gone (its actor died for good, or its driver did).
LEASE_SECONDS = 120.0


@dataclass
class _Job:
    config: TrialConfig
    lease: int = 0
    seen: float = 0.0
    lane: str | None = None
    rows: list[Row] = field(default_factory=list)
    read: int = 0  # epochs after which the trial has asked for the next one
    awaited: bool = False  # a lane waits for the trial to do so
    reason: str | None = None

    @property
    def open(self) -> bool:
        return self.reason is None

    @property
    def decided(self) -> bool:
        return self.read >= len(self.rows)


class TrialQueue:
    """Submitted trials in order of arrival, with the lane of each and the epochs that it reported."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        # A coordinator that was started again must not repeat the leases of the one before.
        self._leases = itertools.count(secrets.randbits(62))

    # What a trial does

    def knows(self, trial: str, config: TrialConfig) -> bool:
        """Whether this very trial waits or trains: submitted again, it goes on as it is."""
        job = self._jobs.get(trial)
        return job is not None and job.open and job.config == config

    def submit(self, trial: str, config: TrialConfig, now: float) -> int:
        """Let `trial` be trained; an earlier lease of the same trial ends. Returns the lease."""
        if not self.knows(trial, config):
            self._jobs[trial] = _Job(config)
        job = self._jobs[trial]
        job.lease, job.seen = next(self._leases), now
        return job.lease

    def go_on(self, trial: str, lease: int, cursor: int) -> bool:
        """The trial has read `cursor` epochs and asks for the next one; whether a lane waits for that."""
        job = self._jobs.get(trial)
        if job is None or job.lease != lease:
            return False
        job.read = max(job.read, cursor)
        awaited = job.awaited and job.decided
        job.awaited = job.awaited and not awaited
        return awaited

    def update(self, trial: str, lease: int, cursor: int, now: float) -> Update:
        """Row number `cursor` (0 = the first epoch) of this trial, or what there is instead."""
        job = self._jobs.get(trial)
        if job is None or job.lease != lease:
            return Update("unknown")
        job.seen = now
        if cursor < len(job.rows):
            return Update("epoch", row=job.rows[cursor], later=len(job.rows) - cursor - 1)
        return Update("failed", reason=job.reason) if job.reason else Update("wait")

    def cancel(self, trial: str, lease: int) -> bool:
        """The trial has ended, was stopped or paused; whether this lease was its current one."""
        job = self._jobs.get(trial)
        if job is None or job.lease != lease:
            return False
        del self._jobs[trial]
        return True

    def expire(self, now: float) -> None:
        """Forget trials that nobody has asked about for `LEASE_SECONDS`."""
        self._jobs = {trial: job for trial, job in self._jobs.items() if now - job.seen <= LEASE_SECONDS}

    # What a lane does

    def held(self, lane: str) -> list[str]:
        """Trials that this lane is to train."""
        return [trial for trial in self._jobs if self._belongs(trial, lane)]

    def assign(self, lane: str, held: Collection[str], free: int) -> list[tuple[str, TrialConfig]]:
        """Give a lane at most `free` trials: those of its own that it does not hold (it lost them), then waiting ones,
        oldest first."""
        lost = [trial for trial in self.held(lane) if trial not in held]
        waiting = [trial for trial, job in self._jobs.items() if job.open and job.lane is None]
        chosen = (lost + waiting)[: max(0, free)]
        for trial in chosen:
            self._jobs[trial].lane = lane
        return [(trial, self._jobs[trial].config) for trial in chosen]

    def dropped(self, lane: str, held: Collection[str]) -> tuple[str, ...]:
        """Those of the held trials that the lane is to train no longer."""
        return tuple(trial for trial in held if not self._belongs(trial, lane))

    def going_on(self, lane: str, waiting: Collection[str]) -> tuple[str, ...]:
        """Those of the waiting trials that have read every epoch of theirs and asked for the next one."""
        ours = [trial for trial in waiting if self._belongs(trial, lane)]
        for trial in ours:
            self._jobs[trial].awaited = not self._jobs[trial].decided
        return tuple(trial for trial in ours if self._jobs[trial].decided)

    def report(self, lane: str, trial: str, history: Sequence[Row]) -> bool:
        """All epochs of a trial so far, as its checkpoint has them; whether the lane has the trial and one is new."""
        if not self._belongs(trial, lane) or len(history) <= len(self._jobs[trial].rows):
            return False
        self._jobs[trial].rows = list(history)
        return True

    def fail(self, lane: str, trial: str, reason: str) -> None:
        """The lane cannot train this trial further."""
        if self._belongs(trial, lane):
            self._jobs[trial].reason = reason

    def release(self, lane: str) -> None:
        """What the lane had waits for whichever lane asks next."""
        for trial in self.held(lane):
            self._jobs[trial].lane = None

    def is_idle(self, lane: str) -> bool:
        """Whether there is no trial for this lane, of its own or waiting."""
        return not any(job.open and job.lane in (lane, None) for job in self._jobs.values())

    def _belongs(self, trial: str, lane: str) -> bool:
        job = self._jobs.get(trial)
        return job is not None and job.open and job.lane == lane
