"""A configuration as numbers about 0 to 1, for models over a space.

Numbers lie on the scale of their dimension. Target modules are one feature each, so that sets which share modules are
close. What a configuration costs is a feature, too: recall depends on capacity more than on where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tuner.config import TrialConfig
from tuner.space import SearchSpace
from tuner.space.dimension import TARGETS, Choice, Dimension
from tuner.study.history import Cell, flat_config
from tuner.study.objectives import Objective

# A cost this many decades higher is as far away as the other end of a range.
DECADES = 2.0
# Two different choices are this far apart in each of two features, so 1 in all.
APART = math.sqrt(0.5)
# The place of a value that a configuration does not have.
ABSENT = 0.5


class Encoding:
    """Features of the configurations of one study.

    Args:
        objectives: of the study; costs among them become features.
    """

    def __init__(self, space: SearchSpace, objectives: tuple[Objective, ...]) -> None:
        self._dimensions = {path: each for path, each in space.dimensions.items() if path != TARGETS}
        self._modules = sorted({module for group in space.target_sets.values() for module in group})
        self._costs = [objective for objective in objectives if objective.kind == "known"]

    def features(self, config: TrialConfig, known: Mapping[str, float]) -> NDArray[np.float64]:
        """Features [D] of a configuration; one outside the space lies at the end of a range.

        Args:
            known: its costs, by the names of their objectives.
        """
        flat = flat_config(config)
        found = [0.0 if config.lora is None else 1.0]
        for path, dimension in self._dimensions.items():
            found += _place(dimension, flat.get(path))
        targets = config.lora.targets if config.lora else ()
        found += [APART * (module in targets) for module in self._modules]
        found += [cost.position(known[cost.name]) / DECADES for cost in self._costs]
        return np.array(found)


def _place(dimension: Dimension, value: Cell) -> list[float]:
    if isinstance(dimension, Choice) and not _ordered(dimension):
        return [APART * (item == value) for item in dimension.choice]
    if not isinstance(value, int | float):
        return [ABSENT]
    low, high = (float(end) for end in (min(dimension.ends()), max(dimension.ends())))
    log = low > 0 and high / low >= 4 if isinstance(dimension, Choice) else dimension.log
    inside = min(max(float(value), low), high)
    if low == high:
        return [ABSENT]
    if log:
        return [math.log(inside / low) / math.log(high / low)]
    return [(inside - low) / (high - low)]


def _ordered(dimension: Choice) -> bool:
    """Whether the choices are positive numbers; counts from the top, such as first_layer -1 and 0, have no order."""
    return all(isinstance(item, int | float) and not isinstance(item, bool) and item > 0 for item in dimension.choice)
