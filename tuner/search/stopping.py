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

from tuner.search.curves import Gains, query_error
from tuner.search.judgement import chance_of
from tuner.space import SearchSpace
from tuner.study.config import StudyRecord
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
        known = sorted((*others, trial), key=lambda each: each.trial)
        complete = [each for each in known if each.state == "complete"]
        rivals = [each for each in complete if all(each.value(cost) <= trial.value(cost) for cost in self._costs)]
        if not rivals:
            return GO_ON
        hope = self._believed(trial, known)
        if hope is None:
            hope = self._against_each(trial, rivals, complete)
        if hope is None or hope >= max(self._level, self._doubt):
            return GO_ON
        return Verdict(Decision.STOP if hope < self._level else Decision.PAUSE, self._reason(trial, rivals, hope))

    def _believed(self, trial: Trial, known: Sequence[Trial]) -> float | None:
        """The probability to be on the front by the model of all trials; None while there is none."""
        return None if self._space is None else chance_of(trial, known, self._space, self._objectives)

    def _against_each(self, trial: Trial, rivals: Sequence[Trial], complete: Sequence[Trial]) -> float | None:
        """The smallest probability to end better than a rival; better in one metric is enough."""
        chances: list[float] = []
        gains = [Gains(complete, metric) for metric in self._measured]
        finals = [each.predicted(trial) for each in gains]
        for rival in rivals:
            each = [self._chance(trial, rival, metric, f) for metric, f in zip(self._measured, finals, strict=True)]
            known = [chance for chance in each if chance is not None]
            if len(known) == len(each):
                chances.append(max(known))
        return min(chances, default=None)

    def _chance(self, trial: Trial, rival: Trial, metric: str, final: tuple[float, float] | None) -> float | None:
        value = rival.value(metric)
        if final is None or not math.isfinite(value):
            return None
        mean, deviation = final
        error = math.hypot(deviation, query_error(trial, rival, metric))
        return 1.0 - NormalDist(mean, error).cdf(value)

    def _reason(self, trial: Trial, rivals: Sequence[Trial], hope: float) -> str:
        metric, epoch = self._measured[0], trial.last.epoch if trial.last else 0
        best = max(rivals, key=lambda rival: rival.value(metric))
        costs = "costs no more and" if self._costs else "already"
        return (
            f"after epoch {epoch} with {metric} {trial.value(metric):.3f}: {best.trial} {costs} has "
            f"{best.value(metric):.3f}; the chance to be on the front was {hope:.1%}"
        )


def rule_of(record: StudyRecord) -> StoppingRule:
    """The study's own stopping rule."""
    if record.stopping == "never":
        return NeverStop()
    return StopHopeless(record.objectives, record.settings.epochs, record.space)
