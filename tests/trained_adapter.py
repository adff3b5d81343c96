"""A small adapter, trained and exported without Ray, for the tests of what is done with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conftest import Tiny
from torch import Tensor

from tuner.config import TrialConfig
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.train.export import Card, export_adapter, make_card
from tuner.train.pack import Pack, PackContext

CLIPS = np.arange(60)  # all of the tiny store


@dataclass(frozen=True)
class Trained:
    """An exported adapter and what the pack that trained it computed."""

    folder: Path
    card: Card
    embeddings: Tensor
    metrics: dict[str, float]


def train_and_export(tiny: Tiny, config: TrialConfig, folder: Path, trial: str = "t0007") -> Trained:
    """Train on the tiny store and export to `folder`/`trial`."""
    settings = tiny.settings()
    encoder = load_encoder(inspect_encoder(tiny.encoder), torch.float32)
    pack = Pack(PackContext(encoder, tiny.store(), settings))
    member = pack.attach(trial, config)
    for _ in range(settings.epochs):
        pack.train_epoch([trial])
    card = make_card(member, pack.store, settings, "fp32")
    export_adapter(member, card, settings, folder / trial)
    return Trained(folder / trial, card, pack.embed(trial, CLIPS), pack.validate(trial).metrics())
