"""What PEFT makes of a LoRA configuration in a whole model: tried on its skeleton, which has names and shapes alone.

PEFT itself says which modules it adapts, which tensors it keeps in a file and how large each is: ranks by pattern,
DoRA's magnitudes, biases, convolutions, modules that are saved whole.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import peft
from torch import nn

from tuner.diagnose.whole import WholeModel

Shape = tuple[int, ...]
PREFIX = "base_model.model."
PARTS = ("tower", "language_model", "elsewhere")
_ALL_LINEAR = "all-linear"
_SETTINGS = (
    "r",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "use_dora",
)


@dataclass(frozen=True)
class Matched:
    """A configuration in a model.

    Attributes:
        shapes: of all tensors that PEFT keeps of the adapter, by their name in its file.
        modules: full name of the module that each LoRA tensor belongs to, by that name.
        parts: part of the model of each of these modules, of `PARTS`.
        fault: why PEFT refuses the configuration, if it does.
    """

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    fault: str | None = None

    def names(self, part: str) -> tuple[str, ...]:
        """Modules of one part that get a LoRA, full names."""
        return tuple(name for name, its in self.parts.items() if its == part)

    @property
    def tower(self) -> tuple[str, ...]:
        """Those of the tower."""
        return self.names("tower")

    @property
    def outside(self) -> tuple[str, ...]:
        """Those outside the tower."""
        return self.names("language_model") + self.names("elsewhere")

    def count(self, part: str) -> tuple[int, int]:
        """LoRA tensors in one part, and the numbers in them."""
        sizes = [prod(self.shapes[key]) for key, name in self.modules.items() if self.parts[name] == part]
        return len(sizes), sum(sizes)


def match(config: peft.LoraConfig, whole: WholeModel, held: Mapping[str, Shape] | None = None) -> Matched:
    """What PEFT would adapt in the whole model; or in the tower alone, where the adapter was made for that.

    Args:
        held: tensors of the adapter's file; they say which of the two roots its names hang below.
    """
    found = [_adapted(config, whole, "")]
    if whole.tower and (held is not None or not found[0].modules):
        found.append(_adapted(config, whole, whole.tower))
    fitting = [each for each in found if each.shapes] or found
    return min(fitting, key=lambda each: len(each.shapes.keys() - held.keys()) if held is not None else 0)


def _adapted(config: peft.LoraConfig, whole: WholeModel, root: str) -> Matched:
    model = whole.skeleton().get_submodule(root)
    try:
        with warnings.catch_warnings():
            # They are for people who are about to train.
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel(model, _plain(config, model), low_cpu_mem_usage=True)
            kept = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, re.error) as error:
        return Matched(fault=" ".join(str(error).split()))
    shapes = {str(key): tuple(tensor.shape) for key, tensor in kept.items()}
    below = f"{root}." if root else ""
    modules = {key: below + module_of(key) for key in shapes if ".lora_" in key}
    return Matched(shapes, modules, {name: whole.part(name) for name in modules.values()})


def _plain(config: peft.LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """The configuration with nothing but what decides on names and shapes.

    Of the other settings some read the weights, some ask for a model with a head, and some make PEFT import a module or
    read a file that they name.
    """
    plain = peft.LoraConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _SETTINGS if hasattr(config, name)}
    )
    if plain.target_modules == _ALL_LINEAR and not hasattr(model, "get_output_embeddings"):
        plain.target_modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return plain


def module_of(key: str) -> str:
    """The module that a LoRA tensor belongs to, by its name in a file."""
    return key.removeprefix(PREFIX).partition(".lora_")[0]
