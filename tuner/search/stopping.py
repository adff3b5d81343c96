"""When a trial stops, pauses or goes on: rules over plain values. No Ray, no Optuna.

A rule is asked at each of its rungs, and for a paused trial again whenever something new is known of any trial. It
remembers nothing that its arguments do not give, so that a resumed study decides as the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tuner.study.history import Trial
from tuner.study.rungs import Decision


class StoppingRule(Protocol):
    """Decides at rungs."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a trial waits for a decision, rising."""
        ...

    def decide(self, trial: Trial, others: Sequence[Trial]) -> Decision:
        """What becomes of this trial, which stands at a rung.

        A paused trial is asked about again; GO_ON gives it the next free place, before new trials. With a place that
        nobody else takes it goes on whatever the rule says, unless that is STOP.

        Args:
            trial: its epochs end at the rung; `known` are its costs.
            others: every other trial of the study that has begun, by number.
        """
        ...


class NeverStop:
    """Every trial trains to its last epoch; no lane ever waits."""

    rungs: tuple[int, ...] = ()

    def decide(self, trial: Trial, others: Sequence[Trial]) -> Decision:
        """Go on."""
        return Decision.GO_ON
