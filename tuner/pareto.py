"""Pareto dominance, the front and its hypervolume, for any mix of objectives to maximise and to minimise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["maximize", "minimize"]


def dominates(a: ArrayLike, b: ArrayLike, directions: Sequence[Direction]) -> bool:
    """Whether the objective vector `a` (M) is at least as good as `b` everywhere and better somewhere.

    A vector never dominates its equal, and NaN neither dominates nor is dominated.

    Raises:
        ValueError: the vectors do not have one value per direction.
    """
    costs = _as_costs(np.stack([np.asarray(a), np.asarray(b)]), directions)
    return bool(np.all(costs[0] <= costs[1]) and np.any(costs[0] < costs[1]))


def pareto_front(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.int64]:
    """Indices, ascending, of the rows of `values` (N x M) that no other row dominates.

    Of rows that are equal in every objective the first is kept, so that a front never lists one trade-off twice.
    Rows with NaN (a trial without a result) are never on the front; infinite values compare as usual.

    Raises:
        ValueError: `values` is not N x M with one column per direction.
    """
    costs = _as_costs(values, directions)
    rows = np.flatnonzero(~np.isnan(costs).any(axis=1))
    # In lexicographic order a row can only be dominated by, or repeat, an earlier one, and if so also a kept one:
    # one pass of N rows against the front instead of N x N comparisons. Stable, so duplicates keep their order.
    order = rows[np.lexsort(costs[rows].T)]
    kept: list[int] = []
    for row in order:
        if not np.all(costs[kept] <= costs[row], axis=1).any():
            kept.append(int(row))
    return np.array(sorted(kept), dtype=np.int64)


def hypervolume(values: ArrayLike, reference: ArrayLike, directions: Sequence[Direction]) -> float:
    """Exact measure of what `values` (N x M, M = 1 or 2) dominates up to the reference vector (M).

    With one objective that is how far the best value beats the reference. Rows that do not beat the reference in every
    objective add nothing, nor do dominated rows and rows with NaN; no rows at all give 0. The unit is the product of
    the objectives' units, so objectives of different scale are transformed (log parameters) before they come here.

    Raises:
        ValueError: shapes and directions disagree, or there are more than two objectives.
    """
    if len(directions) > 2:
        raise ValueError(f"hypervolume is exact for one or two objectives, not for {len(directions)}")
    corner = _as_costs(np.asarray(reference)[None], directions)[0]
    costs = _as_costs(values, directions)
    costs = costs[(costs < corner).all(axis=1)]
    if len(costs) == 0:
        return 0.0
    if len(directions) == 1:
        return float(corner[0] - costs.min())
    # Along the front the first cost rises while the second falls: each point adds the strip below its predecessor.
    front = costs[pareto_front(costs, ["minimize", "minimize"])]
    front = front[np.argsort(front[:, 0])]
    ceilings = np.concatenate(([corner[1]], front[:-1, 1]))
    return float(np.sum((corner[0] - front[:, 0]) * (ceilings - front[:, 1])))


def _as_costs(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.float64]:
    """Copy to float64 with the columns to maximise negated; an empty input of any shape becomes 0 x M."""
    unknown = set(directions) - {"maximize", "minimize"}
    if unknown or not directions:
        raise ValueError(f"directions are 'maximize' or 'minimize', one per objective, not {list(directions)}")
    costs = np.array(values, dtype=np.float64)
    if costs.size == 0:
        return np.empty((0, len(directions)))
    if costs.ndim != 2 or costs.shape[1] != len(directions):
        raise ValueError(f"values of shape {costs.shape} do not match {len(directions)} directions")
    costs[:, [direction == "maximize" for direction in directions]] *= -1
    return costs
