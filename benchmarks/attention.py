"""Which attention is faster on which shapes: plain matrix products or torch's fused `scaled_dot_product_attention`.

Forward and backward, heads as in Whisper tiny (6 of width 64), as many clips of T tokens as one forward pass holds.
`tuner.encoders.packed.PLAIN_WIDTH` follows from this table: up to it, plain products run on a CPU in bf16.

Shapes: H heads, G clips, T tokens, d head width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import run
from benchmarks.table import show

HEADS, WIDTH = 6, 64
TOKENS_PER_FORWARD = 4096
LENGTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1500)
SECONDS = 1.0

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def plain(query_HGTd: Tensor, key_HGTd: Tensor, value_HGTd: Tensor, bias_HGTT: Tensor | None) -> Tensor:
    """Scores, softmax and weighted sum as three operations; the scores stay in memory for the backward pass."""
    score_HGTT = query_HGTd @ key_HGTd.transpose(2, 3)
    if bias_HGTT is not None:
        score_HGTT = score_HGTT + bias_HGTT
    return score_HGTT.softmax(dim=3) @ value_HGTd


def fused(query_HGTd: Tensor, key_HGTd: Tensor, value_HGTd: Tensor, bias_HGTT: Tensor | None) -> Tensor:
    """Torch's own, unscaled like `plain`."""
    return F.scaled_dot_product_attention(query_HGTd, key_HGTd, value_HGTd, attn_mask=bias_HGTT, scale=1.0)


def make_inputs(tokens: int, dtype: torch.dtype, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value with gradients, and a bias that hides the last eighth of every other clip."""
    clips = max(1, TOKENS_PER_FORWARD // tokens)
    generator = torch.Generator().manual_seed(0)
    states = [
        (torch.randn(HEADS, clips, tokens, WIDTH, generator=generator) * WIDTH**-0.25).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    if not masked:
        return states, None
    bias_GT = torch.zeros(clips, tokens, dtype=dtype)
    bias_GT[::2, tokens - tokens // 8 :] = torch.finfo(dtype).min
    return states, bias_GT[None, :, None, :].expand(HEADS, -1, -1, -1)


def best_seconds(attention: Attention, states: list[Tensor], bias: Tensor | None, seconds: float) -> float:
    """Fastest forward and backward pass, over as many repeats as fit into `seconds` (at least two)."""
    gradient = torch.ones_like(states[0])
    best, begin, repeats = float("inf"), time.perf_counter(), 0
    while repeats < 2 or time.perf_counter() - begin < seconds:
        started = time.perf_counter()
        torch.autograd.grad(attention(states[0], states[1], states[2], bias), states, gradient)
        best, repeats = min(best, time.perf_counter() - started), repeats + 1
    return best


def main(seconds: float = SECONDS, masked: bool = False, quick: bool = False) -> None:
    """Time both in fp32 and bf16."""
    torch.set_num_threads(os.cpu_count() or 1)
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for tokens in LENGTHS[:3] if quick else LENGTHS:
            states, bias = make_inputs(tokens, dtype, masked)
            times = [best_seconds(attention, states, bias, 0.05 if quick else seconds) for attention in (plain, fused)]
            rows.append(
                (
                    str(tokens),
                    str(states[0].shape[1]),
                    *(f"{1e3 * value:.2f}" for value in times),
                    "plain" if times[0] < times[1] else "fused",
                )
            )
        title = f"attention, forward and backward, {dtype}{', masked' if masked else ''}"
        show(title, ("tokens a clip", "clips", "plain ms", "fused ms", "faster"), rows)


if __name__ == "__main__":
    run(main)
