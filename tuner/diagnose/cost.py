"""What a training step and a whole search cost: counted from the blocks' shapes, and measured where a step ran.

Shapes: T tokens of a clip, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tuner.config import LoraSpec
from tuner.encoders.spec import EncoderSpec
from tuner.lora.placement import encoding_spec, resolve_placement

# fp32 weight, gradient and both moments of AdamW.
BYTES_PER_TRAINED = 16


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one training step in the blocks; stem and head are small beside them."""

    forward: int  # of all blocks: what validation costs
    step: int  # forward from the first adapted block on, where the states below are cached, and backward


def step_flops(spec: EncoderSpec, lora: LoraSpec, frames: Iterable[int]) -> StepFlops:
    """Of clips with these numbers of real frames.

    A product costs two operations for each multiply and add. Backward through a frozen layer costs its forward again
    (gradient of the input alone), through attention twice; LoRA's own products three times their forward.
    """
    spec = encoding_spec(spec, lora)
    placement = resolve_placement(spec, lora)
    # Inputs and outputs of the adapted layers of each adapted block.
    adapted = {
        block: sum(linear.in_features + linear.out_features for linear in stage.linears)
        for stage in placement.stages
        for block in stage.blocks
    }
    lengths = list(frames)
    first, names = min(placement.layers), spec.block_names
    forward = step = 0
    for depth in range(spec.num_layers):
        stage = spec.stages[spec.stage_at(depth)]
        tokens = [spec.sequence_length(length, depth) for length in lengths]
        linear = 2 * sum(t.in_features * t.out_features for t in stage.targets.values()) * sum(tokens)
        # Scores and their product with the values, 2 T T D each.
        attention = 4 * stage.width * sum(length * length for length in tokens)
        forward += linear + attention
        if depth >= first:
            step += 2 * linear + 3 * attention
        step += 6 * lora.rank * sum(tokens) * adapted.get(names[depth], 0)
    return StepFlops(forward, step)
