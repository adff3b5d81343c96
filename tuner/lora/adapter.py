"""LoRA adapters on a shared frozen model, by PEFT: attach, choose, read, save, remove. A torch module.

PEFT owns target matching, parameters, initialisation, scaling and the file format. Several adapters live on one model
at once; every attached one keeps `requires_grad`, so a pack trains them in turn on one backbone.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.config import LoraSpec
from tuner.encoders.base import AudioEncoder
from tuner.encoders.spec import EncoderSpec
from tuner.errors import AdapterError, PlacementError
from tuner.lfs import ADVICE, is_pointer
from tuner.lora.dropout import LoraDropout
from tuner.lora.linear import LoraLinear
from tuner.lora.placement import Placement, StagePlacement, encoding_spec, resolve_placement
from tuner.plain_json import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
_FILE_PREFIX = "base_model.model."  # where a PeftModel holds the encoder's model
# Fields that `_peft_config` sets, and those that PEFT itself adds.
_SETTINGS = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
    }
)


def on_path(encoder: AudioEncoder, lora: LoraSpec | None) -> AudioEncoder:
    """The part of the encoder that a trial with this LoRA runs, with the same weights; see `encoding_spec`.

    Raises:
        PlacementError: as `encoding_spec`.
    """
    spec = encoding_spec(encoder.spec, lora)
    return encoder if spec is encoder.spec else encoder.tower_alone


def attach(encoder: AudioEncoder, lora: LoraSpec, name: str) -> Placement:
    """Put a fresh LoRA called `name` on the encoder that `on_path` gives and make it the active one.

    A and B are fp32 for every base precision: in bf16, rounding loses AdamW's steps. They are drawn on the CPU from
    torch's global generator, block by block, so a seed gives the same adapter on every device and base precision.

    Raises:
        PlacementError: a target does not exist, or PEFT matched other modules than the placement has.
    """
    placement = resolve_placement(encoder.spec, lora)
    assert on_path(encoder, lora) is encoder, (
        f"a LoRA on the {lora.placement} runs another path of {encoder.spec.source}"
    )
    assert name not in names(encoder), f"adapter {name} is attached already"
    with _own_peft_config(encoder.model):
        # Without weights at first: PEFT would draw them in the base's precision, and bf16 loses bits.
        config = _peft_config(encoder.spec, lora)
        config._register_custom_module({nn.Linear: LoraLinear})
        peft.inject_adapter_in_model(config, encoder.model, name, low_cpu_mem_usage=True)
    matched = [path for path, _ in _layers(encoder, name)]
    if sorted(matched) != sorted(placement.modules):
        detach(encoder, name)
        raise PlacementError(_mismatch(placement, matched))
    for _, layer in _layers(encoder, name):
        for part in (layer.lora_A, layer.lora_B):
            part[name].to_empty(device="cpu")
        layer.reset_lora_parameters(name, True)
        if lora.dropout > 0:
            layer.lora_dropout[name] = LoraDropout(lora.dropout)
        for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            part[name].to(encoder.device).train(encoder.model.training)
    count = sum(parameter.numel() for parameter in parameters(encoder, name))
    assert count == placement.lora_parameters, f"{count} LoRA parameters, placement says {placement.lora_parameters}"
    activate(encoder, name)
    return placement


def detach(encoder: AudioEncoder, name: str) -> None:
    """Remove an adapter. A layer without adapters becomes the plain linear layer again, so nothing accumulates."""
    if active(encoder) == name:
        activate(encoder, None)
    for path, layer in _layers(encoder, name):
        layer.delete_adapter(name)
        if not layer.lora_A:
            encoder.model.set_submodule(path, layer.get_base_layer())
    configs: dict[str, peft.PeftConfig] = encoder.model.__dict__.get("peft_config", {})
    configs.pop(name, None)
    if not configs:
        encoder.model.__dict__.pop("peft_config", None)


def activate(encoder: AudioEncoder, name: str | None) -> None:
    """Choose the adapter that runs; None runs the base alone. All attached ones keep `requires_grad`."""
    assert name is None or name in names(encoder), f"no adapter {name} is attached"
    for _, layer in _layers(encoder):
        layer.set_adapter([] if name is None else [name])
        # PEFT freezes adapters that are not active; in a pack the others still need their backward pass.
        layer.set_requires_grad(list(layer.lora_A), True)


def active(encoder: AudioEncoder) -> str | None:
    """Name of the adapter that runs, None for the base alone."""
    for _, layer in _layers(encoder):
        chosen: list[str] = layer.active_adapters
        return chosen[0] if chosen else None
    return None


def names(encoder: AudioEncoder) -> tuple[str, ...]:
    """Names of all attached adapters, sorted."""
    return tuple(sorted({name for _, layer in _layers(encoder) for name in layer.lora_A}))


def parameters(encoder: AudioEncoder, name: str) -> list[nn.Parameter]:
    """A and B of every adapted layer of one adapter, in the order of the model's modules."""
    return [part[name].weight for _, layer in _layers(encoder, name) for part in (layer.lora_A, layer.lora_B)]


def dropouts(encoder: AudioEncoder, name: str) -> list[nn.Module]:
    """The dropout modules of one adapter, in the order of `parameters`; identities where its dropout is zero."""
    return [layer.lora_dropout[name] for _, layer in _layers(encoder, name)]


def save_adapter(encoder: AudioEncoder, name: str, folder: Path, lora: LoraSpec) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as `PeftModel.from_pretrained(model, folder)` reads.

    The configuration is renamed into place last: if it exists, the adapter is complete.

    Raises:
        AdapterError: the folder cannot be written.
    """
    # Word embeddings are never trained here, and PEFT would look for them on a hub.
    state = peft.get_peft_model_state_dict(encoder.model, adapter_name=name, save_embedding_layers=False)
    tensors = {_FILE_PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    config = _peft_config(encoder.spec, lora)
    config.inference_mode = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as staged:
            config.save_pretrained(staged)
            save_file(tensors, Path(staged) / WEIGHTS_FILE, metadata={"format": "pt"})
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                (Path(staged) / file).replace(folder / file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: cannot write the adapter ({error})") from None


def load_adapter(encoder: AudioEncoder, folder: Path, name: str = "default") -> None:
    """Load an exported adapter with plain PEFT and make it the active one.

    PEFT only warns about keys that do not match and leaves those layers untrained, so the file is compared first.

    Raises:
        AdapterError: a file is missing or damaged, tensors are missing, unexpected, misshaped or all zero.
    """
    assert name not in names(encoder), f"adapter {name} is attached already"
    config = _read_config(folder)
    _check_tensors(encoder, folder, config)
    with _own_peft_config(encoder.model), warnings.catch_warnings():
        # PEFT 0.21 still uses the old name of this property of transformers.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # Wraps the model and injects into it in place; the wrapper itself is not needed.
        peft.PeftModel.from_pretrained(
            encoder.model, folder, adapter_name=name, is_trainable=True, torch_device=str(encoder.device)
        )
    for _, layer in _layers(encoder, name):
        layer.train(encoder.model.training)
    activate(encoder, name)


def _peft_config(spec: EncoderSpec, lora: LoraSpec) -> peft.LoraConfig:
    placement = resolve_placement(spec, lora)
    # A pattern over the whole name, not PEFT's list: a list matches by suffix, also outside the encoder's blocks.
    pattern = "|".join(_stage_pattern(stage) for stage in placement.stages)
    # PEFT annotates alpha as int and computes with any number; ratios such as 0.5 need that.
    alpha: Any = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=pattern,
        base_model_name_or_path=spec.source,
    )


def _stage_pattern(stage: StagePlacement) -> str:
    blocks = "|".join(map(re.escape, stage.blocks))
    suffixes = "|".join(re.escape(linear.suffix) for linear in stage.linears)
    return rf"(?:{blocks})\.(?:{suffixes})"


def _layers(encoder: AudioEncoder, name: str | None = None) -> list[tuple[str, Any]]:
    """Adapted layers of the encoder's model in its order, all of them or those of one adapter."""
    found = [(path, module) for path, module in encoder.model.named_modules() if isinstance(module, LoraLayer)]
    return [(path, layer) for path, layer in found if name is None or name in layer.lora_A]


@contextmanager
def _own_peft_config(model: nn.Module) -> Iterator[None]:
    """Show PEFT a model without configurations and merge them afterwards: it warns about every further adapter."""
    before: dict[str, peft.PeftConfig] = model.__dict__.pop("peft_config", {})
    try:
        yield
    finally:
        merged = before | model.__dict__.get("peft_config", {})
        if merged:
            model.__dict__["peft_config"] = merged


def missing_weights(folder: Path) -> str:
    """The sentence about an adapter's folder without its safetensors file."""
    if (folder / PICKLED_FILE).is_file():
        return (
            f"{folder}: {WEIGHTS_FILE} is missing, and {PICKLED_FILE} beside it is not read, since it may run code; "
            "if you trust it, convert it with PEFT: PeftModel.from_pretrained(model, folder).save_pretrained(folder)"
        )
    return f"{folder}: {WEIGHTS_FILE} is missing; give the folder of an exported adapter"


def _mismatch(placement: Placement, matched: list[str]) -> str:
    wanted, found = set(placement.modules), set(matched)
    counts = Counter(path.rpartition(".")[2] for path in matched)
    listed = ", ".join(f"{target} {count}" for target, count in sorted(counts.items())) or "nothing"
    strays = ", ".join(sorted(wanted ^ found)[:3])
    return f"lora.targets: tuner planned {len(wanted)} modules, but PEFT matched {listed}; they differ in {strays}"


def _read_config(folder: Path) -> peft.LoraConfig:
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder}: {CONFIG_FILE} is missing; give the folder of an exported adapter")
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(missing_weights(folder))
    path = folder / CONFIG_FILE
    try:
        values = parse_json(path.read_bytes())
        # PEFT only warns about these.
        unknown = values.keys() - {field.name for field in dataclasses.fields(peft.LoraConfig)}
        if unknown:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))[:100]}")
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{path}: is not a PEFT configuration ({reason}); export the adapter again") from None
    if not isinstance(config, peft.LoraConfig):
        raise AdapterError(f"{folder / CONFIG_FILE}: is a {config.peft_type} adapter; tuner reads LoRA adapters only")
    _refuse_further_settings(config, folder / CONFIG_FILE)
    return config


def _refuse_further_settings(config: peft.LoraConfig, path: Path) -> None:
    """Some settings make PEFT import a module or read further files; only those of `_peft_config` are needed."""
    plain = peft.LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _SETTINGS and value != getattr(plain, field.name):
            raise AdapterError(
                f"{path}: sets {field.name} to {value!r:.60}, which an adapter of tuner never sets; export it again"
            )


def _check_tensors(encoder: AudioEncoder, folder: Path, config: peft.LoraConfig) -> None:
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        if is_pointer(path):
            raise AdapterError(f"{path}: {ADVICE}") from None
        raise AdapterError(f"{path}: is a damaged safetensors file ({error}); export the adapter again") from None
    wanted: dict[str, tuple[int, ...]] = {}
    for module, layer in encoder.model.named_modules():
        linear: Any = layer
        if isinstance(layer, nn.Linear | LoraLayer) and check_target_module_exists(config, module):
            wanted[f"{_FILE_PREFIX}{module}.lora_A.weight"] = (config.r, linear.in_features)
            wanted[f"{_FILE_PREFIX}{module}.lora_B.weight"] = (linear.out_features, config.r)
    faults = [f"{key} is missing" for key in wanted if key not in tensors]
    faults += [f"{key} is unexpected" for key in tensors if key not in wanted]
    faults += [
        f"{key} is {tuple(tensor.shape)}, expected {wanted[key]}"
        for key, tensor in tensors.items()
        if key in wanted and tuple(tensor.shape) != wanted[key]
    ]
    if faults or not wanted:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        fault = faults[0] if faults else "targets no module of this encoder"
        raise AdapterError(f"{path}: {fault}{more}; the adapter was not made for {encoder.spec.source}")
    if not any(bool(tensor.any()) for key, tensor in tensors.items() if ".lora_B." in key):
        raise AdapterError(f"{path}: every lora_B is zero, so this adapter was never trained; export it again")
