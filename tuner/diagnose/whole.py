"""The whole model around an encoder, without weights: which of its linear layers belong to the tower.

PEFT matches a plain list of target names by suffix over the whole model, so the effect of a list depends on all of it.
transformers builds the model's skeleton on the meta device: all names and shapes, no memory, no file but config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuner.config import LoraSpec
from tuner.encoders.spec import EncoderSpec
from tuner.lora.placement import ALL_LINEAR, resolve_placement

Features = tuple[int, int]  # inputs and outputs of a linear layer
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class WholeModel:
    """Linear layers of a whole model by full name, as transformers 5 has them.

    Attributes:
        tower: full name of the audio tower; "" if the model is the tower alone.
        language_model: full name of the language model, if there is one.
    """

    linears: Mapping[str, Features]
    tower: str
    language_model: str | None = None
    folder: Path | None = None  # of its configuration; None where the tower is known by its layers alone

    def part(self, name: str) -> str:
        """`tower`, `language_model` or `elsewhere`."""
        if _below(name, self.tower):
            return "tower"
        return "language_model" if self.language_model and _below(name, self.language_model) else "elsewhere"

    def own(self, name: str) -> str:
        """Name of a tower's module below the tower."""
        return name.removeprefix(f"{self.tower}.") if self.tower else name

    def behind_tower(self) -> tuple[str, ...]:
        """Layers of numbered blocks outside the tower: those of the language model, if there is one."""
        part = "language_model" if self.language_model else "elsewhere"
        return tuple(name for name in self.linears if self.part(name) == part and _NUMBER.search(f".{name}."))

    def skeleton(self) -> nn.Module:
        """A new copy without weights, for PEFT to adapt; of a tower alone, its linear layers under their names."""
        if self.folder is not None:
            return _build(self.folder)
        root = nn.Module()
        for name, (inputs, outputs) in self.linears.items():
            *parents, own = name.split(".")
            place = root
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(own, nn.Linear(inputs, outputs, device="meta"))
        return root


def lora_size(linears: Iterable[Features], rank: int) -> int:
    """Number of parameters in A and B of a LoRA on these layers."""
    return sum(rank * (inputs + outputs) for inputs, outputs in linears)


def whole_model(spec: EncoderSpec) -> WholeModel:
    """The model of the encoder's folder; the tower alone if config.json describes nothing else."""
    tower = spec.tower_alone or spec
    if spec.checkpoint != "transformers":
        return _alone(tower)
    try:
        linears = _skeleton(spec.folder)
    except ValueError:  # transformers has no class for the whole model
        return _alone(tower)
    modules = resolve_placement(tower, LoraSpec(rank=1, targets=(ALL_LINEAR,))).modules
    prefix = _prefix(linears, modules, tower.tower_path)
    if prefix is None:
        return _alone(tower)
    return WholeModel(linears, prefix, spec.language_model_path or _language_model(linears), spec.folder)


def _alone(tower: EncoderSpec) -> WholeModel:
    placement = resolve_placement(tower, LoraSpec(rank=1, targets=(ALL_LINEAR,)))
    return WholeModel(
        {
            f"{block}.{linear.suffix}": (linear.in_features, linear.out_features)
            for stage in placement.stages
            for block in stage.blocks
            for linear in stage.linears
        },
        "",
    )


@cache
def _skeleton(folder: Path) -> Mapping[str, Features]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in _build(folder).named_modules()
        if isinstance(module, nn.Linear)
    }


def _build(folder: Path) -> nn.Module:
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)  # noqa: TID251, values alone
    names = getattr(config, "architectures", None) or ()
    build: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    with torch.device("meta"):
        model: nn.Module = (build or transformers.AutoModel.from_config)(config)  # noqa: TID251, no weights
    return model


def _prefix(linears: Mapping[str, Features], modules: Iterable[str], expected: str | None) -> str | None:
    """Path of the tower in the whole model: the expected place first; "" for the model itself."""
    wanted = list(modules)
    places = dict.fromkeys(
        name.removesuffix(wanted[0]).removesuffix(".")
        for name in linears
        if name == wanted[0] or name.endswith(f".{wanted[0]}")
    )
    # A decoder may have modules of the same names as the encoder.
    ordered = sorted(places, key=lambda place: (place != (expected or ""), "decoder" in place))
    fitting = (place for place in ordered if all(f"{place}.{name}".removeprefix(".") in linears for name in wanted))
    return next(fitting, None)


def _language_model(linears: Iterable[str]) -> str | None:
    """Path of a language model that does not run here, by the name that transformers uses."""
    found = (re.match(r"(?:.*\.)?language_model(?=\.)", name) for name in linears)
    return next((match.group() for match in found if match), None)


def _below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")
