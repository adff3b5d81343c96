"""A stopping rule that decides as a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tuner.search.stopping import GO_ON, Verdict
from tuner.study.history import Trial
from tuner.study.rungs import Decision


@dataclass(frozen=True)
class Scripted:
    """Decides by trial and epoch; GO_ON where nothing else is said.

    Attributes:
        decisions: by (trial, finished epochs).
        until: a paused trial goes on once another one has this many epochs: by (trial, epochs), (other, epochs).
    """

    rungs: tuple[int, ...]
    decisions: Mapping[tuple[str, int], Decision] = field(default_factory=dict)
    until: Mapping[tuple[str, int], tuple[str, int]] = field(default_factory=dict)

    def decide(self, trial: Trial, others: Sequence[Trial]) -> Verdict:
        """As it is written."""
        stand = (trial.trial, len(trial.epochs))
        if stand in self.until:
            name, epochs = self.until[stand]
            if any(other.trial == name and len(other.epochs) >= epochs for other in others):
                return GO_ON
        return Verdict(self.decisions.get(stand, Decision.GO_ON))
