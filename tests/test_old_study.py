"""A study that version 0.1 wrote (`old_study/`): two drivers, three of five trials finished, the fourth caught in the
middle. It opens, reports and resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Tiny
from searches import Runs, epochs_of

from tuner.report.answer import headline
from tuner.report.html import render
from tuner.search.stopping import StopHopeless, rule_of
from tuner.study.events import EpochDone
from tuner.study.folder import StudyFolder
from tuner.study.journal import read_history
from tuner.study.points import ConfirmedFront
from tuner.study.progress import progress_of
from tuner.study.study import Study

OLD = Path(__file__).parent / "old_study"


def old_rows() -> dict[tuple[str, int], dict[str, float]]:
    events = [json.loads(line) for line in (OLD / "journal.jsonl").read_text().splitlines()]
    return {(e["trial"], e["row"]["epoch"]): e["row"] for e in events if e["event"] == "epoch"}


def test_it_opens_with_every_figure() -> None:
    study = Study.open(OLD)
    assert study.fault is None
    assert [objective.name for objective in study.record.objectives] == ["recall@1", "trainable_parameters"]
    assert [(trial.trial, trial.state) for trial in study.trials] == [
        ("t0000", "complete"),
        ("t0001", "complete"),
        ("t0002", "complete"),
        ("t0003", "running"),
    ]
    rows = old_rows()
    assert len(rows) == 7
    for trial in study.trials:
        for number, epoch in trial.epochs.items():
            row = rows[trial.trial, number]
            assert (epoch.loss, epoch.metrics["recall@1"]) == (row["loss"], row["recall@1"])
            assert (trial.parameters, trial.lora_parameters) == (row["trainable_parameters"], row["lora_parameters"])


def test_it_keeps_the_sampler_and_trains_every_trial_to_its_end() -> None:
    """As it was begun; a new study has a stopping rule with rungs before the last epoch."""
    record = Study.open(OLD).record
    assert (record.sampler, record.stopping, record.max_parameters) == ("tpe", "never", None)
    assert rule_of(record).rungs == ()
    longer = record.changed(stopping="hopeless", settings=record.settings.model_copy(update={"epochs": 3}))
    assert isinstance(rule_of(longer), StopHopeless) and rule_of(longer).rungs == (1, 2)


def test_its_front_is_that_of_its_first_trials() -> None:
    """It was extended from three trials to five, so what is confirmed is not its front any more."""
    study, front = Study.open(OLD), ConfirmedFront.read(StudyFolder(OLD))
    assert study.front is None
    assert front is not None and front.trials == 3
    assert {point.trial for point in front.on_front} == study.on_front == {"t0000"}
    values = json.loads((OLD / "front.json").read_text())["points"][1]
    point = front.points[1]
    assert point.test.value("recall@1") == values["test"]["recall@1"]
    assert point.test_vs_baseline["recall@1"].difference == values["test_vs_baseline"]["recall@1"]["difference"]
    assert point.test.value("audio_to_text_mAP@10") == values["test"]["audio_to_text"]["mAP@10"]


def test_it_reports() -> None:
    study = Study.open(OLD)
    assert headline(study)[0].startswith("Best validation recall@1 so far: ")
    assert "t0003" in render(study)
    described = progress_of(study.record.plan(OLD), study.history).describe()
    assert described.startswith("3 of 5 trials ended, 7 of 10 epochs, front 1 point")


@pytest.mark.timeout(600)
def test_it_resumes(tiny: Tiny, tmp_path: Path) -> None:
    """On data and encoder of the same form: the fourth trial goes on from its checkpoint, the fifth is new."""
    runs = Runs(tmp_path, tiny)
    shutil.copytree(OLD, runs.study)
    record = json.loads((runs.study / "study.json").read_text())
    record["settings"] |= {"store": str(tiny.store_folder), "encoder": tiny.encoder.model_dump()}
    (runs.study / "study.json").write_text(json.dumps(record))
    runs.finish("--resume", "study")
    assert runs.states() == {f"t{number:04d}": "complete" for number in range(5)}
    history, fault = read_history(StudyFolder(runs.study))
    assert fault is None
    for (trial, epoch), row in old_rows().items():
        found = history.get(trial)
        assert found is not None and found.epochs[epoch] == EpochDone.from_row(trial, row), "not trained again"
    new = [(event.trial, event.epoch) for event in history.events() if isinstance(event, EpochDone)]
    assert set(new) == {(f"t{number:04d}", epoch) for number in range(5) for epoch in (1, 2)}
    assert epochs_of(runs.journal()) == [("t0003", 2), ("t0004", 1), ("t0004", 2)], "in today's form, once each"
    study = Study.open(runs.study)
    assert study.front is not None and {"t0000", "t0001"} <= {point.trial for point in study.front.points}
