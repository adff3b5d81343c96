"""A run folder as the report needs it: trials summed up from their epochs, and the confirmed front when it is there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuner.arrow import check_plain
from tuner.config import TrialConfig
from tuner.errors import StudyError
from tuner.pareto import Direction, pareto_front
from tuner.records import FRONT_FILE, JOURNAL_FILE, STUDY_FILE, TRIALS_FILE, History, read_study

PARAMETERS = "trainable_parameters"
RECOMMENDED = "recommended"
REWRITE = "`tuner search --resume` writes it again"
_RECORD_FIELDS = ("study", "space", "settings", "objectives", "encoder", "data", "created", "seed")
_CONFIG_GROUPS = frozenset(TrialConfig.model_fields)


@dataclass(frozen=True)
class TrialSummary:
    """One trial after its last epoch; `value` is the objective the report speaks of, None before the first epoch."""

    trial: str
    origin: str
    state: str
    reason: str | None
    epochs: int
    objectives: tuple[float, ...]  # NaN where there is no result yet
    value: float | None
    loss: float | None
    parameters: int | None
    lora_parameters: int | None
    seconds: float
    config: dict[str, Any]  # by dotted path


@dataclass(frozen=True)
class Run:
    """Everything known of a study; `front` is None until the search has confirmed it on the test gallery."""

    folder: Path
    study: dict[str, Any]
    rows: list[dict[str, Any]]
    front: dict[str, Any] | None
    elsewhere: bool = False  # on a cluster, from which `tuner export` brings the adapters

    @property
    def name(self) -> str:
        return str(self.study["study"])

    @cached_property
    def objectives(self) -> list[tuple[str, Direction]]:
        """Metric and direction, the one the report speaks of first."""
        found = [(str(item["metric"]), item["direction"]) for item in self.study["objectives"]]
        # A quality comes before a cost, whichever was named first on the command line.
        return sorted(found, key=lambda objective: objective[0] == PARAMETERS)

    @property
    def metric(self) -> str:
        return self.objectives[0][0]

    @property
    def direction(self) -> Direction:
        return self.objectives[0][1]

    @cached_property
    def trials(self) -> list[TrialSummary]:
        """All trials in the order of their numbers."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(self.rows, key=lambda row: (row["number"], row.get("epoch") or 0)):
            grouped.setdefault(row["trial"], []).append(row)
        return [self._summary(rows) for rows in grouped.values()]

    @cached_property
    def measured(self) -> list[TrialSummary]:
        """Trials with a value and a parameter count that did not fail."""
        return [
            trial for trial in self.trials if trial.value is not None and trial.parameters and trial.state != "failed"
        ]

    @cached_property
    def on_front(self) -> set[str]:
        """Trials on the front: the confirmed one, or else that of the finished trials so far."""
        if self.front is not None:
            return {point["trial"] for point in self.front["points"] if point["on_front"]}
        finished = [trial for trial in self.measured if trial.state == "complete"]
        values = [trial.objectives for trial in finished]
        return {finished[i].trial for i in pareto_front(values, [direction for _, direction in self.objectives])}

    @cached_property
    def searched(self) -> list[str]:
        """Dotted paths that took at least two values."""
        paths = dict.fromkeys(path for trial in self.measured for path in trial.config)
        return [path for path in paths if len({trial.config.get(path) for trial in self.measured} - {None}) > 1]

    def setting(self, trial: TrialSummary, path: str) -> Any:
        """A value of a trial's configuration; modules go by the name of their target set, which is shorter."""
        value = trial.config.get(path)
        return self._target_names.get(value, value) if path == "lora.targets" else value

    @cached_property
    def _target_names(self) -> dict[Any, str]:
        sets: dict[str, list[str]] = self.study.get("space", {}).get("target_sets", {})
        return {",".join(modules): name for name, modules in sets.items()}

    def _summary(self, rows: list[dict[str, Any]]) -> TrialSummary:
        last = rows[-1]
        values = [finite(last.get(metric)) for metric, _ in self.objectives]
        return TrialSummary(
            trial=last["trial"],
            origin=last["origin"],
            state=last["state"],
            reason=last.get("reason"),
            epochs=last.get("epoch") or 0,
            objectives=tuple(math.nan if value is None else value for value in values),
            value=values[0],
            loss=finite(last.get("loss")),
            parameters=last.get(PARAMETERS),
            lora_parameters=last.get("lora_parameters"),
            seconds=sum((row.get("train_seconds") or 0) + (row.get("validation_seconds") or 0) for row in rows),
            config={path: last[path] for path in last if "." in path and path.split(".")[0] in _CONFIG_GROUPS},
        )


def read_run(folder: Path) -> Run:
    """Read a run folder; trials and front may be missing while the search runs.

    Raises:
        StudyError: there is no study in the folder, or one of its files is damaged.
    """
    study = _read_record(folder)
    path = folder / TRIALS_FILE
    with _damage(path, REWRITE):
        table = pq.read_table(path) if path.exists() else pa.table({})
        check_plain(table.schema, path)
        rows = table.to_pylist()
    return Run(folder, study, rows, _read_front(folder))


def read_journal(folder: Path, elsewhere: bool = False) -> Run:
    """Read a study from its journal, which is ahead of the table while the search runs.

    The front is there once it covers all trials that the study asks for: one that was extended has the front of its
    first trials until the new one is confirmed.

    Args:
        elsewhere: the files are copies from a cluster, which has the adapters.

    Raises:
        StudyError: as `read_run`.
    """
    study = _read_record(folder)
    asked = int(study.get("trials") or 0)
    with _damage(folder / JOURNAL_FILE, REWRITE):
        rows = History(folder).rows()
    front = _read_front(folder)
    if front is not None and front.get("trials", asked) < asked:
        front = None
    return Run(folder, study, rows, front, elsewhere)


def _read_record(folder: Path) -> dict[str, Any]:
    study = read_study(folder)
    with _damage(folder / STUDY_FILE, "start a new study"):
        missing = [field for field in _RECORD_FIELDS if field not in study]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
    return study


def _read_front(folder: Path) -> dict[str, Any] | None:
    path = folder / FRONT_FILE
    with _damage(path, REWRITE):
        front: dict[str, Any] | None = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
        for adapter in (point.get("adapter") for point in (front or {}).get("points", ())):
            # A front may come from anywhere, and this is joined to the folder of the study.
            if adapter and not (folder / adapter).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"names the adapter {adapter!r} outside the study")
    return front


@contextmanager
def _damage(path: Path, remedy: str) -> Iterator[None]:
    """Whatever is wrong with a file's content is one sentence."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise StudyError(f"{path}: damaged ({said}); {remedy}") from None


def placed(targets: str, placement: str | None) -> str:
    """Target modules with the part of the model that has them, unless it is the tower."""
    parts = {"language_model": " in the language model", "both": " in tower and language model"}
    return targets + parts.get(placement or "tower", "")


def metric_of(measured: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a front point: at the top (`recall@10`) or in one of the directions (`audio_to_text_R@10`)."""
    if metric in measured:
        return finite(measured[metric])
    for side in ("audio_to_text", "text_to_audio"):
        if metric.startswith(f"{side}_"):
            return finite(measured.get(side, {}).get(metric.removeprefix(f"{side}_")))
    return None


def finite(value: Any) -> float | None:
    """NaN and infinity are no results, and no JSON."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
