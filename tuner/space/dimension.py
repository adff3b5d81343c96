"""One dimension of a search space: a choice, or a range of whole or real numbers, with an optional condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Protocol, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    TypeAdapter,
    ValidationError,
)

from tuner.config import Frozen, TrialConfig
from tuner.errors import SpaceError
from tuner.near import shown

TARGETS = "lora.targets"
PLACEMENT = "lora.placement"


def _scalar(value: object) -> object:
    """A union of strict types would report an error only for the first of them."""
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("write text, a finite number, true or false")
    return value


Scalar = Annotated[bool | int | float | str, PlainValidator(_scalar)]
# YAML writes whole numbers without a point; a range of real numbers accepts them, too.
Real = StrictInt | StrictFloat


class SuggestProtocol(Protocol):
    """The part of `optuna.Trial` that a space needs; any searcher can implement it."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


def _as_tuples(when: object) -> object:
    """`{head.kind: mlp}` and `{head.kind: [mlp]}` mean the same."""
    if not isinstance(when, dict):
        return when
    return {path: value if isinstance(value, list | tuple) else (value,) for path, value in when.items()}


class Condition(Frozen):
    """Base of all dimensions: searched only if each dimension in `when` has one of the listed values."""

    when: Annotated[dict[str, tuple[Scalar, ...]], BeforeValidator(_as_tuples)] = Field(default_factory=dict)

    def active(self, params: dict[str, Any]) -> bool:
        """Whether the parameters chosen so far meet every condition; an inactive dimension meets none."""
        return all(path in params and params[path] in values for path, values in self.when.items())


class Choice(Condition):
    """One of the listed values; the sampler sees no order between them, so ordered numbers belong in a range."""

    choice: tuple[Scalar, ...]

    def check(self) -> None:
        """Refuse an empty list, or a value listed twice.

        Raises:
            SpaceError: its text continues "<field> ".
        """
        if not self.choice:
            raise SpaceError("has an empty choice; list at least one value")
        if len(set(self.choice)) < len(self.choice):
            raise SpaceError(f"lists a value twice in {list(self.choice)}; list each once")

    def suggest(self, trial: SuggestProtocol, name: str) -> Any:
        """Ask the trial for one value."""
        return trial.suggest_categorical(name, self.choice)

    def locate(self, value: object) -> Any | None:
        """The listed value that equals `value`, or None."""
        return next((item for item in self.choice if item == value), None)

    def count(self) -> int:
        return len(self.choice)

    def values(self) -> Sequence[Any]:
        """All values."""
        return self.choice

    def ends(self) -> Sequence[Any]:
        """Smallest and largest value of numbers; all values of anything else."""
        if all(isinstance(value, int | float) for value in self.choice):
            return (min(self.choice), max(self.choice))
        return self.choice


class IntRange(Condition):
    """A whole number from low to high inclusive: on a grid of `step`, or uniform in its logarithm."""

    bounds: tuple[StrictInt, StrictInt] = Field(alias="int")
    step: StrictInt = 1
    log: StrictBool = False

    def check(self) -> None:
        """Refuse an empty range, a step that does not divide it, or a logarithm of values that are not positive.

        Raises:
            SpaceError: its text continues "<field> ".
        """
        _check_range("int", self.bounds, self.step, self.log)
        if self.log and self.step != 1:
            raise SpaceError("has both log and step; keep one")

    def suggest(self, trial: SuggestProtocol, name: str) -> int:
        """Ask the trial for one value."""
        return trial.suggest_int(name, *self.bounds, step=self.step, log=self.log)

    def locate(self, value: object) -> int | None:
        """`value` if it is a whole number on the grid, or None."""
        low, high = self.bounds
        inside = isinstance(value, int | float) and low <= value <= high and (value - low) % self.step == 0
        return int(value) if inside and isinstance(value, int | float) else None

    def count(self) -> int:
        return len(self.values())

    def values(self) -> Sequence[int]:
        """All values."""
        return range(self.bounds[0], self.bounds[1] + 1, self.step)

    def ends(self) -> Sequence[int]:
        return self.bounds


class FloatRange(Condition):
    """A real number from low to high inclusive: on a grid of `step`, uniform, or uniform in its logarithm."""

    bounds: tuple[Real, Real] = Field(alias="float")
    step: Real | None = None
    log: StrictBool = False

    def check(self) -> None:
        """Refuse an empty range, a step that does not divide it, or a logarithm of values that are not positive.

        Raises:
            SpaceError: its text continues "<field> ".
        """
        _check_range("float", self.bounds, self.step, self.log)
        if self.log and self.step is not None:
            raise SpaceError("has both log and step; keep one")

    def suggest(self, trial: SuggestProtocol, name: str) -> float:
        """Ask the trial for one value."""
        return self._tidy(trial.suggest_float(name, *self.bounds, step=self.step, log=self.log))

    def locate(self, value: object) -> float | None:
        """`value` if it is inside the range and, up to rounding, on the grid, or None."""
        if not isinstance(value, int | float) or not self.bounds[0] <= value <= self.bounds[1]:
            return None
        if self.step is None:
            return float(value)
        nearest = self.bounds[0] + round((value - self.bounds[0]) / self.step) * self.step
        return self._tidy(nearest) if math.isclose(nearest, value, abs_tol=1e-6 * self.step) else None

    def count(self) -> int | None:
        """Number of values; None if they are continuous."""
        if self.step is None:
            return None
        return round((self.bounds[1] - self.bounds[0]) / self.step) + 1

    def values(self) -> Sequence[float]:
        """All values of a grid; the ends of a continuous range."""
        if self.step is None:
            return self.ends()
        return [self._tidy(self.bounds[0] + index * self.step) for index in range(self.count() or 0)]

    def ends(self) -> Sequence[float]:
        return self.bounds

    def _tidy(self, value: float) -> float:
        """Write 0.15 instead of 0.15000000000000002, which adding steps gives."""
        return float(value) if self.step is None else float(f"{value:.12g}")


def _kind(raw: object) -> str | None:
    """Which of the three kinds a mapping describes; None if it has none of their keys, or several."""
    if isinstance(raw, Choice):
        return "choice"
    if isinstance(raw, IntRange | FloatRange):
        return "int" if isinstance(raw, IntRange) else "float"
    named = [key for key in ("choice", "int", "float") if isinstance(raw, dict) and key in raw]
    return named[0] if len(named) == 1 else None


Dimension = Annotated[
    Annotated[Choice, Tag("choice")] | Annotated[IntRange, Tag("int")] | Annotated[FloatRange, Tag("float")],
    Discriminator(
        _kind,
        custom_error_type="dimension_kind",
        custom_error_message="give exactly one of choice: [...], int: [low, high] and float: [low, high]",
    ),
]


@cache
def searchable_fields() -> dict[str, TypeAdapter[Any]]:
    """Validator of every field of `TrialConfig` by dotted path, without the seed, which is not a hyperparameter."""
    fields = _leaves(TrialConfig, "")
    del fields["seed"]
    return fields


def check_value(path: str, value: object) -> None:
    """Check one value against the type and bounds of its field in `TrialConfig`.

    Raises:
        SpaceError: the value is wrong; its text continues "<field> ".
    """
    try:
        searchable_fields()[path].validate_python(value, strict=True)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        hint = ""
        if isinstance(value, str) and _is_number(value):
            hint = "; YAML reads this as text, so write it with a point and without quotes, such as 1.0e-3"
        raise SpaceError(f"cannot be {shown(value)}: {said[0].lower()}{said[1:]}{hint}") from None


def _leaves(model: type[BaseModel], prefix: str) -> dict[str, TypeAdapter[Any]]:
    found: dict[str, TypeAdapter[Any]] = {}
    for name, info in model.model_fields.items():
        candidates = (info.annotation, *get_args(info.annotation))
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if nested:
            found |= _leaves(nested[0], f"{prefix}{name}.")
        else:
            # A TypeAdapter needs its own configuration to have the model's rule of finite numbers.
            adapter: TypeAdapter[Any] = TypeAdapter(info.rebuild_annotation(), config=ConfigDict(allow_inf_nan=False))
            found[f"{prefix}{name}"] = adapter
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_range(kind: str, bounds: tuple[float, float], step: float | None, log: bool) -> None:
    low, high = bounds
    if not low < high:
        raise SpaceError(f"has the empty range {kind}: [{low}, {high}]; give low < high, or put the value under fixed")
    if log and low <= 0:
        raise SpaceError(f"has log: true with a range from {low}; start the range above 0, or drop log")
    if step is None:
        return
    if not 0 < step <= high - low:
        raise SpaceError(f"has step {step}; give a step above 0 and at most the width of the range, {high - low:g}")
    steps = (high - low) / step
    if not math.isclose(steps, round(steps), rel_tol=1e-9):
        raise SpaceError(f"has step {step}, which does not divide the range from {low} to {high}; change one of them")
