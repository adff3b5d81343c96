"""JSON that people or other machines may have edited: parsed with limits, or refused in one sentence."""

from __future__ import annotations

import json
import math
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tuner.config import describe_validation
from tuner.errors import SpaceError, StudyError
from tuner.redact import printable

# Fits into 64 bits; no count of a study comes near.
MAX_DIGITS = 18
MAX_REASON = 300
Model = TypeVar("Model", bound=BaseModel)


def parse_json(text: str) -> object:
    """The values of a JSON text. An integer that does not fit into 64 bits becomes infinite, which no field accepts.

    Raises:
        ValueError: it is not JSON, or has half of a surrogate pair, which no file or terminal accepts.
        RecursionError: it is nested too deeply.
    """
    values: object = json.loads(text, parse_int=_whole)
    if "\\ud" in text.lower():
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    return values


def parse_file(model: type[Model], content: bytes, origin: str, remedy: str) -> Model:
    """The content of a study's file.

    Args:
        origin: names the file in errors.
        remedy: what to do, for the error.

    Raises:
        StudyError: it is damaged; names the field.
    """
    try:
        try:
            return model.model_validate(parse_json(content.decode("utf-8-sig")))
        except ValidationError as error:
            reason = describe_validation(error)
    except SpaceError as error:
        reason = f"space: {error}"
    except RecursionError:
        reason = "nested too deeply"
    except (ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
    if len(reason) > MAX_REASON:
        reason = f"{reason[:MAX_REASON]}..."
    raise StudyError(f"{origin}: is damaged ({printable(reason)}); {remedy}")


def _whole(digits: str) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf
