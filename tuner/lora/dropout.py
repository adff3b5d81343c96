"""Dropout for the input of LoRA's A, cheap enough for a CPU.

torch draws one Bernoulli variable after another from its Mersenne Twister: for the input of a 384-wide layer that takes
longer than the frozen layer itself. Here one 64-bit draw serves four elements, and kept values pass through unchanged
bits. The probability is rounded to a multiple of 1/65536.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LEVELS = 2**16
_LOWEST = -(2**15)


class LoraDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) with torch's own on accelerators, where it costs nothing.

    Draws from torch's global generator, like `nn.Dropout`, though not the same numbers.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability `p` and scale the rest by 1 / (1 - p), in training mode."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        kept: Tensor = _LaneDropout.apply(x, self.p)  # type: ignore[no-untyped-call]
        return kept

    def extra_repr(self) -> str:
        """As `nn.Dropout` shows itself."""
        return f"p={self.p}"


class _LaneDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = _keep_mask(x.shape, p)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return _masked(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _masked(gradient, keep, ctx.scale), None


def _keep_mask(shape: torch.Size, p: float) -> Tensor:
    """int16, all bits set where an element stays and none where it goes."""
    lanes = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    drawn = lanes.view(torch.int16)[: shape.numel()].view(shape)
    return drawn.ge_(_LOWEST + round(p * _LEVELS)).neg_()


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    if x.dtype == torch.bfloat16:
        bits = torch.bitwise_and(x.contiguous().view(torch.int16), keep)
        return bits.view(torch.bfloat16).mul_(scale)
    return x * keep.to(x.dtype).mul_(-scale)
