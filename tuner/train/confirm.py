"""Confirm a front where its trials were trained: export each adapter, load it from its files, measure the test gallery.

What is measured is what a user gets: plain PEFT in the unchanged encoder, from the exported files. It runs beside the
training, whose process has encoder and data in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.config import Precision, TrialConfig
from tuner.errors import StudyError
from tuner.train.evaluate import attach_exported, nested
from tuner.train.export import export_adapter, make_card
from tuner.train.member import checkpoint_path
from tuner.train.metrics import Retrieval, bootstrap
from tuner.train.pack import Pack

Point = dict[str, Any]


def confirm_trials(
    pack: Pack, trials: Sequence[tuple[str, str, Point]], baseline: str | None, run_dir: Path, precision: Precision
) -> list[Point]:
    """Export the trials to `run_dir/adapters/<trial>` and measure them from there.

    Args:
        pack: without members; its encoder, store and settings are those of the study.
        trials: id, origin and configuration (as plain values) of each.
        baseline: the trial that test metrics are compared with, if it is among them.

    Returns:
        The points of front.json, in the order of `trials`.

    Raises:
        TunerError: a checkpoint is missing or of another configuration, or the disk is full.
    """
    points: list[Point] = []
    tests: dict[str, Retrieval] = {}
    for trial, origin, values in trials:
        config = TrialConfig.model_validate(values)
        point, tests[trial] = _confirm(pack, trial, config, run_dir, precision)
        points.append({**point, "origin": origin})
    for point in points:
        point["test_vs_baseline"] = _difference(tests[point["trial"]], tests[baseline]) if baseline else None
    return points


def _confirm(
    pack: Pack, trial: str, config: TrialConfig, run_dir: Path, precision: Precision
) -> tuple[Point, Retrieval]:
    folder, checkpoint = run_dir / "adapters" / trial, checkpoint_path(run_dir, trial)
    if not checkpoint.exists():
        raise StudyError(f"{checkpoint}: missing, so {trial} cannot be exported; start a new study")
    member = pack.attach(trial, config, checkpoint)
    card = make_card(member, pack.store, pack.settings, precision)
    export_adapter(member, card, pack.settings, folder)
    pack.detach(trial)
    loaded = attach_exported(folder, card, pack.encoder)
    test = loaded.evaluate(pack.store, "test")
    validation = loaded.evaluate(pack.store, "validation")
    loaded.release()
    point = {
        "trial": trial,
        "config": config.model_dump(mode="json"),
        "target_modules": list(card.target_modules),
        "layers": list(card.layers),
        "lora_parameters": card.lora_parameters,
        "trainable_parameters": card.trainable_parameters,
        "validation": nested(validation.metrics()),
        "test": {**nested(test.metrics()), "intervals": bootstrap(test)},
        "adapter": f"adapters/{trial}",
    }
    return point, test


def _difference(test: Retrieval, baseline: Retrieval) -> Point:
    """Paired differences over the same test queries, with intervals."""
    ours, theirs = test.metrics(), baseline.metrics()
    intervals = bootstrap(test, baseline)
    return {key: {"difference": ours[key] - theirs[key], "interval": interval} for key, interval in intervals.items()}
