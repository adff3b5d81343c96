"""Rungs: epochs after which a trial waits for a decision before it trains on (Li et al. 2020, arXiv:1810.05934)."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum


class Decision(Enum):
    """What becomes of a trial at a rung."""

    GO_ON = "go_on"
    # Its place in the lane goes to another trial; it may go on later from its checkpoint.
    PAUSE = "pause"
    STOP = "stop"


def rung_epochs(epochs: int, first: int = 1, factor: int = 3) -> tuple[int, ...]:
    """Epochs `first`, `first * factor`, `first * factor**2` and so on, as far as they come before the last one.

    Args:
        epochs: of a whole training.

    Raises:
        ValueError: `first` is below 1 or `factor` below 2.
    """
    if first < 1 or factor < 2:
        raise ValueError(f"rungs from epoch {first} by factor {factor}: take at least 1 and 2")
    rungs = []
    rung = first
    while rung < epochs:
        rungs.append(rung)
        rung *= factor
    return tuple(rungs)


def is_due(epoch: int, rungs: Collection[int], epochs: int) -> bool:
    """Whether a trial that has finished this epoch waits for a decision; after the last one there is none to take."""
    return epoch in rungs and epoch < epochs
