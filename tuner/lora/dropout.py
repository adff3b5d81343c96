"""Dropout for the input of LoRA's A, cheap enough for a CPU.

torch draws one Bernoulli variable after another from its Mersenne Twister: for the input of a 384-wide layer that takes
longer than the frozen layer itself. Here one 64-bit draw of SFC64 serves eight elements, and the bits
of kept values stay unchanged. The probability is rounded to a multiple of 1/256, and the scale uses the rounded value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 2**8
_WORD = 8  # elements that one 64-bit draw serves
_BITS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


class LoraDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) with torch's own on accelerators, where it costs nothing.

    Each mask takes one number from torch's global generator, so a restored random stream gives the same mask.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.threshold = round(p * _LEVELS)

    @property
    def scale(self) -> float:
        """What kept values are multiplied by on a CPU, so that their mean stays."""
        return _LEVELS / (_LEVELS - self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability `p` and scale the rest, in training mode."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        kept: Tensor = _Kept.apply(x, self.draw_mask(x))  # type: ignore[no-untyped-call]
        return kept * self.scale

    def draw_mask(self, x: Tensor) -> Tensor:
        """A mask for `keep`: integers as wide as `x`, all bits set where an element is kept, none elsewhere."""
        generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
        words: Any = generator.random_raw(-(-x.numel() // _WORD))
        stays = words.view(np.uint8)[: x.numel()] >= self.threshold
        # As wide as the data: an operation on different integer types would convert the mask again at each use.
        return torch.from_numpy(stays.view(np.int8)).to(_BITS[x.itemsize]).neg_().view(x.shape)

    def extra_repr(self) -> str:
        """As `nn.Dropout` shows itself."""
        return f"p={self.p}"


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask keeps it and zero elsewhere; without a gradient."""
    return torch.bitwise_and(x.contiguous().view(mask.dtype), mask).view(x.dtype)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return keep(x, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return keep(gradient, mask), None
