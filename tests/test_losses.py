"""Contrastive losses against plain loops, and the gathered gradient of several workers against one process."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.config import LossSpec
from tuner.train.losses import ContrastiveLoss
from tuner.train.workers import Workers


def batch(clips: int = 7, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    audio = F.normalize(torch.randn(clips, width), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(clips, width), dim=-1)
    same = torch.eye(clips, dtype=torch.bool)
    same[0, 2] = same[4, 1] = True
    return audio, text, same


def slow_info_nce(audio: Tensor, text: Tensor, same: Tensor, scale: float) -> float:
    """Sum over pairs, one at a time, from the definition."""
    audio = audio.detach()
    total = 0.0
    for i in range(len(audio)):
        row = [j for j in range(len(audio)) if j == i or not same[i, j]]
        column = [j for j in range(len(audio)) if j == i or not same[j, i]]
        score = [float(audio[i] @ text[j]) * scale for j in row]
        back = [float(audio[j] @ text[i]) * scale for j in column]
        own = float(audio[i] @ text[i]) * scale
        total += (math.log(sum(map(math.exp, score))) - own + math.log(sum(map(math.exp, back))) - own) / 2
    return total / len(audio)


def slow_siglip(audio: Tensor, text: Tensor, same: Tensor, scale: float, bias: float) -> float:
    audio = audio.detach()
    total = 0.0
    for i in range(len(audio)):
        for j in range(len(audio)):
            if i != j and same[i, j]:
                continue
            sign = 1 if i == j else -1
            total += math.log1p(math.exp(-sign * (float(audio[i] @ text[j]) * scale + bias)))
    return total / len(audio)


def test_info_nce_equals_its_definition() -> None:
    audio, text, same = batch()
    loss = ContrastiveLoss(LossSpec(temperature=0.1))
    assert float(loss(audio, text, same).detach()) == pytest.approx(slow_info_nce(audio, text, same, 10.0), rel=1e-5)


def test_siglip_equals_its_definition() -> None:
    audio, text, same = batch()
    loss = ContrastiveLoss(LossSpec(kind="siglip", temperature=0.1))
    expected = slow_siglip(audio, text, same, 10.0, -10.0)
    assert float(loss(audio, text, same).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_a_repeated_caption_is_no_negative(kind: Literal["infonce", "siglip"]) -> None:
    """With every other pair masked, clip 0 feels its own caption alone, wherever the masked ones stand."""
    audio, text, same = batch()
    same[0, :] = same[:, 0] = True
    moved = text.clone()
    moved[1:] = F.normalize(moved[1:] + 1.0, dim=-1)
    loss = ContrastiveLoss(LossSpec(kind=kind))
    here, there = (torch.autograd.grad(loss(audio, captions, same), audio)[0][0] for captions in (text, moved))
    assert torch.allclose(here, there)
    same[0, 1] = False
    assert not torch.allclose(torch.autograd.grad(loss(audio, moved, same), audio)[0][0], here)


def test_logit_scale_is_clamped_at_100() -> None:
    loss = ContrastiveLoss(LossSpec(temperature=0.01))
    with torch.no_grad():
        loss.log_scale.add_(3.0)
    loss.clamp_()
    assert float(loss.logit_scale().detach()) == pytest.approx(100.0, rel=1e-5)


def test_a_fixed_temperature_has_no_gradient() -> None:
    audio, text, same = batch()
    loss = ContrastiveLoss(LossSpec(learn_temperature=False))
    loss(audio, text, same).backward()
    assert loss.log_scale.grad is None


def test_rows_of_several_workers_join_in_batch_order() -> None:
    rows = torch.arange(5.0)[:, None]
    positions = torch.tensor([3, 0, 4, 1, 2])
    assert Workers().join_rows(rows[positions], [positions]).equal(rows)
