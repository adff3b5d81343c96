"""A run folder as the search writes it, with invented but consistent numbers, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuner.pareto import pareto_front
from tuner.space import load_space

HEAD = 147_840
EPOCHS = 6
# A name from a manifest or a shell can hold markup; the page must show it, never run it.
HOSTILE = "<script>alert('study')</script>"


def write_run(folder: Path, *, trials: int = 14, front: bool = True, objectives: int = 2, name: str = "demo") -> Path:
    """Write study.json, trials.parquet and front.json; trial 3 fails, the last one is still running without a front."""
    folder.mkdir(parents=True, exist_ok=True)
    goals = [
        {"metric": "recall@10", "direction": "maximize"},
        {"metric": "trainable_parameters", "direction": "minimize"},
    ][:objectives]
    study = {
        "study": name,
        "space": load_space("attention_only").to_dict(),
        "settings": {"store": "store/demo", "epochs": EPOCHS, "batch_size": 128},
        "objectives": goals,
        "encoder": {"family": "whisper", "source": "whisper-tiny", "num_layers": 4, "hidden_size": 384},
        "data": {"train": 2940, "validation": 518, "test": 520, "captions": 758},
        "created": "2026-01-31T09:30:00",
        "seed": 0,
    }
    (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")
    if trials:
        rows = [
            row for number in range(trials) for row in trial_rows(number, running=not front and number == trials - 1)
        ]
        columns = dict.fromkeys(column for row in rows for column in row)
        table = pa.table({column: [row.get(column) for row in rows] for column in columns})
        pq.write_table(table, folder / "trials.parquet")
    if front:
        (folder / "front.json").write_text(json.dumps(front_of(name, goals, trials)), encoding="utf-8")
    return folder


def trial_rows(number: int, running: bool) -> list[dict[str, Any]]:
    """One row per epoch; recall rises with the logarithm of rank and with the epoch."""
    rng = np.random.default_rng(number)
    config = _config(number, rng)
    lora = 0 if number == 0 else int(config["lora.rank"]) * 384 * 2 * 4 * (len(str(config["lora.targets"]).split(",")))
    failed, ended = number == 3, "running" if running else "complete"
    gain = 0.0 if number == 0 else 0.02 + 0.015 * math.log2(config["lora.rank"]) + rng.normal(0, 0.006)
    return [
        {
            "trial": f"t{number:04d}",
            "number": number,
            "origin": {0: "projection_only", 1: "recommended"}.get(number, "sampled"),
            "state": "failed" if failed else ended,
            "reason": "the loss became NaN; lower optim.lora_lr <img src=x onerror=alert(1)>" if failed else None,
            "epoch": epoch,
            "loss": float("nan") if failed and epoch == 2 else 4.0 / epoch,
            "train_seconds": 12.0,
            "validation_seconds": 1.5,
            "lora_parameters": lora,
            "trainable_parameters": lora + HEAD,
            "recall@10": (0.38 + gain) * (1 - 0.6 * math.exp(-epoch / 1.5)),
            **config,
        }
        for epoch in range(1, 3 if failed else (EPOCHS if not running else 3) + 1)
    ]


def front_of(name: str, objectives: list[dict[str, Any]], trials: int) -> dict[str, Any]:
    """The front of the finished trials, and the projection alone and the recommendation whether on it or not."""
    finished = [
        rows[-1] for rows in (trial_rows(n, running=False) for n in range(trials)) if rows[-1]["state"] == "complete"
    ]
    values = [[row[goal["metric"]] for goal in objectives] for row in finished]
    front = set(pareto_front(values, [goal["direction"] for goal in objectives]).tolist())
    named = ("projection_only", "recommended")
    points = [_point(row, i in front) for i, row in enumerate(finished) if i in front or row["origin"] in named]
    return {"study": name, "objectives": objectives, "baseline": "t0000", "points": points}


def _point(row: dict[str, Any], on_front: bool) -> dict[str, Any]:
    """A point that loses 0.01 from validation to test."""
    lora, test = None, round(row["recall@10"] - 0.01, 4)
    gain = test - round(trial_rows(0, running=False)[-1]["recall@10"] - 0.01, 4)
    if row["lora.rank"]:
        settings = {key: row[f"lora.{key}"] for key in ("rank", "dropout")}
        lora = {**settings, "alpha_ratio": 2.0, "targets": row["lora.targets"].split(","), "first_layer": 0}
    measured = {"R@1": 0.21, "R@5": 0.35, "R@10": test, "mAP@10": 0.27, "median_rank": 14.0, "N": 520}
    sides = {"audio_to_text": measured, "text_to_audio": {**measured, "N": 410}}
    return {
        **{key: row[key] for key in ("trial", "origin", "lora_parameters", "trainable_parameters")},
        "on_front": on_front,
        "config": {"lora": lora, "head": {"kind": "linear"}},
        "target_modules": [f"layers.{i}.self_attn.q_proj" for i in range(4)] if lora else [],
        "layers": [0, 1, 2, 3] if lora else [],
        "validation": {"recall@10": row["recall@10"], **sides},
        "test": {"recall@10": test, **sides, "intervals": {"recall@10": [test - 0.025, test + 0.025]}},
        "test_vs_baseline": {"recall@10": {"difference": gain, "interval": [gain - 0.02, gain + 0.02]}} if lora else {},
        "adapter": f"adapters/{row['trial']}",
    }


def _config(number: int, rng: np.random.Generator) -> dict[str, Any]:
    if number == 0:
        return {
            "lora.rank": None,
            "lora.targets": None,
            "lora.dropout": None,
            "optim.lora_lr": 1e-3,
            "head.kind": "linear",
        }
    sampled = number > 1
    return {
        "lora.rank": int(2 ** rng.uniform(1, 6)) if sampled else 16,
        "lora.targets": str(rng.choice(["q_proj,k_proj,v_proj,o_proj", "q_proj,v_proj"])),
        "lora.dropout": float(rng.choice([0.0, 0.05, 0.1, 0.2])),
        "optim.lora_lr": float(10 ** rng.uniform(-3.5, -2.5)),
        "head.kind": "linear",
    }
