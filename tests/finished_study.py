"""A study as a search leaves it, small but real: two trained and exported adapters and the records of them."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from pathlib import Path

from conftest import Tiny
from trained_adapter import Trained, train_and_export

from tuner.config import LoraSpec, TrialConfig
from tuner.space import load_space
from tuner.study.config import DataFacts, EncoderFacts, StudyRecord
from tuner.study.events import BASELINE, RECOMMENDED, EpochDone, TrialStarted
from tuner.study.folder import StudyFolder, adapter_name
from tuner.study.journal import Journal
from tuner.study.objectives import DEFAULT_OBJECTIVES, choose_objectives
from tuner.study.points import ConfirmedFront, Difference, Point, Scores

STUDY = "far"
CONFIGS = {
    "t0000": (BASELINE, TrialConfig(seed=1)),
    "t0001": (RECOMMENDED, TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj", "v_proj")), seed=3)),
}
OBJECTIVES = choose_objectives(DEFAULT_OBJECTIVES)
EPOCHS = 2
KNOWN = {"lora_parameters": 400.0, "trainable_parameters": 1400.0}


def write_study(tiny: Tiny, folder: Path) -> Path:
    """Write `folder`, which is then what `tuner search` would have made of two trials, both on the front."""
    start_study(tiny, folder)
    points = {}
    with closing(Journal(StudyFolder(folder))) as journal:
        for trial, (origin, config) in CONFIGS.items():
            trained = train_and_export(tiny, config, folder / "adapters", trial)
            points[trial] = _point(trial, trained)
            card = trained.card
            known = {
                "lora_parameters": float(card.lora_parameters),
                "trainable_parameters": float(card.trainable_parameters),
            }
            journal.start(TrialStarted(trial=trial, origin=origin, config=config, known=known))
            for epoch in range(1, EPOCHS + 1):
                journal.epoch(epoch_done(trial, epoch, trained.metrics))
            journal.end(trial, "complete")
    write_front(folder, points)
    return folder


def start_study(tiny: Tiny, folder: Path, trials: int = len(CONFIGS)) -> None:
    """Write the record of a study that is to have so many trials, of which none has begun."""
    folder.mkdir(parents=True)
    record = StudyRecord(
        study=folder.name,
        space=load_space("attention_only"),
        settings=tiny.settings(epochs=EPOCHS),
        objectives=OBJECTIVES,
        trials=trials,
        encoder=EncoderFacts(family="whisper", source=tiny.encoder.source, num_layers=3, hidden_size=32),
        data=DataFacts(train=36, validation=12, test=12, captions=7),
        created=datetime(2026, 1, 31, 9, 30),
    )
    record.write(StudyFolder(folder))


def write_front(folder: Path, points: dict[str, Point], trials: int | None = None) -> None:
    """Write `front.json` with these points; without `trials`, as version 0.1 did."""
    front = ConfirmedFront(
        study=folder.name, objectives=OBJECTIVES, baseline="t0000", trials=trials, points=tuple(points.values())
    )
    front.write(StudyFolder(folder))


def points_of(folder: Path) -> dict[str, Point]:
    """The points of `front.json` by trial."""
    front = ConfirmedFront.read(StudyFolder(folder))
    assert front is not None
    return {point.trial: point for point in front.points}


def epoch_done(trial: str, epoch: int, metrics: dict[str, float]) -> EpochDone:
    """What a lane reports after an epoch."""
    seconds = {"train_seconds": 1.5, "validation_seconds": 0.5}
    return EpochDone.from_row(trial, {"epoch": epoch, "loss": 2.0 / epoch, **seconds, **metrics})


def _point(trial: str, trained: Trained) -> Point:
    card = trained.card
    return Point(
        trial=trial,
        origin=CONFIGS[trial][0],
        config=card.config,
        target_modules=card.target_modules,
        layers=card.layers,
        lora_parameters=card.lora_parameters,
        trainable_parameters=card.trainable_parameters,
        validation=Scores.of(trained.metrics),
        test=Scores.of(trained.metrics, {"recall@10": (0.1, 0.9)}),
        test_vs_baseline={"recall@10": Difference(difference=0.01, interval=(-0.02, 0.04))},
        adapter=adapter_name(trial),
        on_front=True,
    )
