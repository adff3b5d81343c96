"""Random configurations of a space, and neighbours of a given one, without Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tuner.space.search_space import Params, SearchSpace


class _Draw:
    """Answers a space's questions at random, except for what is kept."""

    def __init__(self, random: np.random.Generator, kept: Mapping[str, Any]) -> None:
        self.params: Params = {}
        self._random, self._kept = random, kept

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if log:
            real = math.exp(self._random.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            drawn = min(max(round(real), low), high)
        else:
            drawn = low + step * int(self._random.integers((high - low) // step + 1))
        return int(self._note(name, drawn))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step is not None:
            # As a dimension writes its grid: 0.15, not 0.15000000000000002.
            drawn = float(f"{low + step * int(self._random.integers(round((high - low) / step) + 1)):.12g}")
        elif log:
            drawn = math.exp(self._random.uniform(math.log(low), math.log(high)))
        else:
            drawn = self._random.uniform(low, high)
        return float(self._note(name, min(max(drawn, low), high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._note(name, choices[int(self._random.integers(len(choices)))])

    def _note(self, name: str, drawn: Any) -> Any:
        self.params[name] = self._kept.get(name, drawn)
        return self.params[name]


def draw(space: SearchSpace, random: np.random.Generator, kept: Mapping[str, Any] | None = None) -> Params:
    """Parameters of one configuration, uniform on the scale of each dimension.

    Args:
        kept: values that are not drawn.
    """
    trial = _Draw(random, kept or {})
    space.sample(trial)
    return trial.params


def neighbour(space: SearchSpace, random: np.random.Generator, params: Params) -> Params:
    """The same parameters, but for one or two that are drawn again."""
    paths = list(params)
    changed = random.choice(len(paths), size=min(len(paths), int(random.integers(1, 3))), replace=False)
    again = {paths[index] for index in changed}
    return draw(space, random, {path: value for path, value in params.items() if path not in again})
