"""Where a LoRA goes in an encoder and what it costs, known exactly before any weight is loaded. No torch here."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass

from tuner.config import HeadSpec, LoraSpec, TrialConfig
from tuner.encoders.spec import EncoderSpec
from tuner.errors import PlacementError


@dataclass(frozen=True)
class Placement:
    """The linear layers that one LoRA adapts, all of them inside the blocks of the encoder's tower."""

    modules: tuple[str, ...]  # full names below the tower, by block, then as `targets`
    layers: tuple[int, ...]  # adapted blocks, ascending
    targets: tuple[str, ...]  # the family's own names, in the family's order
    lora_parameters: int


def resolve_placement(spec: EncoderSpec, lora: LoraSpec) -> Placement:
    """Resolve aliases and a negative `first_layer` against one encoder; targets named twice count once.

    Raises:
        PlacementError: a target that no block has, or a first layer that does not exist; lists what is there.
    """
    wanted = {_resolve_target(spec, name) for name in lora.targets}
    targets = tuple(name for name in spec.targets if name in wanted)
    layers = tuple(range(_first_layer(spec, lora.first_layer), spec.num_layers))
    linears = [spec.targets[name] for name in targets]
    return Placement(
        modules=tuple(f"{spec.block_path.format(layer)}.{linear.suffix}" for layer in layers for linear in linears),
        layers=layers,
        targets=targets,
        lora_parameters=len(layers) * sum(lora.rank * (linear.in_features + linear.out_features) for linear in linears),
    )


def lora_parameters(spec: EncoderSpec, lora: LoraSpec) -> int:
    """Numbers in all A (rank x in) and B (out x rank) of one LoRA.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    return resolve_placement(spec, lora).lora_parameters


def head_parameters(spec_hidden: int, head: HeadSpec, text_dim: int) -> int:
    """Weights and biases of the projection from the encoder's width `spec_hidden` to `text_dim`."""
    widths = (spec_hidden, text_dim) if head.kind == "linear" else (spec_hidden, head.hidden, text_dim)
    return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))


def trainable_parameters(spec: EncoderSpec, config: TrialConfig, text_dim: int) -> int:
    """All numbers that one trial trains: LoRA, head, the logit scale if learnt, and the logit bias of SigLIP.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    lora = lora_parameters(spec, config.lora) if config.lora else 0
    loss = int(config.loss.learn_temperature) + int(config.loss.kind == "siglip")
    return lora + head_parameters(spec.hidden_size, config.head, text_dim) + loss


def _resolve_target(spec: EncoderSpec, name: str) -> str:
    if name in spec.targets:
        return name
    if name in spec.aliases:
        return spec.aliases[name]
    near = difflib.get_close_matches(name, [*spec.targets, *spec.aliases], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise PlacementError(
        f"lora.targets: the blocks of {spec.source} ({spec.family}) have no {name!r}; "
        f"there are {', '.join(spec.targets)}{hint}"
    )


def _first_layer(spec: EncoderSpec, first: int) -> int:
    if not -spec.num_layers <= first < spec.num_layers:
        raise PlacementError(
            f"lora.first_layer: {first} is outside the {spec.num_layers} blocks of {spec.source} ({spec.family}); "
            f"give 0 to {spec.num_layers - 1}, or -{spec.num_layers} to -1 counted from the top"
        )
    return first % spec.num_layers
