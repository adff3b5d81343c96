"""What the coordinator answers to trials, to the driver and to lanes: plain values that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuner.config import TrialConfig
from tuner.train.results import Candidate, Measured

# An epoch as a lane reports it: numbers by metric, the `ranks` of its validation queries, and perhaps a `warning`.
Row = dict[str, float | str]


@dataclass(frozen=True)
class Update:
    """Answer to a waiting trial: `epoch` with its row, `failed` with a reason, `wait`, or `unknown` lease.

    `fatal` means that no trial can be trained, and is no fault of this one: a resumed study trains it again.

    Attributes:
        later: of an epoch: how many later ones are known, so that the trial went on after this one before.
    """

    kind: Literal["epoch", "failed", "fatal", "wait", "unknown"]
    row: Row | None = None
    reason: str | None = None
    later: int = 0


@dataclass(frozen=True)
class Confirmation:
    """Answer to the driver that waits for its front: what was measured of each trial, or why that cannot be done.

    Attributes:
        left: while both are None: how many trials are still to be measured, if it is known.
    """

    points: list[Measured] | None = None
    reason: str | None = None
    left: int | None = None


@dataclass(frozen=True)
class Orders:
    """Answer to a polling lane.

    Attributes:
        new: adapters to take up (trial, configuration).
        drop: adapters to drop.
        go_on: adapters that waited for a decision at a rung and train on.
        alone: the one adapter to train in this turn, because a worker has died while it trained.
        confirm: a trial of the front to export and measure on test.
        stop: the lane ends.
        register: the coordinator does not know the lane, which registers and asks again.
    """

    new: tuple[tuple[str, TrialConfig], ...] = ()
    drop: tuple[str, ...] = ()
    go_on: tuple[str, ...] = ()
    alone: str | None = None
    confirm: Candidate | None = None
    stop: bool = False
    register: bool = False

    @property
    def is_news(self) -> bool:
        """Whether there is something to do that the lane did not know of."""
        return bool(self.new or self.drop or self.go_on or self.confirm or self.stop or self.register)


@dataclass(frozen=True)
class Muster:
    """Lanes that have started so far, those that have ended since included, and notes of theirs for the user."""

    up: tuple[str, ...]
    notes: tuple[str, ...]
