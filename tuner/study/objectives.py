"""What a search optimises: metrics that training measures, and costs that are known before it.

All objectives are in `OBJECTIVES`; a study names some of them. No other module decides which direction is better, on
which scale values are compared, or from which corner a hypervolume is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, JsonValue

from tuner.config import Frozen
from tuner.errors import ConfigError
from tuner.near import nearest

Direction = Literal["maximize", "minimize"]
Scale = Literal["linear", "log"]
Kind = Literal["measured", "known"]

TRAINABLE_PARAMETERS = "trainable_parameters"
LORA_PARAMETERS = "lora_parameters"
# Of a name that an error quotes.
MAX_NAME = 100


class Objective(Frozen):
    """One objective.

    Attributes:
        scale: `log` if a factor matters and not a difference, as with parameters.
        kind: `measured` by validation, or `known` from the configuration alone, before training.
        corner: the value that a hypervolume is measured from; fixed, so that two searches can be compared.
    """

    name: str
    direction: Direction
    scale: Scale
    kind: Kind
    corner: float

    def to_values(self) -> dict[str, JsonValue]:
        """Plain values, as in study.json and front.json; they omit the corner, which is fixed in the code."""
        values: dict[str, JsonValue] = self.model_dump(mode="json", exclude={"corner"})
        return values

    def position(self, value: float) -> float:
        """The value on the objective's scale; a cost of zero counts as one, because zero has no logarithm."""
        return math.log10(max(1.0, value)) if self.scale == "log" else value


def _metric(name: str) -> Objective:
    return Objective(name=name, direction="maximize", scale="linear", kind="measured", corner=0.0)


def _cost(name: str, corner: float) -> Objective:
    return Objective(name=name, direction="minimize", scale="log", kind="known", corner=corner)


WAYS = ("audio_to_text", "text_to_audio")
_ALL = (
    *(_metric(f"recall@{k}") for k in (1, 5, 10)),
    *(_metric(f"{way}_{name}") for way in WAYS for name in ("R@1", "R@5", "R@10", "mAP@10")),
    # Corners are above what anyone adapts: 1e9 parameters, or their bytes in fp32.
    _cost(TRAINABLE_PARAMETERS, 1e9),
    _cost(LORA_PARAMETERS, 1e9),
    _cost("adapter_bytes", 4e9),
    _cost("training_flops", 1e21),
    _cost("inference_flops", 1e15),
)
OBJECTIVES = {objective.name: objective for objective in _ALL}
MEASURED = tuple(objective.name for objective in _ALL if objective.kind == "measured")
KNOWN = tuple(objective.name for objective in _ALL if objective.kind == "known")
DEFAULT_OBJECTIVES = ("recall@10", TRAINABLE_PARAMETERS)


def objective_named(name: str) -> Objective:
    """The objective of this name.

    Raises:
        ConfigError: there is none; suggests the closest name.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    shown = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
    match = nearest(name, OBJECTIVES)
    hint = f"did you mean {match}?" if match else f"give one of {', '.join(OBJECTIVES)}"
    raise ConfigError(f"objective {shown}: is not a known metric or cost; {hint}")


def choose_objectives(names: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of a study, metrics before costs.

    Raises:
        ConfigError: a name is unknown or given twice, or no metric is among them.
    """
    chosen = [objective_named(name) for name in names]
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if repeated is not None:
        raise ConfigError(f"objective {repeated}: is given twice; give each objective once")
    if all(objective.kind == "known" for objective in chosen):
        raise ConfigError(
            f"objective {', '.join(names)}: there are only costs; add a metric to maximise, such as "
            f"{DEFAULT_OBJECTIVES[0]}"
        )
    # Metrics come before costs, in any order of the names.
    return tuple(sorted(chosen, key=lambda objective: objective.kind == "known"))


def _read(value: object) -> object:
    """An objective in study.json: found by its name, which studies of version 0.1 call `metric`."""
    if isinstance(value, dict):
        value = value.get("name", value.get("metric"))
    if isinstance(value, str):
        try:
            return objective_named(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return value


NamedObjective = Annotated[Objective, BeforeValidator(_read)]
Objectives = tuple[NamedObjective, ...]
