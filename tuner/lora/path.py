"""Which linear layers the embedding depends on, found by tracing one forward pass. A torch module.

A layer's name does not tell. A layer may be called and its output dropped. An attention that passes the weights of its
projections to a fused function never calls them, so a LoRA on them changes nothing and has no gradient, and PEFT does
not warn. So one real forward pass is traced, and the gradient of a random projection of the pooled embedding is
computed. A layer is on the path if it was called and gradient comes back to its output.

Shapes: B clips, C channels, F frames, D width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuner.config import OffPath
from tuner.encoders.base import AudioEncoder
from tuner.errors import Field, PlacementError
from tuner.lora.adapter import activate, active
from tuner.lora.placement import Placement

# The softmax over a single token is constant: queries and keys of so short a clip have no gradient.
MIN_TOKENS = 8


@dataclass(frozen=True)
class TracedLinear:
    """A linear layer of the encoder and its use in one forward pass."""

    name: str  # below the encoder's model
    in_features: int
    out_features: int
    calls: int
    rows: int  # input vectors of all calls, padding rows behind the last clip included
    reached: bool  # gradient of the embedding came back to the output of a call

    @property
    def flops(self) -> int:
        """Floating-point operations of its products in that forward pass, two for each multiply and add."""
        return 2 * self.rows * self.in_features * self.out_features


@dataclass(frozen=True)
class EncodingPath:
    """All linear layers of an encoder, in the order of its modules, as one forward pass of some clips used them."""

    linears: tuple[TracedLinear, ...]
    clips: int
    tokens: int  # output tokens of these clips, which are pooled

    @property
    def on_path(self) -> tuple[TracedLinear, ...]:
        """Those through which the embedding can be changed: where a LoRA learns."""
        return tuple(linear for linear in self.linears if linear.reached)

    @property
    def off_path(self) -> tuple[TracedLinear, ...]:
        """Those that never run, or whose output does not reach the embedding."""
        return tuple(linear for linear in self.linears if not linear.reached)

    @property
    def flops(self) -> int:
        """Of all linear layers in that forward pass."""
        return sum(linear.flops for linear in self.linears)


def trace_path(encoder: AudioEncoder, features: Sequence[NDArray[np.float32]], frames: Sequence[int]) -> EncodingPath:
    """Run the encoder once on a few clips and find the linear layers that the embedding depends on.

    Adapters on it are inactive meanwhile.

    Args:
        features: of B clips, [C, F] each; clips of `MIN_TOKENS` tokens or more, see there.
        frames: real frames of each clip, B.
    """
    linears = dict(_linears(encoder.model))
    trace = _Trace()
    with torch.enable_grad(), _base_alone(encoder), trace.watching(linears):
        frames_B = torch.as_tensor(np.asarray(frames, dtype=np.int64))
        hidden_BTD, mask_BT = encoder(encoder.pad_features(features), frames_B)
        weight_BT1 = (mask_BT / mask_BT.sum(dim=1, keepdim=True)).unsqueeze(2)
        pooled_BD = (hidden_BTD.float() * weight_BT1).sum(dim=1)
        trace.send_back(pooled_BD)
    return EncodingPath(tuple(trace.linears(linears)), len(frames), int(mask_BT.sum()))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The model's own linear layers by name, whether adapters are on them or not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


@contextmanager
def _base_alone(encoder: AudioEncoder) -> Iterator[None]:
    """Without adapters, whose layers may compute with the base's weights instead of calling it."""
    name = active(encoder)
    activate(encoder, None)
    try:
        yield
    finally:
        activate(encoder, name)


class _Trace:
    """What the hooks saw, by the name of a layer."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.reached: set[str] = set()
        self._outputs: list[tuple[str, Tensor]] = []

    @contextmanager
    def watching(self, linears: dict[str, nn.Linear]) -> Iterator[None]:
        """Record every call of these layers; the hooks are removed afterwards."""
        handles = [linear.register_forward_hook(self._hook(name)) for name, linear in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def send_back(self, pooled_BD: Tensor) -> None:
        """Differentiate a random projection of the embedding by the output of every call."""
        if not pooled_BD.requires_grad or not self._outputs:
            return
        # Random, because a final layer norm removes a constant direction.
        direction_BD = torch.randn(pooled_BD.shape, generator=torch.Generator().manual_seed(0)).to(pooled_BD.device)
        outputs = [output for _, output in self._outputs]
        # Not `backward`, which would leave gradient in adapters that wait for their own.
        gradients = torch.autograd.grad((pooled_BD * direction_BD).sum(), outputs, allow_unused=True)
        for (name, _), gradient in zip(self._outputs, gradients, strict=True):
            if gradient is not None and bool(gradient.any()):
                self.reached.add(name)

    def linears(self, linears: dict[str, nn.Linear]) -> Iterator[TracedLinear]:
        """The record of each layer."""
        for name, linear in linears.items():
            yield TracedLinear(
                name, linear.in_features, linear.out_features, self.calls[name], self.rows[name], name in self.reached
            )

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def attach(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self.calls[name] += 1
            self.rows[name] += output.numel() // output.shape[-1]
            # Frozen weights build no graph, so it has to begin at the first output that gradient can reach. A copy,
            # because later code may write in place, which a leaf does not allow.
            attached = output if output.requires_grad else output.detach().requires_grad_().clone()
            if attached.requires_grad:
                self._outputs.append((name, attached))
            return attached

        return attach


def clips_to_trace(tokens: NDArray[np.int64], count: int = 2) -> NDArray[np.int64]:
    """Positions of the shortest clips of at least `MIN_TOKENS`, or of the longest clips if all are shorter.

    Args:
        tokens: of each of N clips.
    """
    order = np.argsort(tokens, kind="stable")
    enough = order[tokens[order] >= MIN_TOKENS]
    return enough[:count] if len(enough) else order[-count:]


def check_placement(placement: Placement, path: EncodingPath, policy: OffPath) -> str | None:
    """Compare a LoRA's modules with those that the embedding depends on.

    Returns:
        None where all of them are on the path; with the policy `warn`, a sentence for the user.

    Raises:
        PlacementError: with the policy `refuse`, a module is off the path; names it, the reason, and the path's layers.
    """
    known = {linear.name: linear for linear in path.linears}
    lost = [name for name in placement.modules if name not in known or not known[name].reached]
    if not lost:
        return None
    first = known.get(lost[0])
    why = "not there" if first is None else "never called" if first.calls == 0 else "called, but its output is not used"
    sentence = (
        f"lora.targets: the embedding does not depend on {len(lost)} of {len(placement.modules)} modules ({lost[0]}: "
        f"{why}), so a LoRA there learns nothing; on the encoding path are "
        f"{describe(path.on_path) or 'no linear layers'}"
    )
    if policy == "warn":
        return sentence
    raise PlacementError(
        f"{sentence}; remove the others from the targets, or allow them with ", Field("off_path"), " warn"
    )


def describe(linears: Sequence[TracedLinear]) -> str:
    """Layers by name with the count of each, `*` for numbers: `layers.*.self_attn.q_proj 4, proj 1`."""
    counts = Counter(re.sub(r"\b\d+\b", "*", linear.name) for linear in linears)
    return ", ".join(f"{name} {count}" for name, count in counts.items())
