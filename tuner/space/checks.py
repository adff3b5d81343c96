"""Checks of a search space beyond the schema of its file; each error is one sentence that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from tuner import near
from tuner.errors import SpaceError
from tuner.space.dimension import TARGETS, Choice, FloatRange, IntRange, check_value, searchable_fields

REQUIRED_LORA = ("lora.rank", TARGETS)
DIMENSION_KEYS = {
    "choice": ["choice", "when"],
    "int": ["int", "step", "log", "when"],
    "float": ["float", "step", "log", "when"],
}
TargetSets = Mapping[str, tuple[str, ...]]
Dimensions = Mapping[str, Choice | IntRange | FloatRange]


def check_space(target_sets: TargetSets, fixed: Mapping[str, Any], dimensions: Dimensions) -> None:
    """Check names, values, ranges and conditions of a space against each other and against `TrialConfig`.

    Raises:
        SpaceError: one sentence about the first wrong field.
    """
    for name, modules in target_sets.items():
        if not modules or len(set(modules)) < len(modules):
            raise SpaceError(f"target_sets: {name} is empty or lists a module twice; list each module once")
    for where, paths in (("fixed", fixed), ("dimensions", dimensions)):
        for path in paths:
            _check_path(where, path)
            if path in fixed and path in dimensions:
                raise SpaceError(f"{path} is both under fixed and under dimensions; keep one")
    for path, value in fixed.items():
        _check_field("fixed", path, value, target_sets)
    for path, dimension in dimensions.items():
        _check_dimension(path, dimension, target_sets)
        for other, values in dimension.when.items():
            _check_condition(path, other, values, dimensions)
    _check_lora(fixed, dimensions)


def check_start(number: int, params: Mapping[str, Any], dimensions: Dimensions) -> None:
    """Check a configuration of `start`: a value of its range for each dimension that is on, and nothing else.

    Raises:
        SpaceError: names the entry, counted from 1, and the dimension.
    """
    where = f"start: entry {number}"
    for path in params:
        if path not in dimensions:
            raise SpaceError(
                f"{where} has {near.shown(path)}, which is no dimension{nearest(path, dimensions)}; put "
                "values that are not searched under fixed"
            )
    on: dict[str, Any] = {}
    for path, dimension in dimensions.items():
        if not dimension.active(on):
            if path in params:
                raise SpaceError(f"{where} has {path}, which is off by its condition; drop it")
            continue
        if path not in params:
            raise SpaceError(f"{where} lacks {path}; give a value for each dimension")
        if dimension.locate(params[path]) is None:
            raise SpaceError(
                f"{where} has {path} {near.shown(params[path])}, which is outside its range or grid; change it"
            )
        on[path] = params[path]


def resolve_modules(targets: object, target_sets: TargetSets) -> tuple[str, ...]:
    """The modules of a target set, a single module or an explicit list."""
    if isinstance(targets, str):
        return target_sets.get(targets, (targets,))
    return tuple(targets) if isinstance(targets, list | tuple) else ()


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for error messages, empty if no known word is similar to `word`."""
    match = near.nearest(word, known)
    return f" (did you mean {match}?)" if match else ""


def describe(error: ValidationError, top_level: list[str]) -> str:
    """The first error that pydantic reports, as one sentence in the words of the file."""
    first = error.errors()[0]
    location = [str(part)[:60] for part in first["loc"]]
    if not location:
        return f"is not a search space; write the keys {', '.join(top_level)}"
    # A dimension is a tagged union: the tag after its path is not a key that the user wrote.
    tag = location.pop(2) if location[0] == "dimensions" and len(location) > 2 else None
    where, key = ": ".join(location[:2]), location[-1]
    if first["type"] == "extra_forbidden":
        known = DIMENSION_KEYS[tag] if tag else top_level
        holder = ": ".join(location[:-1])
        unknown = f"{holder} has the unknown key {near.shown(key)}" if holder else f"unknown key {near.shown(key)}"
        return f"{unknown}{nearest(key, known)}; use {', '.join(known)}"
    if first["type"] == "missing":
        return f"{key} is missing; write {key}: ..."
    if first["type"] == "dimension_kind":
        return f"{where}: {first['msg']}"
    said = first["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    detail = f" {'.'.join(location[2:3])}" if len(location) > 2 else ""
    return f"{where}{detail} cannot be {near.shown(first['input'])}: {said}"


def _check_path(where: str, path: str) -> None:
    if path == "seed":
        raise SpaceError(f"{where}: seed is not a hyperparameter; drop it, the search gives each trial its own seed")
    if path not in searchable_fields():
        hint = nearest(path, searchable_fields())
        raise SpaceError(
            f"{where}: {path[:60]} is not a field of a trial{hint}; use one of {', '.join(searchable_fields())}"
        )


def _check_field(where: str, path: str, value: object, target_sets: TargetSets) -> None:
    try:
        check_value(path, _known_modules(value, target_sets) if path == TARGETS else value)
    except SpaceError as error:
        raise SpaceError(f"{where}: {path} {error}") from None


def _known_modules(value: object, target_sets: TargetSets) -> object:
    """Resolve a target set or module name; an explicit list, which only `fixed` allows, is not changed."""
    if not isinstance(value, str):
        return resolve_modules(value, target_sets)
    modules = {module for listed in target_sets.values() for module in listed}
    if value not in target_sets and value not in modules:
        hint = nearest(value, [*target_sets, *sorted(modules)])
        raise SpaceError(
            f"has {near.shown(value)}, which is neither a target set nor a module of one{hint}; "
            "declare it under target_sets"
        )
    return resolve_modules(value, target_sets)


def _check_dimension(path: str, dimension: Choice | IntRange | FloatRange, target_sets: TargetSets) -> None:
    try:
        dimension.check()
    except SpaceError as error:
        raise SpaceError(f"dimensions: {path} {error}") from None
    # Every bound of TrialConfig is an interval, so a range is valid if its ends are.
    for value in dimension.choice if isinstance(dimension, Choice) else dimension.bounds:
        _check_field("dimensions", path, value, target_sets)
    if path == TARGETS:
        resolved = [tuple(sorted(resolve_modules(value, target_sets))) for value in dimension.values()]
        if len(set(resolved)) < len(resolved):
            raise SpaceError(f"dimensions: {path} lists two names for the same modules; keep one")


def _check_condition(path: str, other: str, values: tuple[Any, ...], dimensions: Dimensions) -> None:
    where = f"dimensions: {path} has a condition on {other}, which"
    if other not in dimensions:
        hint = nearest(other, dimensions)
        raise SpaceError(f"{where} is not searched{hint}; name a dimension of this file or drop the condition")
    if _depends_on(other, path, dimensions):
        raise SpaceError(f"{where} itself depends on {path}; drop one of the two conditions")
    order = list(dimensions)
    if order.index(other) > order.index(path):
        raise SpaceError(f"{where} comes later in the file; move {other} above {path}")
    controller = dimensions[other]
    if not isinstance(controller, Choice):
        raise SpaceError(f"{where} is a range; write it as a choice")
    missing = [value for value in values if controller.locate(value) is None]
    if missing or not values:
        never = repr(missing[0]) if missing else "any of no values"
        raise SpaceError(f"{where} is never {never}; its values are {', '.join(map(repr, controller.choice))}")


def _depends_on(path: str, target: str, dimensions: Dimensions) -> bool:
    """Whether following conditions from `path` leads to `target`."""
    seen: set[str] = set()
    pending = [path]
    while pending:
        current = pending.pop()
        if current == target:
            return True
        if current in dimensions and current not in seen:
            seen.add(current)
            pending.extend(dimensions[current].when)
    return False


def _check_lora(fixed: Mapping[str, Any], dimensions: Dimensions) -> None:
    if not any(path.startswith("lora.") for path in (*fixed, *dimensions)):
        return
    for path in REQUIRED_LORA:
        if path not in fixed and path not in dimensions:
            raise SpaceError(f"{path} is missing, but LoRA needs it; add it under fixed or under dimensions")
        if path in dimensions and dimensions[path].when:
            raise SpaceError(f"dimensions: {path} has a condition, but LoRA always needs it; drop the condition")
