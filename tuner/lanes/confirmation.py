"""The trials of a front on their way to the test gallery: every lane that is there measures one at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.lanes.messages import Confirmation
from tuner.train.results import Candidate, Measured


class FrontQueue:
    """Who measures what. Plain values; the coordinator holds it once trials have ended.

    Args:
        trials: in the order of the answer.
    """

    def __init__(self, trials: Sequence[Candidate]) -> None:
        self._trials = {candidate.trial: candidate for candidate in trials}
        self._takers: dict[str, str] = {}  # the lane that measures a trial
        self._measured: dict[str, Measured] = {}
        self._reason: str | None = None

    @property
    def left(self) -> int:
        """How many trials are still to be measured; none once it is known that one cannot be."""
        return 0 if self._reason else len(self._trials) - len(self._measured)

    @property
    def answer(self) -> Confirmation:
        """The answer to the driver now."""
        if self._reason:
            return Confirmation(reason=self._reason)
        if self.left:
            return Confirmation(left=self.left)
        return Confirmation(points=[self._measured[trial] for trial in self._trials])

    def take(self, lane: str) -> Candidate | None:
        """The trial that this lane measures next: the one it was given before, if it never reported that one."""
        if not self.left:
            return None
        open_trials = [trial for trial in self._trials if trial not in self._measured]
        for wanted in (lane, None):
            for trial in open_trials:
                if self._takers.get(trial) == wanted:
                    self._takers[trial] = lane
                    return self._trials[trial]
        return None

    def report(self, trial: str, measured: Measured | None, reason: str | None) -> None:
        """A trial has been measured, or cannot be, and with it the front cannot be confirmed."""
        if reason is not None:
            self._reason = self._reason or reason
        elif measured is not None and trial in self._trials:
            self._measured[trial] = measured

    def release(self, lane: str) -> None:
        """What this lane was measuring goes back into the queue."""
        self._takers = {trial: taker for trial, taker in self._takers.items() if taker != lane}
