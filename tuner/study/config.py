"""The request of a study, and what the search found out at its start: `study.json`.

`StudyConfig` is the request; its defaults are those of the command line. Where Ray runs, how many lanes there are and
which loggers write belongs to one driver, not to the study: see `tuner.search.request`.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import ConfigDict, Field, JsonValue, field_serializer, model_validator

from tuner.atomic import write_json
from tuner.config import EncoderPath, Frozen, Precision, RunSettings
from tuner.errors import StudyError
from tuner.places import is_file
from tuner.space import SearchSpace
from tuner.study.events import StudyStarted
from tuner.study.folder import RECORD_FILE, StudyFolder
from tuner.study.objectives import DEFAULT_OBJECTIVES, Objective, Objectives, choose_objectives
from tuner.study.parse import parse_file, parse_json

DEFAULT_SPACE = "attention_only"
SamplerName = Literal["gp", "tpe", "nsga2", "random", "grid"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
Stopping = Literal["hopeless", "never"]


class StudyConfig(Frozen):
    """The request of a search; the same configuration and seed give the same suggestions."""

    study: str = Field(description="name of the study and of its folder")
    space: SearchSpace
    settings: RunSettings
    objectives: Objectives = Field(default=choose_objectives(DEFAULT_OBJECTIVES), min_length=1)
    trials: int = Field(default=7, ge=1, description="total number of trials, over all sessions")
    sampler: SamplerName = Field(default="gp", description="what draws new configurations")
    stopping: Stopping = Field(
        default="hopeless", description="which trials end early: those that cannot add to the front, or none"
    )
    max_parameters: int | None = Field(
        default=None, ge=1, description="configurations with more trainable parameters are not drawn"
    )
    seed: int = Field(default=0, ge=0, description="of sampler, initialisation, dropout and batches")

    @property
    def metric(self) -> Objective:
        """The first objective, which reports show."""
        return self.objectives[0]

    def plan(self, run_dir: Path, dashboard_url: str | None = None, until: datetime | None = None) -> StudyStarted:
        """The first event of a search.

        Args:
            until: when it ends at the latest; None: with its last trial.
        """
        return StudyStarted(
            study=self.study,
            space=self.space.name,
            objectives=tuple(objective.name for objective in self.objectives),
            trials=self.trials,
            epochs=self.settings.epochs,
            dashboard_url=dashboard_url,
            run_dir=str(run_dir),
            until=until,
        )

    @field_serializer("space")
    def _space_values(self, space: SearchSpace) -> dict[str, JsonValue]:
        return space.to_dict()

    @field_serializer("objectives")
    def _objective_values(self, objectives: tuple[Objective, ...]) -> list[JsonValue]:
        return [objective.to_values() for objective in objectives]


class EncoderFacts(Frozen):
    """The encoder as the study found it."""

    family: str
    source: str
    num_layers: int
    hidden_size: int
    shape: str | None = Field(default=None, description="the blocks in words")
    path: EncoderPath | None = None


class DataFacts(Frozen):
    """Clips of each split, and distinct captions."""

    train: int
    validation: int
    test: int
    captions: int


class StudyRecord(StudyConfig):
    """The content of `study.json`."""

    # A later version may add fields.
    model_config = ConfigDict(extra="ignore")

    encoder: EncoderFacts
    data: DataFacts
    created: datetime
    precision: Precision | None = Field(default=None, description="the number format that the first lane chose")
    storage: str | None = Field(default=None, description="URI of the storage that keeps studies, if any")
    sessions: int = Field(
        default=1, ge=1, description="drivers that have worked on it; of two copies, the newer has more"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_it_was(cls, values: object) -> object:
        """A record without these fields is of a version that had one sampler and trained every trial to its end."""
        return {"sampler": "tpe", "stopping": "never", **values} if isinstance(values, dict) else values

    @classmethod
    def read(cls, folder: StudyFolder) -> Self:
        """The record of a study.

        Raises:
            StudyError: there is no study in this folder, or its record is damaged; names the field.
        """
        path = folder.record
        if not is_file(path):
            raise StudyError(f"{folder.path}: no study here (no {RECORD_FILE}); `tuner search` starts one")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StudyError(f"{path}: cannot be read ({error.strerror}); make the file readable") from None
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, content: bytes, origin: str) -> Self:
        """Parse a record; `origin` names it in errors.

        Raises:
            StudyError: it is damaged; names the field.
        """
        return parse_file(cls, content, origin, "restore the file or start a new study")

    def write(self, folder: StudyFolder) -> None:
        """Write the record under a temporary name and rename it."""
        write_json(folder.record, self.model_dump(mode="json"))

    def changed(self, **values: object) -> Self:
        """The record with other values in these fields."""
        return self.model_copy(update=values)


def sessions_of(content: bytes, origin: str) -> int:
    """How many drivers have worked on the study of this record; its other fields are not checked.

    Raises:
        StudyError: the record is damaged; `origin` names it in the error.
    """
    try:
        values = parse_json(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        values = None
    sessions = values.get("sessions", 1) if isinstance(values, dict) else None
    if not isinstance(sessions, int):
        raise StudyError(f"{origin}: is damaged; restore the file or start a new study")
    return sessions
