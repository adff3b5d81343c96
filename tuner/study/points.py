"""The confirmed front: `front.json`, its points, and the metrics of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from tuner.atomic import write_json
from tuner.config import Frozen, TrialConfig
from tuner.errors import StudyError
from tuner.places import exists
from tuner.study.events import TrialId, finite
from tuner.study.folder import StudyFolder
from tuner.study.objectives import WAYS, Objectives
from tuner.study.parse import parse_file

REWRITE = "`tuner search --resume` writes it again"
Interval = tuple[float, float]
# Counts stay whole numbers.
Figure = Annotated[int | float | None, BeforeValidator(finite)]
Sides = Annotated[dict[str, Figure], BeforeValidator(lambda value: value or {})]


class Scores(BaseModel):
    """Metrics of one gallery: `recall@k` at the top, the metrics of each direction below its name.

    Attributes:
        intervals: 95 % bootstrap intervals of the flat metrics, only for the test gallery.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    audio_to_text: Sides = Field(default_factory=dict)
    text_to_audio: Sides = Field(default_factory=dict)
    intervals: dict[str, Interval] = Field(default_factory=dict)

    @classmethod
    def of(cls, metrics: dict[str, float], intervals: dict[str, Interval] | None = None) -> Scores:
        """From flat metrics such as `audio_to_text_R@10`."""
        grouped: dict[str, object] = {"intervals": intervals or {}}
        sides: dict[str, dict[str, float]] = {way: {} for way in WAYS}
        for name, value in metrics.items():
            way = next((way for way in WAYS if name.startswith(f"{way}_")), None)
            if way is None:
                grouped[name] = value
            else:
                sides[way][name.removeprefix(f"{way}_")] = value
        return cls.model_validate(grouped | sides)

    def value(self, metric: str) -> float | None:
        """A flat metric; None if it was not measured."""
        for way, side in (("audio_to_text", self.audio_to_text), ("text_to_audio", self.text_to_audio)):
            if metric.startswith(f"{way}_"):
                return side.get(metric.removeprefix(f"{way}_"))
        return finite((self.model_extra or {}).get(metric))

    def side(self, way: str) -> dict[str, float | None]:
        """The metrics of `audio_to_text` or `text_to_audio`."""
        return self.audio_to_text if way == "audio_to_text" else self.text_to_audio

    def to_values(self) -> dict[str, JsonValue]:
        """Plain values; without intervals if there are none."""
        values: dict[str, JsonValue] = self.model_dump(mode="json")
        if not self.intervals:
            del values["intervals"]
        return values


class Difference(Frozen):
    """A test metric minus the baseline's, with the interval of the paired difference."""

    difference: float
    interval: Interval


class Belief(Frozen):
    """What is believed of a trial after all trials of its study: the posterior of each measured objective.

    Attributes:
        expected, deviation: of the true validation metric, by name; the measured value was also chosen for its luck.
        probability: that no other complete trial dominates it.
        on_front: whether none does by the expected values.
    """

    expected: dict[str, float]
    deviation: dict[str, float]
    probability: float = Field(ge=0, le=1)
    on_front: bool


class Point(BaseModel):
    """A trial that was exported, and measured on the test gallery from its exported files."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    trial: TrialId
    origin: str
    config: TrialConfig
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    lora_parameters: int
    trainable_parameters: int
    validation: Scores
    test: Scores = Scores()
    adapter: str | None = None
    test_vs_baseline: Annotated[dict[str, Difference], BeforeValidator(lambda value: value or {})] = Field(
        default_factory=dict
    )
    on_front: bool
    belief: Belief | None = None

    def interval(self, metric: str) -> Interval | None:
        """The 95 % interval of a test metric, if there is one."""
        return self.test.intervals.get(metric)

    def to_values(self) -> dict[str, JsonValue]:
        """Plain values, as front.json has them."""
        values: dict[str, JsonValue] = self.model_dump(mode="json", exclude={"validation", "test"})
        return values | {"validation": self.validation.to_values(), "test": self.test.to_values()}


class ConfirmedFront(BaseModel):
    """The content of `front.json`: the front, and the reference points that every study measures.

    Attributes:
        baseline: the trial that differences are relative to, if it was measured.
        trials: number of trials that the front was chosen from; a study may be extended later.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    study: str
    objectives: Objectives
    baseline: TrialId | None = None
    trials: int | None = None
    points: tuple[Point, ...]

    @model_validator(mode="after")
    def _once(self) -> Self:
        names = [point.trial for point in self.points]
        if len(set(names)) != len(names):
            raise ValueError("points has a trial twice")
        return self

    @property
    def on_front(self) -> list[Point]:
        """The points that no other point dominates."""
        return [point for point in self.points if point.on_front]

    @classmethod
    def read(cls, folder: StudyFolder) -> Self | None:
        """The front of a study; None before it is confirmed.

        Raises:
            StudyError: the file is damaged, or names an adapter outside the study; names the field.
        """
        path = folder.front
        if not exists(path):
            return None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StudyError(f"{path}: cannot be read ({error.strerror}); {REWRITE}") from None
        front = parse_file(cls, content, str(path), REWRITE)
        for point in front.points:
            if point.adapter and not _inside(folder.path, point.adapter):
                reason = f"adapter of {point.trial}: {point.adapter!r} is outside the study"
                raise StudyError(f"{path}: is damaged ({reason}); {REWRITE}")
        return front

    def write(self, folder: StudyFolder) -> None:
        """Write the file under a temporary name and rename it."""
        write_json(folder.front, self.to_values())

    def to_values(self) -> dict[str, JsonValue]:
        """Plain values, as the file has them."""
        objectives: list[JsonValue] = [objective.to_values() for objective in self.objectives]
        return {
            "study": self.study,
            "objectives": objectives,
            "baseline": self.baseline,
            "trials": self.trials,
            "points": [point.to_values() for point in self.points],
        }


def _inside(folder: Path, name: str) -> bool:
    """Whether a path stays below a folder; a front may come from an untrusted place, and its paths are joined to it."""
    if "\0" in name:
        return False
    # Not `Path.resolve`, which fails at links that lead to themselves.
    return Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))
