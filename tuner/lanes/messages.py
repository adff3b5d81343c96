"""What the coordinator answers to trials, to the driver and to lanes: plain values that travel between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tuner.train.results import Measured

Row = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """Answer to a waiting trial: `epoch` with its row, `failed` with a reason, `wait`, or `unknown` lease.

    `fatal` says that no trial can be trained, and is no fault of this one: a resumed study trains it again. A `note` is
    what the lane has to say to the user meanwhile.
    """

    kind: Literal["epoch", "failed", "fatal", "note", "wait", "unknown"]
    row: Row | None = None
    reason: str | None = None


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
        alone: the one adapter to train in this turn, because a worker has died while it trained.
        confirm: a trial of the front to export and measure on test.
        stop: the lane ends.
        register: the coordinator does not know the lane, which registers and asks again.
    """

    new: tuple[tuple[str, Row], ...] = ()
    drop: tuple[str, ...] = ()
    alone: str | None = None
    confirm: Row | None = None
    stop: bool = False
    register: bool = False


@dataclass(frozen=True)
class Muster:
    """Lanes that have started so far, those that have ended since included, and what they have to tell the user."""

    up: tuple[str, ...]
    notes: tuple[str, ...]
