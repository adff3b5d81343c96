"""The choice between bf16 and fp32 by timing both."""

from __future__ import annotations

import time

import pytest
import torch

from tuner.config import Precision
from tuner.train import precision
from tuner.train.precision import measured_precision


def test_the_choice_takes_seconds_even_where_bf16_is_slow() -> None:
    """Processor time, however busy the machine is; all the products in full take a minute without bf16 instructions."""
    started = time.process_time()
    assert measured_precision(torch.device("cpu")) in ("bf16", "fp32")
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("slowdown", "chosen"), [(100.0, "fp32"), (3.0, "fp32"), (1.0, "fp32"), (1 / 1.2, "fp32"), (0.5, "bf16")]
)
def test_bf16_is_chosen_where_it_is_clearly_faster(
    slowdown: float, chosen: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def product_seconds(dtype: torch.dtype, rows: int) -> float:
        timed.append((dtype, rows))
        return rows * (slowdown if dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(precision, "_product_seconds", product_seconds)
    assert measured_precision(torch.device("cpu")) == chosen
    full = [dtype for dtype, rows in timed if rows > 1000]
    assert full == ([] if slowdown > 4 else [torch.float32, torch.bfloat16])
