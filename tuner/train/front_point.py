"""Confirm a trial of the front on a lane: export its adapter, load it from its files, measure the test gallery.

What is measured is what a user gets: plain PEFT in the unchanged encoder, from the exported files. It runs beside the
training, whose process has encoder and data in memory.
"""

from __future__ import annotations

from pathlib import Path

from tuner.config import Precision
from tuner.errors import StudyError
from tuner.study.folder import StudyFolder, adapter_name
from tuner.study.points import Point, Scores
from tuner.train.evaluate import attach_exported
from tuner.train.export import export_adapter, make_card
from tuner.train.pack import Pack
from tuner.train.results import Candidate, Measured, intervals, resample


def confirm_trial(pack: Pack, candidate: Candidate, run_dir: Path, precision: Precision) -> Measured:
    """Export a trial to `run_dir/adapters/<trial>` and measure it from there.

    Args:
        pack: without members; its encoder, store and settings are those of the study.

    Raises:
        TunerError: a checkpoint is missing or of another configuration, or the disk is full.
    """
    trial, config = candidate.trial, candidate.config
    folder, checkpoint = StudyFolder(run_dir).adapter(trial), StudyFolder(run_dir).checkpoint(trial)
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
    metrics, draws = test.metrics(), resample(test)
    point = Point(
        trial=trial,
        origin=candidate.origin,
        config=config,
        target_modules=card.target_modules,
        layers=card.layers,
        lora_parameters=card.lora_parameters,
        trainable_parameters=card.trainable_parameters,
        validation=Scores.of(validation.metrics()),
        test=Scores.of(metrics, intervals(draws)),
        adapter=adapter_name(trial),
        on_front=False,
    )
    return Measured(point, metrics, draws)
