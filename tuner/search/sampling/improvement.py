"""Expected improvement of the hypervolume by a configuration whose cost is known and whose metric is not.

Shapes: M candidates, F points of the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tuner.study.objectives import Objective
from tuner.study.pareto import front, hypervolume

Array = NDArray[np.float64]

# Quantiles of the metric's posterior that stand for it where there is no closed form.
QUANTILES = 15
_erf = np.vectorize(math.erf, otypes=[np.float64])


def expected_improvement(
    mean: Array, deviation: Array, costs: Array, points: Array, corner: tuple[float, float]
) -> Array:
    """Closed form for one metric to maximise and one cost to minimise.

    At cost c the improvement by a value y is the integral, from the best value at a cost of c or less up to y, of the
    distance between c and the cheapest point whose value is higher (or the corner). Its expectation is a sum over the
    steps of the front of that distance times the integral of P(y > v).

    Args:
        mean, deviation: posterior [M] of the metric.
        costs: [M], on the cost's scale.
        points: front [F, 2] of value and cost.
        corner: value and cost from which the hypervolume is measured.

    Returns:
        [M], at least 0.
    """
    points = points[(points[:, 0] > corner[0]) & (points[:, 1] < corner[1])] if len(points) else np.empty((0, 2))
    points = points[np.argsort(points[:, 1])]
    best = np.full(len(mean), corner[0])
    for value, cost in points:
        best = np.where(costs >= cost, np.maximum(best, value), best)
    total = np.zeros(len(mean))
    # Steps from one value of the front to the next; above the last one the corner is the next cost.
    floors = np.array([corner[0], *points[:, 0]])
    ceilings = np.array([*points[:, 0], math.inf])
    until = np.array([*points[:, 1], corner[1]])
    for floor, ceiling, next_cost in zip(floors, ceilings, until, strict=True):
        width = np.maximum(next_cost - costs, 0.0)
        low = np.maximum(floor, best)
        total += width * np.where(low < ceiling, _mass_above(mean, deviation, low, ceiling), 0.0)
    return total


def _mass_above(mean: Array, deviation: Array, low: Array, high: float) -> Array:
    """The integral of P(y > v) for v from `low` to `high`."""
    below = _excess(mean, deviation, low)
    return below if math.isinf(high) else below - _excess(mean, deviation, np.full(len(mean), high))


def _excess(mean: Array, deviation: Array, threshold: Array) -> Array:
    """Expectation of max(y - threshold, 0)."""
    z = (mean - threshold) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.asarray(deviation * (z * 0.5 * (1 + _erf(z / math.sqrt(2))) + density))


def expected_improvement_by_quantiles(
    means: Array, deviations: Array, rows: Array, objectives: Sequence[Objective], points: Array
) -> Array:
    """The same for any objectives: the mean over quantiles of the metrics, which are taken as rising together.

    Args:
        means, deviations: posterior [M, K] of the K measured objectives, which come first.
        rows: values [M, number of objectives] of the candidates; the measured ones are filled in here.
        points: values of the front [F, number of objectives].
    """
    kept = points[front(points, objectives)] if len(points) else points
    before = hypervolume(kept, objectives)
    total = np.zeros(len(rows))
    measured = means.shape[1]
    for quantile in (np.arange(QUANTILES) + 0.5) / QUANTILES:
        z = NormalDist().inv_cdf(float(quantile))
        filled = rows.copy()
        filled[:, :measured] = means + z * deviations
        for index, row in enumerate(filled):
            total[index] += hypervolume(np.vstack([kept, row]) if len(kept) else row[None], objectives) - before
    return total / QUANTILES
