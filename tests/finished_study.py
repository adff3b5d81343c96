"""A study as a search leaves it, small but real: two trained and exported adapters and the records of them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from conftest import Tiny
from trained_adapter import Trained, train_and_export

from tuner.config import LoraSpec, TrialConfig
from tuner.records import Journal, write_json
from tuner.space import load_space
from tuner.train.evaluate import nested

STUDY = "far"
CONFIGS = {
    "t0000": ("projection_only", TrialConfig(seed=1)),
    "t0001": ("recommended", TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj", "v_proj")), seed=3)),
}
OBJECTIVES = [
    {"metric": "recall@10", "direction": "maximize"},
    {"metric": "trainable_parameters", "direction": "minimize"},
]
EPOCHS = 2


def write_study(tiny: Tiny, folder: Path) -> Path:
    """Write `folder`, which is then what `tuner search` would have made of two trials, both on the front."""
    start_study(tiny, folder)
    trained = {}
    with closing(Journal(folder)) as journal:
        for trial, (origin, config) in CONFIGS.items():
            trained[trial] = train_and_export(tiny, config, folder / "adapters", trial)
            journal.trial(trial, origin, config.model_dump(mode="json"))
            for epoch in range(1, EPOCHS + 1):
                journal.epoch(trial, epoch_row(trained[trial], epoch))
            journal.end(trial, "complete")
    write_front(folder, {trial: _point(trial, item) for trial, item in trained.items()})
    return folder


def start_study(tiny: Tiny, folder: Path, trials: int = len(CONFIGS)) -> None:
    """Write the record of a study that is to have so many trials, of which none has begun."""
    folder.mkdir(parents=True)
    record = {
        "study": folder.name,
        "space": load_space("attention_only").to_dict(),
        "settings": tiny.settings(epochs=EPOCHS).model_dump(mode="json"),
        "objectives": OBJECTIVES,
        "encoder": {"family": "whisper", "source": tiny.encoder.source, "num_layers": 3, "hidden_size": 32},
        "data": {"train": 36, "validation": 12, "test": 12, "captions": 7},
        "created": "2026-01-31T09:30:00",
        "seed": 0,
        "trials": trials,
    }
    write_json(folder / "study.json", record)


def write_front(folder: Path, points: dict[str, dict[str, Any]], **changes: Any) -> None:
    """Write `front.json` with these points."""
    front = {"study": folder.name, "objectives": OBJECTIVES, "baseline": "t0000", "points": list(points.values())}
    write_json(folder / "front.json", front | changes)


def points_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The points of `front.json` by trial."""
    return {point["trial"]: point for point in json.loads((folder / "front.json").read_text())["points"]}


def epoch_row(trained: Trained | None, epoch: int, recall: float = 0.5) -> dict[str, Any]:
    """What a lane reports after an epoch; of a real adapter, or invented."""
    counts = (trained.card.lora_parameters, trained.card.trainable_parameters) if trained else (400, 1400)
    measured = trained.metrics if trained else {"recall@10": recall}
    named = dict(zip(("lora_parameters", "trainable_parameters"), counts, strict=True))
    return {"epoch": epoch, "loss": 2.0 / epoch, "train_seconds": 1.5, "validation_seconds": 0.5, **named, **measured}


def _point(trial: str, trained: Trained) -> dict[str, Any]:
    card, measured = trained.card, nested(trained.metrics)
    return {
        "trial": trial,
        "origin": CONFIGS[trial][0],
        "on_front": True,
        "config": card.config.model_dump(mode="json"),
        "target_modules": list(card.target_modules),
        "layers": list(card.layers),
        "lora_parameters": card.lora_parameters,
        "trainable_parameters": card.trainable_parameters,
        "validation": measured,
        "test": measured | {"intervals": {"recall@10": [0.1, 0.9]}},
        "test_vs_baseline": {"recall@10": {"difference": 0.01, "interval": [-0.02, 0.04]}},
        "adapter": f"adapters/{trial}",
    }
