"""The front of a set of trials and its hypervolume, by moocore. This is the only definition of both.

Shapes: N trials, M objectives. Values are as measured; scales and the corner are the objectives' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tuner.study.objectives import Objective


def front(values: ArrayLike, objectives: Sequence[Objective]) -> list[int]:
    """Indices, ascending, of the rows of `values` [N, M] that no other row dominates.

    Of equal rows the first is kept. Rows with NaN (a trial without a result) are never on the front.

    Raises:
        ValueError: `values` is not N x M with one column per objective.
    """
    values_NM, rows = _complete(values, objectives)
    if not len(rows):
        return []
    kept = moocore.is_nondominated(values_NM, maximise=_maximise(objectives), keep_weakly=False)
    return [int(row) for row in rows[np.asarray(kept)]]


def hypervolume(values: ArrayLike, objectives: Sequence[Objective]) -> float:
    """The volume that `values` [N, M] dominate up to the corner of the objectives, in the product of their units.

    Costs count in decades (`Objective.position`). Rows that are not better than the corner in every objective add 0.

    Raises:
        ValueError: as `front`.
    """
    values_NM, _ = _complete(values, objectives)
    if not len(values_NM):
        return 0.0
    corner = [objective.position(objective.corner) for objective in objectives]
    return float(moocore.hypervolume(values_NM, ref=corner, maximise=_maximise(objectives)))


def _maximise(objectives: Sequence[Objective]) -> list[bool]:
    return [objective.direction == "maximize" for objective in objectives]


def _complete(values: ArrayLike, objectives: Sequence[Objective]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Rows without NaN on the objectives' scales, and their indices."""
    if not objectives:
        raise ValueError("there are no objectives")
    values_NM = np.array(values, dtype=np.float64)
    if values_NM.size == 0:
        return np.empty((0, len(objectives))), np.empty(0, np.int64)
    if values_NM.ndim != 2 or values_NM.shape[1] != len(objectives):
        raise ValueError(f"values of shape {values_NM.shape} do not fit {len(objectives)} objectives")
    rows = np.flatnonzero(~np.isnan(values_NM).any(axis=1))
    scaled = [[o.position(value) for o, value in zip(objectives, row, strict=True)] for row in values_NM[rows]]
    return np.array(scaled).reshape(len(rows), len(objectives)), rows
