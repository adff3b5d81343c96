"""A study's folder as the search writes it, with invented but consistent numbers, for the tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from tuner.config import EncoderRef, LoraSpec, OptimSpec, RunSettings, TrialConfig
from tuner.space import load_space
from tuner.study.config import DataFacts, EncoderFacts, StudyRecord
from tuner.study.events import BASELINE, RECOMMENDED, SAMPLED, EpochDone, TrialStarted
from tuner.study.folder import StudyFolder, adapter_name
from tuner.study.history import Trial
from tuner.study.journal import Journal, read_history
from tuner.study.objectives import DEFAULT_OBJECTIVES, Objectives, choose_objectives
from tuner.study.points import ConfirmedFront, Difference, Point, Scores

HEAD = 147_840
EPOCHS = 6
FAILED = 3
# A name from a manifest or a shell can hold markup; the page must show it, never run it.
HOSTILE = "<script>alert('study')</script>"
REASON = "the loss became NaN; lower optim.lora_lr <img src=x onerror=alert(1)>"
ORIGINS = {0: BASELINE, 1: RECOMMENDED}


def write_run(path: Path, *, trials: int = 14, front: bool = True, objectives: int = 2, name: str = "demo") -> Path:
    """Write study.json, journal.jsonl and front.json; trial 3 fails, the last one is still running without a front."""
    path.mkdir(parents=True, exist_ok=True)
    folder = StudyFolder(path)
    goals = choose_objectives(DEFAULT_OBJECTIVES[:objectives])
    record_of(name, goals, max(1, trials)).write(folder)
    with closing(Journal(folder)) as journal:
        for number in range(trials):
            write_trial(journal, number, running=not front and number == trials - 1)
    if front:
        front_of(name, goals, folder).write(folder)
    return path


def record_of(name: str, objectives: Objectives, trials: int) -> StudyRecord:
    """What the study was asked for."""
    return StudyRecord(
        study=name,
        space=load_space("attention_only"),
        settings=RunSettings(
            store="store/demo", encoder=EncoderRef(source="whisper-tiny"), epochs=EPOCHS, batch_size=128
        ),
        objectives=objectives,
        trials=trials,
        encoder=EncoderFacts(family="whisper", source="whisper-tiny", num_layers=4, hidden_size=384),
        data=DataFacts(train=2940, validation=518, test=520, captions=758),
        created=datetime(2026, 1, 31, 9, 30),
    )


def write_trial(journal: Journal, number: int, running: bool = False) -> None:
    """A trial; recall rises with the logarithm of rank and with the epoch."""
    rng, trial, failed = np.random.default_rng(number), f"t{number:04d}", number == FAILED
    config = _config(number, rng)
    lora, gain = 0, 0.0
    if config.lora is not None:
        lora = config.lora.rank * 384 * 2 * 4 * len(config.lora.targets)
        gain = 0.02 + 0.015 * math.log2(config.lora.rank) + rng.normal(0, 0.006)
    known = {"lora_parameters": float(lora), "trainable_parameters": float(lora + HEAD)}
    journal.start(TrialStarted(trial=trial, origin=ORIGINS.get(number, SAMPLED), config=config, known=known))
    for epoch in range(1, 3 if failed else (EPOCHS if not running else 3) + 1):
        recall = (0.38 + gain) * (1 - 0.6 * math.exp(-epoch / 1.5))
        journal.epoch(
            EpochDone(
                trial=trial,
                epoch=epoch,
                loss=math.nan if failed and epoch == 2 else 4.0 / epoch,
                metrics={"recall@10": recall},
                train_seconds=12.0,
                validation_seconds=1.5,
            )
        )
    if not running:
        journal.end(trial, "failed" if failed else "complete", REASON if failed else None)


def front_of(name: str, objectives: Objectives, folder: StudyFolder) -> ConfirmedFront:
    """The front of the complete trials, and the projection alone and the recommendation whether on it or not."""
    history, _ = read_history(folder)
    front = {trial.trial for trial in history.front(objectives)}
    complete = [trial for trial in history.trials if trial.state == "complete"]
    chosen = [trial for trial in complete if trial.trial in front or trial.origin in ORIGINS.values()]
    points = tuple(_point(trial, complete[0], trial.trial in front) for trial in chosen)
    return ConfirmedFront(study=name, objectives=objectives, baseline="t0000", points=points)


def _point(trial: Trial, baseline: Trial, on_front: bool) -> Point:
    """A point that loses 0.01 from validation to test."""
    validation, lora = trial.value("recall@10"), trial.config.lora
    test = round(validation - 0.01, 4)
    gain = test - round(baseline.value("recall@10") - 0.01, 4)
    measured = {"R@1": 0.21, "R@5": 0.35, "R@10": test, "mAP@10": 0.27, "median_rank": 14.0}
    sides = {f"audio_to_text_{key}": value for key, value in {**measured, "N": 520}.items()}
    sides |= {f"text_to_audio_{key}": value for key, value in {**measured, "N": 410}.items()}
    return Point(
        trial=trial.trial,
        origin=trial.origin,
        config=trial.config,
        target_modules=tuple(f"layers.{i}.self_attn.q_proj" for i in range(4)) if lora else (),
        layers=(0, 1, 2, 3) if lora else (),
        lora_parameters=trial.lora_parameters or 0,
        trainable_parameters=trial.parameters or 0,
        validation=Scores.of({"recall@10": validation, **sides}),
        test=Scores.of({"recall@10": test, **sides}, {"recall@10": (test - 0.025, test + 0.025)}),
        test_vs_baseline={"recall@10": Difference(difference=gain, interval=(gain - 0.02, gain + 0.02))}
        if lora
        else {},
        adapter=adapter_name(trial.trial),
        on_front=on_front,
    )


def _config(number: int, rng: np.random.Generator) -> TrialConfig:
    if number == 0:
        return TrialConfig(optim=OptimSpec(lora_lr=1e-3))
    sampled = number > 1
    lora = LoraSpec(
        rank=int(2 ** rng.uniform(1, 6)) if sampled else 16,
        targets=tuple(str(rng.choice(["q_proj,k_proj,v_proj,o_proj", "q_proj,v_proj"])).split(",")),
        dropout=float(rng.choice([0.0, 0.05, 0.1, 0.2])),
    )
    return TrialConfig(lora=lora, optim=OptimSpec(lora_lr=float(10 ** rng.uniform(-3.5, -2.5))))


# Files as somebody who edits them by hand leaves them


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the object of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_points(folder: Path, **changes: dict[str, Any]) -> None:
    """Change fields of front points by trial."""

    def change(front: dict[str, Any]) -> None:
        for point in front["points"]:
            point.update(changes.get(point["trial"], {}))

    edit_json(folder / "front.json", change)


def edit_journal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change each event of the journal."""
    path = folder / "journal.jsonl"
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for event in events:
        change(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
