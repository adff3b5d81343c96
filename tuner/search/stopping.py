"""When a trial stops, pauses or goes on: rules over plain values. No Ray, no Optuna.

A rule is asked at each of its rungs, and for a paused trial again whenever something new is known of any trial. It
remembers nothing that its arguments do not give, so that a resumed study decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from tuner.search.curves import predicted, query_error
from tuner.search.judgement import judge
from tuner.space import SearchSpace
from tuner.study.history import Trial
from tuner.study.objectives import Objective
from tuner.study.rungs import Decision, rung_epochs


@dataclass(frozen=True)
class Verdict:
    """A decision, and the sentence that gives its reason where it is not to go on."""

    decision: Decision
    reason: str | None = None


GO_ON = Verdict(Decision.GO_ON)


class StoppingRule(Protocol):
    """Decides at rungs."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a trial waits for a decision, rising."""
        ...

    def decide(self, trial: Trial, others: Sequence[Trial]) -> Verdict:
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

    def decide(self, trial: Trial, others: Sequence[Trial]) -> Verdict:
        """Go on."""
        return GO_ON


class StopHopeless:
    """Stops a trial that will not be on the front: a complete trial that costs as much or less will be better.

    Costs are known before training, so a trial is held only against those of its own cost or less, and one that is
    alone at its cost is never stopped by expensive ones. Its final metric is predicted from what complete trials still
    gained after the same rung.

    As soon as there are enough complete trials, a model of all of them gives the probability that the trial would be on
    the front. Its noise is what differs between trials; the luck of the validation queries that all of them share
    cancels. Before that, the trial is held against each rival alone, with the error of the gain and of the *paired*
    difference over the same queries. It stops below the probability `level`, and pauses below `doubt`.

    Args:
        objectives: of the study.
        epochs: of a whole training.
        space: of the study; None: only single rivals count.
    """

    def __init__(
        self,
        objectives: tuple[Objective, ...],
        epochs: int,
        space: SearchSpace | None = None,
        level: float = 0.05,
        doubt: float = 0.0,
        factor: int = 2,
    ) -> None:
        self._objectives, self._space = objectives, space
        self._measured = [objective.name for objective in objectives if objective.kind == "measured"]
        self._costs = [objective.name for objective in objectives if objective.kind == "known"]
        self._level, self._doubt = level, doubt
        self.rungs = rung_epochs(epochs, factor=factor)

    def decide(self, trial: Trial, others: Sequence[Trial]) -> Verdict:
        """Stop, pause or go on; see the class."""
        # In one order: sums of floating-point numbers depend on it.
        complete = sorted((other for other in others if other.state == "complete"), key=lambda other: other.trial)
        hopes = []
        for rival in complete:
            if all(rival.value(cost) <= trial.value(cost) for cost in self._costs):
                hope = self._hope(trial, rival, complete)
                if hope is not None:
                    hopes.append((rival, hope))
        if not hopes:
            return GO_ON
        best, hope = min(hopes, key=lambda pair: pair[1])
        hope = self._believed(trial, others, hope)
        if hope >= max(self._level, self._doubt):
            return GO_ON
        reason = self._reason(trial, best, hope)
        return Verdict(Decision.STOP if hope < self._level else Decision.PAUSE, reason)

    def _believed(self, trial: Trial, others: Sequence[Trial], hope: float) -> float:
        """The probability to be on the front by the model of all trials; `hope` while there is none."""
        if self._space is None:
            return hope
        trials = sorted([*others, trial], key=lambda each: each.trial)
        beliefs = judge(trials, self._space, self._objectives, standing=trial)
        return beliefs[trial.trial].probability if beliefs else hope

    def _hope(self, trial: Trial, rival: Trial, complete: Sequence[Trial]) -> float | None:
        """The probability that the trial ends better than a rival in some metric; None if it cannot be estimated."""
        chances = [self._chance(trial, rival, complete, metric) for metric in self._measured]
        known = [chance for chance in chances if chance is not None]
        return max(known) if len(known) == len(chances) else None

    def _chance(self, trial: Trial, rival: Trial, complete: Sequence[Trial], metric: str) -> float | None:
        final, value = predicted(trial, complete, metric), rival.value(metric)
        if final is None or not math.isfinite(value):
            return None
        mean, deviation = final
        error = math.hypot(deviation, query_error(trial, rival, metric))
        return 1.0 - NormalDist(mean, error).cdf(value)

    def _reason(self, trial: Trial, rival: Trial, hope: float) -> str:
        metric, epoch = self._measured[0], trial.last.epoch if trial.last else 0
        costs = "costs no more and" if self._costs else "already"
        return (
            f"after epoch {epoch} with {metric} {trial.value(metric):.3f}: {rival.trial} {costs} has "
            f"{rival.value(metric):.3f}; the chance to be on the front was {hope:.1%}"
        )
