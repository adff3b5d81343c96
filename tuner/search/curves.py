"""How much trials still gain after a rung: what a trial that is not complete would have reached. No Ray, no Optuna."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.study.history import Trial
from tuner.study.ranks import QueryRanks, paired_error

# Complete trials before their gains predict anything.
ENOUGH = 3
# Weight, in trials, and size of what is believed about the spread of gains before any was seen: half of their mean, and
# at least this much of a metric between 0 and 1.
PRIOR_TRIALS, PRIOR_SHARE, PRIOR_LEAST = 2, 0.5, 0.005


@dataclass(frozen=True)
class Gain:
    """What trials gained in a metric from one epoch to the last.

    Attributes:
        deviation: of a further trial's gain.
        count: of the trials that it was seen in.
    """

    mean: float
    deviation: float
    count: int


class Gains:
    """Of the complete trials of a study, in one metric.

    Trials without LoRA gain in another way than those with it, so a kind of trial has its own gains as soon as there
    are enough of them.

    Args:
        complete: trials that were trained to the end.
    """

    def __init__(self, complete: Sequence[Trial], metric: str) -> None:
        self._complete, self._metric = complete, metric
        self._known: dict[tuple[int, bool], Gain | None] = {}

    def after(self, epoch: int, has_lora: bool) -> Gain | None:
        """The gain from an epoch to the last one of a trial with or without LoRA; None if too few have shown it."""
        key = (epoch, has_lora)
        if key not in self._known:
            self._known[key] = self._after(epoch, has_lora)
        return self._known[key]

    def predicted(self, trial: Trial) -> tuple[float, float] | None:
        """A trial's value after its last epoch would be, and the standard deviation of that; None if it is unknown."""
        if trial.last is None or not math.isfinite(value := trial.last.metric(self._metric)):
            return None
        gain = self.after(trial.last.epoch, trial.config.lora is not None)
        return None if gain is None else (value + gain.mean, gain.deviation)

    def _after(self, epoch: int, has_lora: bool) -> Gain | None:
        alike = [other for other in self._complete if (other.config.lora is not None) == has_lora]
        for trials in (alike, self._complete):
            gains = [gain for gain in (_gain(other, epoch, self._metric) for other in trials) if math.isfinite(gain)]
            if len(gains) >= ENOUGH:
                return _estimate(gains)
        return None


def query_error(trial: Trial, rival: Trial, metric: str) -> float:
    """Standard error of the paired difference between two trials after their latest epochs; 0 without ranks."""
    ranks = [each.last.ranks for each in (trial, rival) if each.last is not None and each.last.ranks]
    parsed = [found for found in map(QueryRanks.from_text, ranks) if found is not None]
    if len(parsed) != 2:
        return 0.0
    return paired_error(parsed[0], parsed[1], metric) or 0.0


def _gain(trial: Trial, epoch: int, metric: str) -> float:
    if trial.last is None or epoch not in trial.epochs:
        return math.nan
    return trial.last.metric(metric) - trial.epochs[epoch].metric(metric)


def _estimate(gains: Sequence[float]) -> Gain:
    mean, count = statistics.fmean(gains), len(gains)
    prior = max(PRIOR_LEAST, PRIOR_SHARE * abs(mean))
    squares = sum((gain - mean) ** 2 for gain in gains) + PRIOR_TRIALS * prior**2
    spread = math.sqrt(squares / (count - 1 + PRIOR_TRIALS))
    # A further trial differs from the mean of these by its own spread and by the error of the mean.
    return Gain(mean, spread * math.sqrt(1 + 1 / count), count)
