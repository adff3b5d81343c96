"""Any PEFT adapter, checked with the whole model: which modules its configuration adapts, and which its file names.

PEFT matches a plain list by suffix in every part of the model, says nothing of names that match nowhere while others
do, and only warns of tensors that a file lacks: those layers then stay as they were. What PEFT loads with no tensor
missing is sound, whatever else is in the file.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import peft
from safetensors import SafetensorError, safe_open

from tuner.diagnose.adapted import PARTS, Matched, Shape, module_of
from tuner.diagnose.findings import Step
from tuner.diagnose.whole import WholeModel
from tuner.encoders.spec import EncoderSpec
from tuner.errors import AdapterError
from tuner.lfs import ADVICE, is_pointer
from tuner.lora.adapter import missing_weights
from tuner.near import shown
from tuner.plain_json import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAMES = {"language_model": "the language model", "elsewhere": "other parts of the model"}
_ALL_LINEAR = "all-linear"


def read_peft_config(path: Path) -> peft.LoraConfig:
    """A LoRA configuration from its file or the folder that holds it.

    Raises:
        AdapterError: it is missing, damaged, or not LoRA.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        with warnings.catch_warnings():
            # Of settings that go unused; they are for people who are about to train.
            warnings.simplefilter("ignore")
            config: object = peft.LoraConfig.from_peft_type(**values)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror}); give an {CONFIG_FILE} or its folder") from None
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        if is_pointer(file):
            raise AdapterError(f"{file}: {ADVICE}") from None
        reason = " ".join(str(error).split())
        raise AdapterError(f"{file}: is not a PEFT configuration ({reason:.200}); save the adapter again") from None
    if not isinstance(config, peft.LoraConfig):
        raise AdapterError(f"{file}: is not a LoRA configuration; give a LoRA adapter")
    return config


def read_shapes(folder: Path) -> dict[str, Shape]:
    """Names and shapes of the tensors in an adapter's file.

    Raises:
        AdapterError: the file is missing, pickled or damaged.
    """
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as reader:
            return {key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(missing_weights(folder)) from None
    except (OSError, SafetensorError) as error:
        if is_pointer(path):
            raise AdapterError(f"{path}: {ADVICE}") from None
        raise AdapterError(f"{path}: is a damaged safetensors file ({error}); export the adapter again") from None


def check_targets(
    step: Step, config: peft.LoraConfig, origin: Path, found: Matched, whole: WholeModel, spec: EncoderSpec
) -> None:
    """Say where a configuration's LoRA goes, and what is wrong with that on the encoder's path."""
    counts = {part: found.count(part) for part in PARTS}
    step.values["peft_config"] = {
        part: {"tensors": tensors, "parameters": parameters} for part, (tensors, parameters) in counts.items()
    }
    tensors, parameters = (sum(counts[part][which] for part in _NAMES) for which in (0, 1))
    inside = "{} LoRA tensors ({:,} parameters) in the tower".format(*counts["tower"])
    text = f"{origin}: {inside}, {tensors} ({parameters:,} parameters) outside it"
    everything = config.target_modules == _ALL_LINEAR
    _missed_names(step, config, origin, found, spec)
    leak = found.outside if spec.tower_alone is None else found.names("elsewhere")
    if leak:
        modules = found.modules.values()
        parts = Counter(_NAMES[found.parts[name]] for name in modules if name in set(leak))
        where = " and ".join(f"{count} to {part}" for part, count in parts.items())
        # A list of names was meant for modules that somebody knows; `all-linear` says that all are meant.
        (step.warn if everything else step.error)(
            f"{text}: {where}, which the path {spec.path} never runs (for example {leak[0]})",
            "use a pattern that names the tower's modules, not a list, or let tuner choose the modules (--targets)",
        )
    elif found.fault is not None or not found.modules:
        reason = "" if found.fault is None or "not found" in found.fault else f" ({found.fault:.200})"
        step.error(
            f"{origin}: its targets match no module of {spec.source}{reason}", "step 5 lists the modules of the encoder"
        )
    else:
        step.ok(text)


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
            f"{origin}: {shown(name)} matches no module of the tower{known}",
            f"the tower has {there}; use those names",
        )


def check_weights(step: Step, folder: Path, held: Mapping[str, Shape], found: Matched, whole: WholeModel) -> None:
    """Compare the tensors of an adapter's file with those that PEFT takes for its configuration.

    Args:
        held: the tensors in the file.
        found: the configuration in the model.
    """
    path = folder / WEIGHTS_FILE
    missing = [key for key in found.shapes if key not in held]
    strangers = [key for key in held if key not in found.shapes]
    misshaped = [key for key, shape in found.shapes.items() if held.get(key, shape) != shape]
    step.values["adapter_file"] = {"tensors": len(held), "tensors_that_miss": len(missing)}
    advice = "save the adapter again with the versions of transformers and PEFT that load it"
    untrained = "PEFT would only warn and leave those layers untrained"
    if missing and strangers:
        step.error(
            f"{path}: {len(strangers)} of {len(held)} tensors match no module of this model (for example "
            f"{strangers[0]}): {untrained}{_older(strangers, whole)}",
            advice,
        )
    elif missing:
        step.error(
            f"{path}: lacks {len(missing)} of the {len(found.shapes)} tensors of its configuration (for example "
            f"{missing[0]}): {untrained}",
            advice,
        )
    elif misshaped:
        key = misshaped[0]
        step.error(
            f"{path}: {len(misshaped)} tensors have another shape than this model asks for (for example {key} is "
            f"{held[key]}, not {found.shapes[key]})",
            "give the encoder that the adapter was made for",
        )
    elif found.shapes:
        unread = f"; {len(strangers)} more are not read" if strangers else ""
        step.ok(f"{path}: has all {len(found.shapes)} tensors that PEFT loads{unread}")


def _older(keys: Iterable[str], whole: WholeModel) -> str:
    """Whether the names are those that transformers 4 had for the same modules."""
    renamed = (f"model.{module_of(key)}".replace("language_model.model.", "language_model.") for key in keys)
    return "; they are the names of transformers 4" if all(name in whole.linears for name in renamed) else ""
