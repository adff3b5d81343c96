"""What happens in a study, as typed events with one JSON form.

The journal, `tuner search --json`, a job's log and the live page all hold these lines. `read_event` also reads the
journals of version 0.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Protocol, Self, TypeAlias

from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter, ValidationError, field_validator

from tuner.config import Frozen, TrialConfig
from tuner.errors import ConfigError
from tuner.study.objectives import KNOWN, choose_objectives
from tuner.study.parse import parse_json

# Origins of a trial: the projection alone and the recommended LoRA, which every study measures, or the sampler.
BASELINE, RECOMMENDED, SAMPLED = "projection_only", "recommended", "sampled"
# Of the configurations that a space names itself: `start_1` and so on.
STARTED = "start"
# Names of trials become names of files and folders, and an event may come from an untrusted place.
TRIAL_PATTERN = r"^t\d{4,9}$"
EndState = Literal["complete", "stopped", "failed"]
State = Literal["running", "complete", "stopped", "failed"]
STATES: tuple[State, ...] = ("running", "complete", "failed", "stopped")
# Longer than any event.
MAX_LINE = 10_000_000


def trial_id(number: int) -> str:
    """The name of a trial in every file and view: `t0007`."""
    return f"t{number:04d}"


def trial_number(trial: str) -> int:
    """The number in a trial's name."""
    return int(trial[1:])


def finite(value: object) -> float | None:
    """The value if it is a finite number; None for anything else (JSON has neither NaN nor infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


TrialId = Annotated[str, StringConstraints(pattern=TRIAL_PATTERN)]
Number = Annotated[float | None, BeforeValidator(finite)]


class _Event(Frozen):
    def to_json(self) -> str:
        """The event as one line."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False)


class StudyStarted(_Event):
    """A search starts or resumes; `trials` and `epochs` are the plan."""

    event: Literal["study_started"] = "study_started"
    study: str
    space: str
    objectives: tuple[str, ...]
    trials: int
    epochs: int = Field(description="of each trial")
    dashboard_url: str | None = None
    run_dir: str
    until: datetime | None = Field(default=None, description="when it ends at the latest, if its time is limited")

    @field_validator("objectives")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse unknown objectives: views compare by them, and an event may come from another version."""
        try:
            choose_objectives(names)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return names


class TrialStarted(_Event):
    """A trial was given its configuration; `known` has its costs, which follow from the configuration."""

    event: Literal["trial_started"] = "trial_started"
    trial: TrialId
    origin: str
    config: TrialConfig
    known: dict[str, float] = Field(default_factory=dict)


class EpochDone(_Event):
    """A trial was trained for one more epoch and measured on validation. A value that is not finite is None."""

    event: Literal["epoch_done"] = "epoch_done"
    trial: TrialId
    epoch: int = Field(ge=1, description="counted from 1")
    loss: Number = Field(default=None, description="mean training loss")
    metrics: dict[str, Number] = Field(default_factory=dict)
    train_seconds: Number = None
    validation_seconds: Number = None
    clips_per_second: Number = None
    logit_scale: Number = None
    warning: str | None = None
    ranks: str | None = Field(default=None, description="of validation queries, see `QueryRanks`")

    @property
    def seconds(self) -> float:
        """Wall time of training and validation."""
        return (self.train_seconds or 0.0) + (self.validation_seconds or 0.0)

    def metric(self, name: str) -> float:
        """A metric; NaN if it was not measured."""
        value = self.metrics.get(name)
        return math.nan if value is None else value

    @classmethod
    def from_row(cls, trial: str, row: Mapping[str, object]) -> Self:
        """Build from the flat row that a lane measures and a checkpoint stores.

        Raises:
            ValidationError: the row has no epoch.
        """
        own = {name: value for name, value in row.items() if name in _ROW_FIELDS}
        metrics = {
            name: value for name, value in row.items() if name not in _ROW_FIELDS and name.startswith(METRIC_PREFIXES)
        }
        return cls.model_validate({"trial": trial, "metrics": metrics, **own})


_ROW_FIELDS = frozenset(EpochDone.model_fields) - {"event", "trial", "metrics"}
METRIC_PREFIXES = ("recall@", "audio_to_text_", "text_to_audio_")


class TrialEnded(_Event):
    """A trial has ended; `reason` is why it failed or was stopped."""

    event: Literal["trial_ended"] = "trial_ended"
    trial: TrialId
    state: EndState
    reason: str | None = None


class FrontChanged(_Event):
    """The front of the complete trials has changed."""

    event: Literal["front_changed"] = "front_changed"
    trials: tuple[TrialId, ...]


class Message(_Event):
    """A sentence for people."""

    event: Literal["message"] = "message"
    text: str


TrialEvent: TypeAlias = TrialStarted | EpochDone | TrialEnded
Event: TypeAlias = StudyStarted | TrialEvent | FrontChanged | Message
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


class View(Protocol):
    """Shows the events of a search in order; a resumed study shows its past first."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


def parse_line(line: str) -> dict[str, object] | None:
    """The JSON object of a line; None if the line has none or is incomplete."""
    if len(line) > MAX_LINE:
        return None
    try:
        values = parse_json(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_event(values: Mapping[str, object]) -> Event | None:
    """The event of a JSON object; None if it is not an event."""
    try:
        return _ADAPTER.validate_python(_current_form(values))
    except (ValidationError, ValueError, RecursionError):
        return None


def _current_form(values: Mapping[str, object]) -> Mapping[str, object]:
    """An event of a version 0.1 journal in today's form."""
    match values.get("event"):
        case "trial":
            return {**values, "event": "trial_started"}
        case "end":
            return {**values, "event": "trial_ended"}
        case "epoch":
            row, trial = values.get("row"), values.get("trial")
            if isinstance(row, dict) and isinstance(trial, str):
                return EpochDone.from_row(trial, row).model_dump()
    return values


def known_in_row(values: Mapping[str, object]) -> dict[str, float]:
    """Costs that a version 0.1 journal holds in each epoch instead of with the trial."""
    row = values.get("row")
    if not isinstance(row, dict):
        return {}
    return {name: value for name in KNOWN if (value := finite(row.get(name))) is not None}
