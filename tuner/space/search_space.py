"""A search space: its YAML form, and the configurations in it.

    name: example                    # the file's own name
    description: What it explores.
    target_sets: {query_value: [q_proj, v_proj]}
    fixed: {head.kind: linear}
    dimensions:
      lora.rank: {int: [2, 64], log: true}
      lora.targets: {choice: [query_value, v_proj]}
      lora.dropout: {float: [0.0, 0.2], step: 0.05}
      loss.learn_temperature: {choice: [true, false]}
      loss.temperature: {float: [0.03, 0.12], log: true, when: {loss.learn_temperature: false}}

Dimensions are dotted paths of `TrialConfig`, sampled in the order of the file. A field keeps its default if it is not
fixed, not searched, or off by its condition. Values of `lora.targets` are target sets, or modules of a target set. A
space without any `lora.*` field trains only the projection.

`start` lists configurations that a study trains first, each a value for every dimension that is on:

    start:
      - {lora.rank: 8, lora.targets: v_proj, lora.dropout: 0.1, loss.learn_temperature: true}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from tuner.config import Frozen, LoraSpec, TrialConfig, read_yaml
from tuner.errors import ConfigError, SpaceError
from tuner.space.checks import check_space, check_start, describe, resolve_modules
from tuner.space.dimension import PLACEMENT, TARGETS, Dimension, SuggestProtocol

# Fields that decide which modules are adapted, fields that never change the parameter count, and fields that raise it.
STRUCTURAL = frozenset({TARGETS, "lora.first_layer", PLACEMENT})
COUNT_NEUTRAL = frozenset({"lora.alpha_ratio", "lora.dropout", "lora.rslora", "loss.temperature", "pooling"})
GROWS_WITH = frozenset({"lora.rank", "head.hidden"})
MAX_COMBINATIONS = 10_000
# Parameters of a trial by dotted path; each is whatever its dimension allows.
Params = dict[str, Any]


class SearchSpace(Frozen):
    """A validated space: what is fixed, what is searched, and under which conditions."""

    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    target_sets: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    fixed: dict[str, Any] = Field(default_factory=dict)
    dimensions: dict[str, Dimension] = Field(min_length=1)
    start: tuple[dict[str, Any], ...] = Field(default=(), description="the user's own configurations, trained first")

    @model_validator(mode="after")
    def _check(self) -> SearchSpace:
        """Check what needs more than one field; a SpaceError passes through pydantic unchanged."""
        check_space(self.target_sets, self.fixed, self.dimensions)
        for number, params in enumerate(self.start, start=1):
            check_start(number, params, self.dimensions)
        return self

    def starts(self) -> list[TrialConfig]:
        """The configurations of `start`."""
        return [self.build(dict(params)) for params in self.start]

    @classmethod
    def from_dict(cls, values: object, origin: str) -> SearchSpace:
        """Build from plain values, as read from YAML or from a study's record; `origin` names them in errors.

        Raises:
            SpaceError: one sentence about the first wrong field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpaceError(f"{origin}: {describe(error, list(cls.model_fields))}") from None
        except SpaceError as error:
            raise SpaceError(f"{origin}: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> SearchSpace:
        """Read a YAML file; its name must be the name of the space.

        Raises:
            SpaceError: the file cannot be read, is not YAML, or is not a valid space.
        """
        try:
            values = read_yaml(path)
        except ConfigError as error:
            raise SpaceError(str(error)) from None
        space = cls.from_dict(values, str(path))
        if space.name != path.stem:
            raise SpaceError(f"{path}: name is {space.name!r} but the file is {path.name!r}; make them the same")
        return space

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def to_yaml(self) -> str:
        """The space as YAML that `from_file` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    @property
    def placements(self) -> tuple[str, ...]:
        """The parts that its trials adapt: `tower`, `language_model`, `both`; none if they have no LoRA."""
        if TARGETS not in self.fixed and TARGETS not in self.dimensions:
            return ()
        if PLACEMENT in self.dimensions:
            return tuple(map(str, self.dimensions[PLACEMENT].values()))
        return (str(self.fixed.get(PLACEMENT, "tower")),)

    def with_placement(self, placement: str) -> SearchSpace:
        """The same space with this placement for all of its trials, instead of the file's.

        Raises:
            SpaceError: there is no such placement, or the rest of the space does not allow it.
        """
        values = self.to_dict()
        values["fixed"] = {**values.get("fixed", {}), PLACEMENT: placement}
        values["dimensions"].pop(PLACEMENT, None)
        return SearchSpace.from_dict(values, f"space {self.name} with placement {placement}")

    def sample(self, trial: SuggestProtocol) -> TrialConfig:
        """Ask the trial for each active dimension, by dotted path and in file order, and build the configuration."""
        params: dict[str, Any] = {}
        for path, dimension in self.dimensions.items():
            if dimension.active(params):
                params[path] = dimension.suggest(trial, path)
        return self.build(params)

    def build(self, params: dict[str, Any]) -> TrialConfig:
        """The configuration with these trial parameters: the inverse of `params_of`.

        Raises:
            ConfigError: the parameters are not of this space.
        """
        nested: dict[str, Any] = {}
        for path, value in {**self.fixed, **params}.items():
            group, _, field = path.rpartition(".")
            holder = nested.setdefault(group, {}) if group else nested
            holder[field] = resolve_modules(value, self.target_sets) if path == TARGETS else value
        return TrialConfig.parse(nested, f"space {self.name}")

    def params_of(self, config: TrialConfig) -> dict[str, Any] | None:
        """The trial parameters that give `config` (its seed does not matter), or None if it is outside this space.

        The order of target modules does not matter. Their names do: an alias counts as another module.
        """
        wanted = _flat(config)
        params: dict[str, Any] = {}
        for path, dimension in self.dimensions.items():
            if not dimension.active(params):
                continue
            value = self._target_name(wanted[path]) if path == TARGETS else dimension.locate(wanted[path])
            if value is None:
                return None
            params[path] = value
        # Fields that are not searched must match exactly; a searched value may differ by rounding on its grid.
        rest = {path: value for path, value in _flat(self.build(params)).items() if path not in params}
        return params if all(wanted[path] == value for path, value in rest.items()) else None

    def size(self, countable_only: bool = False) -> int | None:
        """Number of distinct configurations; None if a dimension is continuous, unless only countable ones count."""
        continuous = {path for path, dimension in self.dimensions.items() if dimension.count() is None}
        if continuous and not countable_only:
            return None
        free = self.dimensions.keys() - self._controllers() - continuous
        total = 0
        for params in self._combinations(lambda path: self.dimensions[path].ends()[:1]):
            total += math.prod(self.dimensions[path].count() or 1 for path in free & params.keys())
        return total

    def parameter_range(self, count: Callable[[TrialConfig], int]) -> tuple[int, int]:
        """Exact smallest and largest number of trainable parameters over the space.

        `count` gives the number of one configuration. It is called for every combination of the dimensions that
        change it. It grows with rank and head width, so only their ends are tried; learning rates, dropout and the
        like do not change it and are not tried. Errors of `count` (a target that the encoder lacks) pass through.

        Raises:
            SpaceError: there are more than 10,000 such combinations.
        """

        def tried(path: str) -> Sequence[Any]:
            dimension = self.dimensions[path]
            if path in COUNT_NEUTRAL or path.startswith("optim."):
                return dimension.ends()[:1]
            return dimension.ends() if path in GROWS_WITH else dimension.values()

        counts = [count(self.build(params)) for params in self._combinations(tried)]
        return min(counts), max(counts)

    def validate_for(self, check: Callable[[TrialConfig], None]) -> None:
        """Run `check` on every combination of targets, first layer and conditions, before training starts.

        `check` raises for a configuration that cannot be placed in the encoder.

        Raises:
            SpaceError: there are more than 10,000 such combinations.
        """

        def tried(path: str) -> Sequence[Any]:
            dimension = self.dimensions[path]
            return dimension.values() if path in STRUCTURAL else dimension.ends()[:1]

        for params in self._combinations(tried):
            check(self.build(params))

    def _controllers(self) -> set[str]:
        """Dimensions that a condition refers to."""
        return {path for dimension in self.dimensions.values() for path in dimension.when}

    def _combinations(self, tried: Callable[[str], Sequence[Any]]) -> Iterator[dict[str, Any]]:
        """Every active combination of the tried values of each dimension; of controllers, all values are tried."""
        controllers = self._controllers()
        paths = list(self.dimensions)

        def extend(index: int, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
            if index == len(paths):
                yield params
                return
            path = paths[index]
            dimension = self.dimensions[path]
            if not dimension.active(params):
                yield from extend(index + 1, params)
                return
            for value in dimension.values() if path in controllers else tried(path):
                yield from extend(index + 1, {**params, path: value})

        for visited, params in enumerate(extend(0, {})):
            if visited == MAX_COMBINATIONS:
                raise SpaceError(
                    f"space {self.name}: has more than {MAX_COMBINATIONS:,} combinations of targets, layers and sizes; "
                    "list fewer values"
                )
            yield params

    def _target_name(self, modules: object) -> str | None:
        """The searched name of these modules (sorted), or None."""
        for name in self.dimensions[TARGETS].values():
            if sorted(resolve_modules(name, self.target_sets)) == modules:
                return str(name)
        return None


def _flat(config: TrialConfig) -> dict[str, Any]:
    """Values by dotted path, without the seed, targets in sorted order; without LoRA its fields are None."""
    flat: dict[str, Any] = {}
    for name, field in config.model_dump(exclude={"seed"}).items():
        if isinstance(field, dict):
            flat |= {f"{name}.{key}": value for key, value in field.items()}
        else:
            flat[name] = field
    if config.lora is None:
        del flat["lora"]
        flat |= dict.fromkeys(f"lora.{key}" for key in LoraSpec.model_fields)
    else:
        flat[TARGETS] = sorted(config.lora.targets)
    return flat
