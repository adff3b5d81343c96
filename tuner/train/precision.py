"""Number format of the frozen encoder: bf16 where this machine multiplies faster in it, else fp32."""

from __future__ import annotations

import time

import torch

from tuner.config import Precision

# Below this, conversions around the matrix products cost more than bf16 gains.
WORTHWHILE_SPEEDUP = 1.3
_SHAPE = (2048, 512, 2048)  # rows, in, out: a block's linear layer of a small encoder on a few dozen clips
# A processor without instructions for bf16 takes 150 times as long for it, 9 s for one such product. A few rows show
# that at once: they take 60 times as long there.
_FEW_ROWS = 32
_HOPELESS_SLOWDOWN = 4.0


def measured_precision(device: torch.device) -> Precision:
    """Time one matrix product in both formats on this device; a GPU reports it, without timing."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if _product_seconds(torch.bfloat16, _FEW_ROWS) > _HOPELESS_SLOWDOWN * _product_seconds(torch.float32, _FEW_ROWS):
        return "fp32"
    speedup = _product_seconds(torch.float32, _SHAPE[0]) / _product_seconds(torch.bfloat16, _SHAPE[0])
    return "bf16" if speedup >= WORTHWHILE_SPEEDUP else "fp32"


def dtype_of(precision: Precision) -> torch.dtype:
    """The torch dtype of a precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _product_seconds(dtype: torch.dtype, rows: int, repeats: int = 5) -> float:
    _, width_in, width_out = _SHAPE
    left, right = torch.ones(rows, width_in, dtype=dtype), torch.ones(width_in, width_out, dtype=dtype)
    left @ right
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best
