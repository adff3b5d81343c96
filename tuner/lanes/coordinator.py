"""Who trains what: the calls of trials, lanes and driver, on one event loop. Ray only hosts it as a named actor.

A trial submits its configuration, receives a lease and then waits for its epochs one by one. A lane polls for work,
reports epochs and learns what to drop. Nothing here must survive: a trial that finds its lease unknown submits again,
a lane that finds itself unknown registers again, with the number format that was agreed, and drops adapters that are
unknown; training goes on from the checkpoint on disk.

At a rung a lane waits for the trial's decision. It comes as the trial's next call: `next` goes on, `cancel` stops or
pauses. A trial that makes no call any more loses its lease, so that no lane waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

from tuner.config import Precision, TrialConfig
from tuner.lanes.confirmation import FrontQueue
from tuner.lanes.lane_registry import LaneRegistry
from tuner.lanes.messages import Confirmation, Muster, Orders, Row, Update
from tuner.lanes.trial_queue import TrialQueue
from tuner.train.results import Candidate, Measured

T = TypeVar("T")


class Coordinator:
    """Queue of trials and registry of lanes of one study, behind the calls of an actor.

    Args:
        precision: number format of the study; None: the first lane chooses it.
    """

    def __init__(self, precision: Precision | None = None) -> None:
        self._trials = TrialQueue()
        self._lanes = LaneRegistry(precision)
        self._front: FrontQueue | None = None
        self._stop = False
        self._fatal: str | None = None
        self._news = asyncio.Event()

    # What a trial calls

    async def submit(self, trial: str, config: TrialConfig) -> int:
        """Ask for `trial` to be trained; an earlier lease of the same trial ends. Returns the lease."""
        if not self._trials.knows(trial, config):
            self._lanes.deaths.forget_trial(trial)
        lease = self._trials.submit(trial, config, time.monotonic())
        self._wake()
        return lease

    async def next(self, trial: str, lease: int, cursor: int, timeout: float) -> Update:
        """Wait at most `timeout` seconds for row number `cursor` (0 = the first epoch) of this trial."""
        if self._trials.go_on(trial, lease, cursor):
            self._wake()
        return await self._until(
            lambda: self._update(trial, lease, cursor), lambda update: update.kind != "wait", timeout
        )

    async def cancel(self, trial: str, lease: int) -> None:
        """The trial has ended, was stopped or paused: its adapter leaves its lane at the next poll."""
        if self._trials.cancel(trial, lease):
            self._wake()

    # What a lane calls

    async def register(
        self,
        lane: str,
        attempt: str,
        precision: Precision,
        nodes: Iterable[str] = (),
        alive: Iterable[str] | None = None,
    ) -> Precision:
        """The workers of a lane have started, or the coordinator has. Returns the number format that all lanes of the
        study use: the first one's.

        Args:
            attempt, nodes, alive: as `LaneRegistry.register`.
            precision: the format that the lane would take, or has taken.
        """
        verdict = self._lanes.register(lane, attempt, nodes, alive, self._trials.held(lane))
        if verdict:
            for trial, reason in verdict.trials.items():
                self._trials.fail(lane, trial, reason)
            self._release(lane)
            if verdict.lane and self._lanes.given_up:
                self._fatal = self._fatal or verdict.lane
        self._lanes.precision = self._lanes.precision or precision
        self._wake()
        return self._lanes.precision

    async def poll(
        self, lane: str, held: Sequence[str], capacity: int, timeout: float, waiting: Collection[str] = ()
    ) -> Orders:
        """What the lane does next; waits at most `timeout` seconds for something to change.

        Args:
            held: trials that the lane holds.
            capacity: how many it can hold.
            waiting: those of the held ones that wait for their decision at a rung.
        """
        return await self._until(
            lambda: self._orders(lane, held, capacity, waiting), lambda orders: orders.is_news, timeout
        )

    async def report(self, lane: str, trial: str, history: Sequence[Row]) -> None:
        """All epochs of a trial so far, as its checkpoint has them: a resumed trial reports its past again."""
        self._lanes.deaths.forget_lane(lane)
        if self._trials.report(lane, trial, history):
            self._lanes.deaths.forget_trial(trial)
            self._wake()

    async def leave(self, lane: str) -> None:
        """The lane's node is about to go: other lanes may take its trials at once, and nobody is to blame."""
        self._release(lane)
        self._lanes.leave(lane)
        self._wake()

    async def last_words(self, lane: str, text: str) -> None:
        """What the lane's worker is about to die of, as far as it knows."""
        self._lanes.hear(lane, text)

    async def fail(self, lane: str, trial: str, reason: str) -> None:
        """This trial cannot go on; the others can."""
        self._trials.fail(lane, trial, reason)
        self._wake()

    async def confirmed(self, lane: str, trial: str, measured: Measured | None, reason: str | None) -> None:
        """A trial of the front was measured from its files, or why this cannot be done."""
        self._lanes.deaths.forget_lane(lane)
        if self._front:
            self._front.report(trial, measured, reason)
        self._wake()

    async def note(self, lane: str, text: str) -> None:
        """Something of this lane that the user should know, and that stops nothing."""
        self._lanes.notes.append(f"{lane}: {text}")

    async def fatal(self, reason: str) -> None:
        """No trial of this study can be trained (encoder cannot be loaded, say)."""
        self._fatal = self._fatal or reason
        self._wake()

    # What the driver calls

    async def confirm(self, trials: Sequence[Candidate], timeout: float) -> Confirmation:
        """Have the lanes measure a front and wait at most `timeout` seconds for it; a second call begins nothing."""
        if self._front is None:
            self._front = FrontQueue(trials)
            self._wake()
        front = self._front
        return await self._until(lambda: self._confirmation(front), lambda answer: answer.left is None, timeout)

    async def need(self, lanes: int) -> None:
        """From now on the study has work for so many lanes (one at least, for its front): others that idle may end.
        While a front is confirmed, it has work for as many as there are trials left to measure."""
        self._lanes.need(lanes)
        self._wake()

    async def muster(self) -> Muster:
        """Which lanes are up, and what they have to report."""
        return Muster(self._lanes.up, tuple(self._lanes.notes))

    async def stop(self) -> None:
        """Lanes end at their next poll."""
        self._stop = True
        self._wake()

    async def precision(self) -> Precision | None:
        """The number format that the first lane measured or was given."""
        return self._lanes.precision

    # Answers as they are now

    def _update(self, trial: str, lease: int, cursor: int) -> Update:
        update = self._trials.update(trial, lease, cursor, time.monotonic())
        if self._fatal and update.kind in ("failed", "wait"):
            return Update("fatal", reason=self._fatal)
        return update

    def _orders(self, lane: str, held: Sequence[str], capacity: int, waiting: Collection[str]) -> Orders:
        self._trials.expire(time.monotonic())
        if self._stop or self._fatal or self._lanes.is_retired(lane):
            return Orders(stop=True)
        if not self._lanes.knows(lane):
            return Orders(register=True)
        if self._front and (candidate := self._front.take(lane)):
            return Orders(confirm=candidate)
        idle = not held and self._trials.is_idle(lane)
        if self._lanes.dismiss(lane, idle, self._front.left if self._front else None):
            return Orders(stop=True)
        drop = self._trials.dropped(lane, held)
        kept = [trial for trial in held if trial not in drop]
        new = self._trials.assign(lane, held, capacity - len(kept))
        alone = self._lanes.suspect(lane, [*kept, *(trial for trial, _ in new)])
        return Orders(new=tuple(new), drop=drop, go_on=self._trials.going_on(lane, waiting), alone=alone)

    def _confirmation(self, front: FrontQueue) -> Confirmation:
        answer = front.answer
        return Confirmation(reason=self._fatal) if self._fatal and answer.left is not None else answer

    def _release(self, lane: str) -> None:
        """Everything that the lane had goes back into the queue."""
        self._trials.release(lane)
        if self._front:
            self._front.release(lane)

    # Waiting

    def _wake(self) -> None:
        """Whoever waits looks again."""
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, ask: Callable[[], T], is_news: Callable[[T], bool], timeout: float) -> T:
        """The answer of `ask` once it is news, or the one there is after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not is_news(answer := ask()) and (remaining := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), remaining)
        return answer
