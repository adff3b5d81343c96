"""The modules that a LoRA adapts and its number of parameters, exact before any weight is loaded. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from tuner.config import HeadSpec, LoraSpec, TrialConfig
from tuner.encoders.spec import EncoderSpec, LinearTarget, Part, Stage
from tuner.errors import Field, PlacementError
from tuner.near import nearest, shown

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer of the adapted blocks
_PARTS: dict[str, tuple[Part, ...]] = {
    "tower": ("tower",),
    "language_model": ("language_model",),
    "both": ("tower", "language_model"),
}
_BLOCKS_OF: dict[Part, str] = {"tower": "", "language_model": "the language model of "}


@dataclass(frozen=True)
class StagePlacement:
    """The adapted blocks of one stage, and the linear layers that are adapted in each of them."""

    blocks: tuple[str, ...]  # names below the root of the adapters
    linears: tuple[LinearTarget, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers, block by block."""
        return tuple(f"{block}.{linear.suffix}" for block in self.blocks for linear in self.linears)


@dataclass(frozen=True)
class Placement:
    """The linear layers that one LoRA adapts, all of them inside the blocks of the encoder."""

    stages: tuple[StagePlacement, ...]  # those that have an adapted layer
    layers: tuple[int, ...]  # adapted blocks, counted through all stages of the encoder, ascending
    targets: tuple[str, ...]  # the family's own names, in the family's order
    lora_parameters: int

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers below the root of the adapters, by block, then as `targets`."""
        return tuple(module for stage in self.stages for module in stage.modules)


def encoding_spec(spec: EncoderSpec, lora: LoraSpec | None) -> EncoderSpec:
    """The part of the encoder that a trial runs: to the end of its tower, or on through the language model.

    The embedding is taken where the adapted part ends. So a trial of `tower`, or without LoRA, costs the same and gives
    the same embedding, whether a language model is loaded or not.

    Raises:
        PlacementError: the LoRA is on a language model that does not exist, or that the encoder's path never runs.
    """
    if lora is None or lora.placement == "tower":
        return spec.tower_alone or spec
    if spec.tower_alone:
        return spec
    if spec.language_model_path is None:
        raise PlacementError(
            f"lora.placement: {spec.source} ({spec.family}) has no language model to adapt; give tower instead of "
            + lora.placement
        )
    raise PlacementError(
        f"lora.placement: {lora.placement} adapts the language model of {spec.source}, which the path {spec.path} "
        "never runs; give ",
        Field("path"),
        " full_forward",
    )


def resolve_placement(spec: EncoderSpec, lora: LoraSpec) -> Placement:
    """Resolve aliases and a negative `first_layer` against one encoder; targets named twice count once.

    Modules and layers are those of the `encoding_spec`. In each adapted part the LoRA takes the targets that the part
    has, from the part's own `first_layer` on.

    Raises:
        PlacementError: as `encoding_spec`; a target that no block has, or a first layer that does not exist; lists
            those that exist.
    """
    spec = encoding_spec(spec, lora)
    parts = _PARTS[lora.placement]
    _check_targets(spec, parts, lora.targets)
    firsts = {part: _first_layer(spec, part, lora.first_layer) for part in parts}
    placed: list[StagePlacement] = []
    layers: list[int] = []
    names: dict[str, None] = {}
    for index, stage in enumerate(spec.stages):
        if stage.part not in firsts:
            continue
        targets = _stage_targets(stage, lora.targets)
        start = spec.first_block(index)
        adapted = range(max(firsts[stage.part], start), start + stage.layers)
        if targets and adapted:
            blocks = stage.block_names()[adapted.start - start :]
            placed.append(StagePlacement(blocks, tuple(stage.targets[name] for name in targets)))
            layers += adapted
            names |= dict.fromkeys(targets)
    sizes = [len(stage.blocks) * sum(t.in_features + t.out_features for t in stage.linears) for stage in placed]
    return Placement(tuple(placed), tuple(layers), tuple(names), lora.rank * sum(sizes))


def lora_parameters(spec: EncoderSpec, lora: LoraSpec) -> int:
    """Number of parameters in all A (rank x in) and B (out x rank) of one LoRA.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    return resolve_placement(spec, lora).lora_parameters


def head_parameters(spec_hidden: int, head: HeadSpec, text_dim: int) -> int:
    """Weights and biases of the projection from the encoder's width `spec_hidden` to `text_dim`."""
    widths = (spec_hidden, text_dim) if head.kind == "linear" else (spec_hidden, head.hidden, text_dim)
    return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))


def trainable_parameters(spec: EncoderSpec, config: TrialConfig, text_dim: int) -> int:
    """Number of parameters that one trial trains: LoRA, head, logit scale if learned, and SigLIP's logit bias.

    Raises:
        PlacementError: as `resolve_placement`.
    """
    lora = lora_parameters(spec, config.lora) if config.lora else 0
    loss = int(config.loss.learn_temperature) + int(config.loss.kind == "siglip")
    return lora + head_parameters(encoding_spec(spec, config.lora).hidden_size, config.head, text_dim) + loss


def _stage_targets(stage: Stage, names: Iterable[str]) -> tuple[str, ...]:
    """The stage's own names of the targets that it has, in its own order."""
    if ALL_LINEAR in names:
        return tuple(stage.targets)
    wanted = {own for name in names for own in ((name,) if name in stage.targets else stage.aliases.get(name, ()))}
    return tuple(name for name in stage.targets if name in wanted)


def _check_targets(spec: EncoderSpec, parts: tuple[Part, ...], names: Iterable[str]) -> None:
    stages = [stage for stage in spec.stages if stage.part in parts]
    for name in names:
        if any(_stage_targets(stage, (name,)) for stage in stages):
            continue
        there = dict.fromkeys(own for stage in stages for own in stage.targets)
        aliases = dict.fromkeys(alias for stage in stages for alias in stage.aliases)
        match = nearest(name, [*there, *aliases])
        hint = f"; did you mean {match}?" if match else ""
        raise PlacementError(
            f"lora.targets: the blocks of {_BLOCKS_OF[parts[0]]}{spec.source} ({spec.family}) have no {shown(name)}; "
            f"they have {', '.join(there)}{hint}"
        )


def _first_layer(spec: EncoderSpec, part: Part, first: int) -> int:
    """Depth of the first adapted block of a part."""
    stages = [index for index, stage in enumerate(spec.stages) if stage.part == part]
    count = sum(spec.stages[index].layers for index in stages)
    if not -count <= first < count:
        raise PlacementError(
            f"lora.first_layer: {first} is outside the {count} blocks of {_BLOCKS_OF[part]}{spec.source} "
            f"({spec.family}); give 0 to {count - 1}, or -{count} to -1 counted from the top"
        )
    return spec.first_block(stages[0]) + first % count
