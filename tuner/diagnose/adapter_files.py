"""Any PEFT adapter, checked with the whole model: which modules its configuration adapts, and which its file names.

PEFT matches a plain list by suffix in every part of the model. It does not report names without a match while others
match, and only warns about tensors whose names match no module: those layers then stay untrained.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open

from tuner.diagnose.findings import Step
from tuner.diagnose.whole import WholeModel, lora_size
from tuner.encoders.spec import EncoderSpec
from tuner.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"language_model": "the language model", "elsewhere": "other parts of the model"}


@dataclass(frozen=True)
class Matched:
    """Modules of the whole model that a configuration adapts, by part, full names."""

    tower: tuple[str, ...]
    language_model: tuple[str, ...]
    elsewhere: tuple[str, ...]

    @property
    def outside(self) -> tuple[str, ...]:
        """Those outside the tower."""
        return self.language_model + self.elsewhere


def read_peft_config(path: Path) -> peft.LoraConfig:
    """A LoRA configuration from its file or the folder that holds it.

    Raises:
        AdapterError: it is missing, damaged, or not LoRA.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        config: object = peft.LoraConfig.from_peft_type(**values)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror}); give an {CONFIG_FILE} or its folder") from None
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{file}: is not a PEFT configuration ({reason}); save the adapter again") from None
    if not isinstance(config, peft.LoraConfig):
        raise AdapterError(f"{file}: is not a LoRA configuration; give a LoRA adapter")
    return config


def match(config: peft.LoraConfig, whole: WholeModel) -> Matched:
    """Modules that PEFT would adapt in the whole model; a pattern of the tower's own names is one for the tower."""
    found = [name for name in whole.linears if check_target_module_exists(config, name)]
    if not found:
        found = [
            name
            for name in whole.linears
            if whole.part(name) == "tower" and check_target_module_exists(config, whole.own(name))
        ]
    parts = {part: tuple(name for name in found if whole.part(name) == part) for part in ("tower", *_PARTS)}
    return Matched(parts["tower"], parts["language_model"], parts["elsewhere"])


def check_targets(step: Step, config: peft.LoraConfig, origin: Path, whole: WholeModel, spec: EncoderSpec) -> Matched:
    """Report the modules of a configuration's LoRA, and what is wrong with them on the encoder's path."""
    found = match(config, whole)
    sizes = {part: lora_size((whole.linears[name] for name in names), config.r) for part, names in vars(found).items()}
    step.values["peft_config"] = {
        part: {"tensors": 2 * len(names), "parameters": sizes[part]} for part, names in vars(found).items()
    }
    split = f"{2 * len(found.tower)} LoRA tensors ({sizes['tower']:,} parameters) in the tower"
    outside = sizes["language_model"] + sizes["elsewhere"]
    text = f"{origin}: {split}, {2 * len(found.outside)} ({outside:,} parameters) outside it"
    _missed_names(step, config, origin, found, spec)
    leak = found.outside if spec.tower_alone is None else found.elsewhere
    if leak:
        parts = Counter(_PARTS[whole.part(name)] for name in leak)
        where = " and ".join(f"{2 * count} to {part}" for part, count in parts.items())
        step.error(
            f"{text}: {where}, which the path {spec.path} never runs (for example {leak[0]})",
            "use a pattern that names the tower's modules, not a list, or let tuner choose the modules (--targets)",
        )
    elif not found.tower and not found.outside:
        step.error(f"{origin}: its targets match no module of {spec.source}", "step 5 lists the modules of the encoder")
    else:
        step.ok(text)
    return found


def _missed_names(step: Step, config: peft.LoraConfig, origin: Path, found: Matched, spec: EncoderSpec) -> None:
    """Names of a list that no module of the tower has, though the family has another name for them."""
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return
    stages = [stage for stage in (spec.tower_alone or spec).stages if stage.part == "tower"]
    for name in sorted(config.target_modules):
        if any(module == name or module.endswith(f".{name}") for module in found.tower):
            continue
        own = [target for stage in stages for target in stage.aliases.get(name, ())]
        known = f"; its name there is {', '.join(dict.fromkeys(own))}" if own else ""
        there = ", ".join(dict.fromkeys(target for stage in stages for target in stage.targets))
        step.error(
            f"{origin}: {name!r} matches no module of the tower{known}",
            f"the tower has {there}; use those names",
        )


def check_weights(step: Step, folder: Path, whole: WholeModel) -> None:
    """Compare the names in an adapter's file with the modules of the whole model, or of the tower.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as reader:
            keys = list(reader.keys())
    except FileNotFoundError:
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} is missing; give the folder of an exported adapter") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: is a damaged safetensors file ({error}); export the adapter again") from None
    modules = {key: key.removeprefix(_PREFIX).partition(".lora_")[0] for key in keys}
    own = {whole.own(name) for name in whole.linears if whole.part(name) == "tower"}
    # All modules of one adapter have one root: the whole model, or its tower alone.
    missing = min(
        ([key for key, module in modules.items() if module not in known] for known in (whole.linears.keys(), own)),
        key=len,
    )
    step.values["adapter_file"] = {"tensors": len(keys), "tensors_that_miss": len(missing)}
    if missing:
        step.error(
            f"{path}: {len(missing)} of {len(keys)} tensors match no module of this model (for example {missing[0]}): "
            f"PEFT would only warn and leave those layers untrained{_older(modules, whole)}",
            "save the adapter again with the versions of transformers and PEFT that load it",
        )
    else:
        step.ok(f"{path}: all {len(keys)} tensors match a module of the model")


def _older(modules: dict[str, str], whole: WholeModel) -> str:
    """A remark if the names are those of transformers 4 for the same modules."""
    renamed = (f"model.{module}".replace("language_model.model.", "language_model.") for module in modules.values())
    return "; they are the names of transformers 4" if all(name in whole.linears for name in renamed) else ""
