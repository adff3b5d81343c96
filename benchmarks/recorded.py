"""A real search, recorded: what its trials learned epoch by epoch, how long that took, and what stood between them.

`recorded_search.json` is made by `python -m benchmarks.recording`. A configuration that was not recorded is given what
the recorded ones nearest to it learned: the rows of the four nearest, epoch by epoch, weighted by the inverse square
of their distance (Shepard 1968, doi:10.1145/800186.810616). The distance is Euclidean over the dimensions of the
space, each scaled to [0, 1] (logarithmically where the space is), different choices being 1 apart. A recorded
configuration gets its own rows, and parameters are counted, not interpolated.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter

from tuner.config import TrialConfig
from tuner.encoders.spec import EncoderSpec
from tuner.lora.placement import lora_parameters, trainable_parameters
from tuner.space import SearchSpace
from tuner.space.dimension import Choice
from tuner.study.objectives import LORA_PARAMETERS, TRAINABLE_PARAMETERS

FILE = Path(__file__).with_name("recorded_search.json")
NEIGHBOURS = 4
Row = dict[str, float]
SPEC = TypeAdapter(EncoderSpec)


@dataclass(frozen=True)
class Overheads:
    """Seconds beside training, measured through real Ray by `benchmarks.overheads` and by the recorded search.

    Attributes:
        lane_start: from the start of a search to a lane with its encoder loaded.
        client_start: until one more trial's actor answers; a processor's time on the head.
        tune_trial: the driver's own work in Tune for one trial, besides searcher and recorder.
        tune_epoch: likewise for one epoch that a trial reports.
        change: from the end of a trial to the next one in its place, besides the driver's work.
        call: one call of the coordinator, there and back.
        confirm_epochs: confirming one point of the front, in epochs of training.
    """

    lane_start: float
    client_start: float
    tune_trial: float
    tune_epoch: float
    change: float
    call: float
    confirm_epochs: float


@dataclass(frozen=True)
class RecordedTrial:
    """A configuration and its epoch rows, as the journal had them."""

    config: TrialConfig
    rows: tuple[Row, ...]

    @property
    def seconds(self) -> float:
        """Training and validation of its fastest epoch: the first of all also filled the cache of frozen states."""
        return min(row["train_seconds"] + row["validation_seconds"] for row in self.rows)


@dataclass(frozen=True)
class RecordedSearch:
    """Space, encoder and trials of one real search."""

    made: dict[str, Any]
    space: SearchSpace
    spec: EncoderSpec
    text_dim: int
    trials: tuple[RecordedTrial, ...]
    overheads: Overheads

    @classmethod
    def load(cls, path: Path = FILE) -> Self:
        """Read what `save` has written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        trials = [
            RecordedTrial(TrialConfig.model_validate(trial["config"]), tuple(trial["rows"]))
            for trial in values["trials"]
        ]
        return cls(
            made=values["made"],
            space=SearchSpace.from_dict(values["space"], str(path)),
            spec=SPEC.validate_python(values["encoder"]),
            text_dim=values["text_dim"],
            trials=tuple(trials),
            overheads=Overheads(**values["overheads"]),
        )

    def save(self, path: Path = FILE) -> None:
        """Write one JSON file, a trial a line."""
        head = {
            "made": self.made,
            "overheads": {name: float(f"{seconds:.3g}") for name, seconds in asdict(self.overheads).items()},
            "space": self.space.to_dict(),
            "encoder": SPEC.dump_python(self.spec, mode="json"),
            "text_dim": self.text_dim,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        trials = [
            json.dumps({"config": trial.config.model_dump(mode="json"), "rows": trial.rows}) for trial in self.trials
        ]
        text = "\n".join(["{", *lines, '"trials": [', ",\n".join(trials), "]", "}", ""])
        path.write_text(text, encoding="utf-8")

    @property
    def epochs(self) -> int:
        """Epochs of each trial."""
        return len(self.trials[0].rows)

    @cached_property
    def mean_seconds(self) -> float:
        """Mean duration of an epoch with LoRA."""
        return float(np.mean([trial.seconds for trial in self.trials if trial.config.lora]))

    def parameters(self, config: TrialConfig) -> int:
        """Exact trainable parameters."""
        return trainable_parameters(self.spec, config, self.text_dim)

    def known(self, config: TrialConfig) -> dict[str, float]:
        """What of a configuration is known before it trains, as far as the recorded search's objectives go."""
        lora = lora_parameters(self.spec, config.lora) if config.lora else 0
        return {LORA_PARAMETERS: float(lora), TRAINABLE_PARAMETERS: float(self.parameters(config))}

    def train(self, config: TrialConfig) -> tuple[list[Row], float]:
        """What a trial of this configuration reports, epoch by epoch, and how long an epoch takes beside the mean one.

        Raises:
            ValueError: a configuration outside the space that was not recorded.
        """
        weighed = self._nearest(config)
        rows = []
        for epoch in range(self.epochs):
            names = self.trials[0].rows[epoch]
            row = {name: sum(w * trial.rows[epoch][name] for w, trial in weighed) for name in names}
            row["epoch"] = epoch + 1
            rows.append(row | self.known(config))
        return rows, sum(w * trial.seconds for w, trial in weighed) / self.mean_seconds

    def _nearest(self, config: TrialConfig) -> list[tuple[float, RecordedTrial]]:
        """Recorded trials with weights that add up to one."""
        for trial in self.trials:
            if trial.config.model_copy(update={"seed": config.seed}) == config:
                return [(1.0, trial)]
        place = self._place(config)
        if place is None:
            raise ValueError(f"not recorded, and outside the space {self.space.name}: {config}")
        ranked = sorted(
            ((_distance(place, other), index) for index, other in self._places.items()), key=lambda item: item
        )[:NEIGHBOURS]
        if ranked[0][0] == 0:
            return [(1.0, self.trials[ranked[0][1]])]
        weights = [1 / distance**2 for distance, _ in ranked]
        return [(w / sum(weights), self.trials[index]) for w, (_, index) in zip(weights, ranked, strict=True)]

    @cached_property
    def _places(self) -> dict[int, dict[str, Any]]:
        """Places of the recorded trials inside the space; the projection alone has none."""
        places = {index: self._place(trial.config) for index, trial in enumerate(self.trials)}
        return {index: place for index, place in places.items() if place is not None}

    def _place(self, config: TrialConfig) -> dict[str, Any] | None:
        """Numbers in [0, 1] and choices by dimension; None outside the space."""
        params = self.space.params_of(config)
        if params is None:
            return None
        return {path: self._scaled(path, value) for path, value in params.items()}

    def _scaled(self, path: str, value: Any) -> Any:
        dimension = self.space.dimensions[path]
        if isinstance(dimension, Choice):
            return str(value)
        low, high = dimension.bounds
        if dimension.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def _distance(place: dict[str, Any], other: dict[str, Any]) -> float:
    squares = 0.0
    for path in place.keys() | other.keys():
        mine, theirs = place.get(path), other.get(path)
        if isinstance(mine, float) and isinstance(theirs, float):
            squares += (mine - theirs) ** 2
        else:
            squares += float(mine != theirs)
    return math.sqrt(squares)
