"""What trials teach a model: final values, and predictions for trials that are not complete. No Ray, no Optuna.

Shapes: N observations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.config import TrialConfig
from tuner.search.curves import Gains, query_error
from tuner.study.history import Trial

Array = NDArray[np.float64]

# Values below the median by more than this many times what the best lies above it count as that: a learning rate that
# ruins a trial is bad, however bad, and must not stretch the scale on which good ones are told apart.
WINSOR = 3.0


@dataclass(frozen=True)
class Observation:
    """What is known of one trial.

    Attributes:
        values: one for each measured objective, measured or predicted; None while nothing is known.
        variances: one for each measured objective: of a prediction, or of a measured value by the chance of its
            queries, as far as trials differ in that.
        complete: whether the values were measured after the last epoch.
        known: costs by name.
    """

    config: TrialConfig
    known: Mapping[str, float]
    values: tuple[float, ...] | None
    variances: tuple[float, ...] = ()
    complete: bool = False


def observe(trials: Sequence[Trial], measured: Sequence[str]) -> dict[str, Observation]:
    """What each trial that has not failed teaches, by trial.

    Args:
        measured: names of the measured objectives.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    gains = [Gains(complete, name) for name in measured]
    kept = (trial for trial in trials if trial.state != "failed")
    return {trial.trial: _observation(trial, complete, measured, gains) for trial in kept}


def _observation(
    trial: Trial, complete: Sequence[Trial], measured: Sequence[str], gains: Sequence[Gains]
) -> Observation:
    if trial.state == "complete":
        values = tuple(trial.value(name) for name in measured)
        finite = values if all(map(math.isfinite, values)) else None
        variances = tuple(_query_variance(trial, complete, name) for name in measured)
        return Observation(trial.config, trial.known, finite, variances, complete=True)
    found = [each.predicted(trial) for each in gains]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return Observation(trial.config, trial.known, None)
    variances = tuple(deviation**2 for _, deviation in known)
    return Observation(trial.config, trial.known, tuple(mean for mean, _ in known), variances)


def _query_variance(trial: Trial, complete: Sequence[Trial], metric: str) -> float:
    """Half of the squared paired error against the first other complete trial; 0 without ranks.

    The luck that a set of queries gives to all trials alike moves no decision, so it is no noise here.
    """
    rival = next((other for other in complete if other is not trial), None)
    return 0.0 if rival is None else query_error(trial, rival, metric) ** 2 / 2


def observed(measured: Sequence[Observation], index: int) -> tuple[Array, Array]:
    """Values and extra variances of a measured objective; see `WINSOR`."""
    values = np.array([each.values[index] for each in measured if each.values is not None])
    extra = np.array([each.variances[index] if each.variances else 0.0 for each in measured])
    median = float(np.median(values))
    return np.maximum(values, median - WINSOR * max(float(values.max()) - median, 1e-6)), extra
