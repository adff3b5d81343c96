"""A grid over a space, in an order whose beginning is spread over all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tuner.space.dimension import Choice, Dimension, FloatRange, IntRange
from tuner.space.search_space import Params, SearchSpace

# Values of a range in a grid.
GRID_VALUES = 4
GOLDEN = (math.sqrt(5) - 1) / 2


def grid(space: SearchSpace, seed: int) -> Iterator[Params]:
    """Parameters of every point of a grid; a range has up to four values, evenly on its scale.

    Steps of the golden ratio through the numbered points, so that the first ones are spread over all dimensions.
    """
    values = {path: _grid_values(dimension) for path, dimension in space.dimensions.items()}
    total = math.prod(map(len, values.values()))
    stride = max(1, int(total * GOLDEN))
    while math.gcd(stride, total) > 1:
        stride += 1
    seen = set()
    for step in range(total):
        index = (seed + step * stride) % total
        params: Params = {}
        for path, options in values.items():
            index, place = divmod(index, len(options))
            if space.dimensions[path].active(params):
                params[path] = options[place]
        # Points that differ in a dimension that is off are one configuration.
        key = tuple(params.items())
        if key not in seen:
            seen.add(key)
            yield params


def _grid_values(dimension: Dimension) -> Sequence[Any]:
    if isinstance(dimension, Choice):
        return dimension.choice
    count = dimension.count()
    if count is not None and count <= GRID_VALUES:
        return dimension.values()
    low, high = (float(end) for end in dimension.bounds)
    places = np.geomspace(low, high, GRID_VALUES) if dimension.log else np.linspace(low, high, GRID_VALUES)
    if isinstance(dimension, IntRange):
        steps = (round((place - low) / dimension.step) for place in places)
        return sorted({dimension.bounds[0] + dimension.step * step for step in steps})
    assert isinstance(dimension, FloatRange)
    if dimension.step is None:
        return [float(place) for place in places]
    return sorted({dimension.values()[round((place - low) / dimension.step)] for place in places})
