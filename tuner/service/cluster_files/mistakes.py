"""What is wrong with a cluster file, in sentences; and what its schema and its placeholders alone can tell."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tuner.near import nearest

PLACEHOLDER = "REPLACE"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Moving names of container images: the next node may get another Ray than the head has.
MOVING_TAGS = ("", "latest", "nightly")


class Mistake(NamedTuple):
    """One thing to fix: the place in the file as a dotted path, and what to do in one sentence."""

    where: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence}" if self.where else self.sentence


def locked_ray() -> str:
    """The Ray that the lock file installed here; every node must have the same."""
    return importlib.metadata.version("ray")


def schema_mistakes(values: object, schema: Mapping[str, Any]) -> list[Mistake]:
    """Everything a JSON schema (draft 7) has against plain values; unknown keys with the nearest known one."""
    import jsonschema

    validator = jsonschema.Draft7Validator(schema)
    mistakes: list[Mistake] = []
    for error in validator.iter_errors(values):
        where = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties":
            mistakes += _unknown_keys(where, error.instance, error.schema)
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in error.instance]
            # jsonschema reports each missing key by itself, without naming it but in its message.
            mistakes += [Mistake(_below(where, key), f"is missing; write {key}") for key in missing]
        else:
            mistakes.append(Mistake(where, f"{_shortened(error.message)}; see the file's comments for its form"))
    return sorted(set(mistakes))


def _unknown_keys(where: str, instance: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mistake]:
    known = list(schema.get("properties", {}))
    patterns = list(schema.get("patternProperties", {}))
    for key in instance:
        if key in known or any(re.search(pattern, str(key)) for pattern in patterns):
            continue
        match = nearest(str(key), known)
        hint = f"did you mean {match}?" if match else f"known are {', '.join(sorted(known))}"
        yield Mistake(_below(where, key), f"no such key; {hint}")


def _below(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _shortened(message: str) -> str:
    return message if len(message) <= 160 else f"{message[:80]} ... {message[-60:]}"


def placeholder_mistakes(values: object) -> list[Mistake]:
    """Every text that still holds what the shipped file leaves to its user."""
    return [
        Mistake(where, f"still says {PLACEHOLDER}; the file's first comment tells what belongs there")
        for where, text in texts(values)
        if PLACEHOLDER in text
    ]


def texts(values: object, where: str = "") -> Iterator[tuple[str, str]]:
    """All strings below plain values with their dotted paths, in the order of the file."""
    if isinstance(values, str):
        yield where, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from texts(value, _below(where, key))
    elif isinstance(values, Sequence):
        for index, value in enumerate(values):
            yield from texts(value, _below(where, index))


def image_mistake(where: str, image: str) -> Mistake | None:
    """A container image whose tag does not promise the Ray of the lock file."""
    name, _, tag = image.rpartition("/")[2].partition(":")
    ray = locked_ray()
    if re.search(rf"(?<![\d.]){re.escape(ray)}(?![\d.]*\d)", tag):
        return None
    if tag.partition("-")[0] in MOVING_TAGS:
        return Mistake(where, f"{image} does not pin Ray; use a tag that holds {ray}, as in {name}:{ray}")
    return Mistake(where, f"the tag of {image} is not that of Ray {ray}, which the lock has; use one that holds {ray}")
