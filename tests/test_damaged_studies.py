"""A study whose files were edited by hand, torn or planted: one sentence names the file and the field."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from study_folder import HOSTILE, edit_journal, edit_json, write_run

from tuner.errors import StudyError
from tuner.patience import Patience
from tuner.report.html import render
from tuner.report.live import PlainView
from tuner.report.terminal import RichView
from tuner.search.durable.database import check_database, open_database
from tuner.study.config import StudyRecord
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal
from tuner.study.objectives import Direction
from tuner.study.study import Study

Change = Callable[[dict[str, Any]], None]
TOO_LONG = "9" * 5_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo", trials=3)


def point(**fields: Any) -> Change:
    """The second point of a front with other values in these fields."""
    return lambda front: front["points"][1].update(fields)


def without(*path: str | int) -> Change:
    """Drop what is there."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


def setting(*path: Any) -> Change:
    """Put the last of these where the others lead."""

    def change(values: Any) -> None:
        for key in path[:-2]:
            values = values[key]
        values[path[-2]] = path[-1]

    return change


FRONTS: dict[str, tuple[Change, str]] = {
    "no on_front": (without("points", 1, "on_front"), "points.1.on_front: missing"),
    "no trial": (without("points", 0, "trial"), "points.0.trial: missing"),
    "no points": (without("points"), "points: missing"),
    "points are text": (setting("points", "none"), "points: "),
    "a point is text": (setting("points", 0, "t0000"), "points.0: "),
    "a mapping of points": (setting("points", {"t0000": {}}), "points: "),
    "validation is text": (point(validation="0.5"), "points.1.validation: "),
    "a direction is text": (point(test={"audio_to_text": "high"}), "points.1.test.audio_to_text: "),
    "a difference is a number": (point(test_vs_baseline={"recall@10": 0.1}), "points.1.test_vs_baseline.recall@10: "),
    "an interval of one": (point(test={"intervals": {"recall@10": [0.1]}}), "points.1.test.intervals.recall@10"),
    "an interval of NaN": (
        point(test={"intervals": {"recall@10": [math.nan, 0.2]}}),
        "points.1.test.intervals.recall@10.0: ",
    ),
    "a difference of infinity": (
        point(test_vs_baseline={"recall@10": {"difference": math.inf, "interval": [0, 1]}}),
        "points.1.test_vs_baseline.recall@10.difference: ",
    ),
    "a trial with slashes": (point(trial="../../t0001"), "points.1.trial: "),
    "a trial with a line end": (point(trial="t0001\n"), "points.1.trial: "),
    "a baseline with slashes": (setting("baseline", "/t0000"), "baseline: "),
    "a trial twice": (point(trial="t0000"), "points has a trial twice"),
    "an unknown field of a configuration": (setting("points", 1, "config", {"lores": None}), "points.1.config.lores: "),
    "a name that a terminal would obey": (
        setting("points", 1, "config", {"\x1b[31m\u202e": None}),
        r"points.1.config.\x1b[31m\u202e: ",
    ),
    "parameters as text": (point(trainable_parameters="many"), "points.1.trainable_parameters: "),
    "parameters of 400 digits": (point(lora_parameters=10**400), "points.1.lora_parameters: "),
    "a rank of 400 digits": (setting("points", 1, "config", "lora", "rank", 10**400), "points.1.config.lora.rank: "),
    "layers are text": (point(layers="all"), "points.1.layers: "),
    "an unknown objective": (setting("objectives", 0, "name", HOSTILE), "objectives.0: "),
    "an objective is a list": (setting("objectives", 0, ["recall@10"]), "objectives.0: "),
    "an adapter above": (point(adapter="../../etc"), "adapter of t0001: '../../etc' is outside the study"),
    "an adapter from the root": (point(adapter="/etc"), "adapter of t0001: '/etc' is outside the study"),
    "an adapter by a detour": (point(adapter="adapters/../../x"), "adapter of t0001: "),
    "an adapter with a zero": (point(adapter="a\0b"), "adapter of t0001: "),
    "an adapter is a number": (point(adapter=3), "points.1.adapter: "),
}

RECORDS: dict[str, tuple[Change, str]] = {
    "no study": (without("study"), "study: missing"),
    "no encoder": (without("encoder"), "encoder: missing"),
    "the encoder is text": (setting("encoder", "whisper"), "encoder: "),
    "the settings are a list": (setting("settings", []), "settings: "),
    "no epochs": (setting("settings", "epochs", 0), "settings.epochs: "),
    "an unknown setting": (setting("settings", "epoch", 3), "settings.epoch: no such field"),
    "trials are NaN": (setting("trials", math.nan), "trials: "),
    "trials of 400 digits": (setting("trials", 10**400), "trials: "),
    "the seed is text": (setting("seed", HOSTILE), "seed: "),
    "the date is text": (setting("created", HOSTILE), "created: "),
    "an unknown path": (setting("encoder", "path", HOSTILE), "encoder.path: "),
    "an unknown precision": (setting("precision", "fp8"), "precision: "),
    "no objectives": (setting("objectives", []), "objectives: "),
    "an unknown objective": (setting("objectives", ["recall@1000"]), "objectives.0: "),
    "the space is a name": (setting("space", "full"), "space: "),
    "an unknown dimension": (setting("space", "dimensions", "lora.rang", {"int": [1, 2]}), "space: dimensions: "),
    "a range of 400 digits": (setting("space", "dimensions", "lora.rank", {"int": [2, 10**400]}), "space"),
    "a range without steps": (
        setting("space", "dimensions", "lora.dropout", {"float": [0.0, 1e308], "step": 1e-308}),
        "",
    ),
}


@pytest.mark.parametrize("damage", FRONTS)
def test_a_damaged_front_is_one_sentence(folder: Path, damage: str) -> None:
    change, field = FRONTS[damage]
    edit_json(folder / "front.json", change)
    check_refused(folder, "front.json", field)


@pytest.mark.parametrize("damage", RECORDS)
def test_a_damaged_record_is_one_sentence(folder: Path, damage: str) -> None:
    change, field = RECORDS[damage]
    edit_json(folder / "study.json", change)
    check_refused(folder, "study.json", field)


def check_refused(folder: Path, file: str, field: str) -> None:
    """The sentence names file and field, is no page of text, and can be printed."""
    with pytest.raises(StudyError) as raised:
        Study.open(folder)
    said = str(raised.value)
    assert said.startswith(f"{folder / file}: is damaged (") and field in said
    assert said.endswith(("`tuner search --resume` writes it again", "restore the file or start a new study"))
    assert len(said) < len(str(folder)) + 500
    assert said.isprintable() and said.encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"[]", "valid dictionary"),
        (b"null", "valid dictionary"),
        (b"{ torn", "Expecting property name"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[" * 10_000, "nested too deeply"),
        (b'{"study": ' * 10_000, "nested too deeply"),
        (b'{"points": ' + b"[" * 900 + b"]" * 900 + b"}", ": missing"),
        (b'{"points": ' + b"[" * 980 + b"]" * 980 + b"}", ": missing|nested too deeply"),
        (f'{{"study": {TOO_LONG}, "points": []}}'.encode(), "study: "),
        (b'{"study": "\\ud800"}', "surrogates not allowed"),
        (b'{"study": "\\u001b[31m\\u202e", "\\u001b]0;x\\u0007": 1}', "missing"),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("file", ["study.json", "front.json"])
def test_what_is_no_record_at_all_is_one_sentence(folder: Path, file: str, content: bytes, said: str) -> None:
    (folder / file).write_bytes(content)
    check_refused(folder, file, "")
    with pytest.raises(StudyError, match=said):
        Study.open(folder)


@pytest.mark.parametrize("file", ["study.json", "front.json", "journal.jsonl"])
def test_a_folder_where_a_file_belongs_is_one_sentence(folder: Path, file: str) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(StudyError, match=re.escape(file)):
        Study.open(folder)


def test_a_file_where_the_folder_belongs_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(StudyError, match=f"{path.name}: no study here"):
            Study.open(path)


def test_links_that_lead_out_or_to_themselves(folder: Path) -> None:
    """A link in the study's folder is as good as a path out of it; one that leads to itself leads nowhere."""
    (folder / "adapters").mkdir()
    (folder / "adapters/t0000").symlink_to("t0000")
    assert Study.open(folder).front is not None
    (folder / "adapters/t0001").symlink_to("/etc")
    check_refused(folder, "front.json", "adapter of t0001: ")


def test_what_was_not_measured_is_no_damage(folder: Path) -> None:
    """NaN and text among the metrics are values that there are not; what nobody reads is passed over."""
    change = point(test={"recall@10": math.nan, "recall@5": "high", "audio_to_text": None}, mood="good")
    edit_json(folder / "front.json", change)
    study = Study.open(folder)
    assert study.front is not None
    measured = study.front.points[1].test
    assert [measured.value(name) for name in ("recall@10", "recall@5", "audio_to_text_R@10")] == [None] * 3
    json.dumps(study.front.to_values(), allow_nan=False)
    assert "t0001" in render(study)


def test_a_record_of_another_storage_is_named_by_it() -> None:
    with pytest.raises(StudyError, match=r"^s3://bucket/demo: is damaged \(study: missing"):
        StudyRecord.from_json(b"{}", "s3://bucket/demo")


# A journal is never refused: what can be read of it counts.

EVENTS: dict[str, Change] = {
    "a trial with slashes": lambda event: event.update(trial="../t0001"),
    "a trial is a number": lambda event: event.update(trial=1),
    "an unknown event": lambda event: event.update(event="trial_paused"),
    "no event": without("event"),
    "an epoch of 400 digits": lambda event: event.update(epoch=10**400),
    "an epoch that is not counted from 1": lambda event: event.update(epoch=0),
    "metrics are text": lambda event: event.update(metrics="0.5"),
    "a metric of half a surrogate pair": lambda event: event.update(metrics={"\ud800": 1}),
}


@pytest.mark.parametrize("damage", EVENTS)
def test_a_damaged_event_is_counted_and_not_used(folder: Path, damage: str) -> None:
    change = EVENTS[damage]

    def last_epoch(event: dict[str, Any]) -> None:
        if event["event"] == "epoch_done" and (event["trial"], event["epoch"]) == ("t0001", 6):
            change(event)

    edit_journal(folder, last_epoch)
    study = Study.open(folder)
    assert study.fault is not None and f"{folder / 'journal.jsonl'}: skipped 1 line" in study.fault
    assert [len(trial.epochs) for trial in study.trials] == [6, 5, 6]


@pytest.mark.parametrize(
    "line", [b"[" * 10_000, b'{"event": ' * 10_000, b'{"event": ' + TOO_LONG.encode() + b"}", b"\xff\xfe", b"[]", b"7"]
)
def test_a_line_that_is_no_event_is_counted_and_not_used(folder: Path, line: bytes) -> None:
    lines = (folder / "journal.jsonl").read_bytes().splitlines()
    (folder / "journal.jsonl").write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]) + b"\n")
    study = Study.open(folder)
    assert study.fault is not None and "skipped 1 line (1 damaged)" in study.fault
    assert [len(trial.epochs) for trial in study.trials] == [6, 6, 6]


def test_absurd_numbers_stay_numbers_everywhere(folder: Path) -> None:
    """In table, page and views; operations of a large encoder do not fit into 64 bits either."""

    def change(event: dict[str, Any]) -> None:
        if event["event"] == "trial_started" and event["trial"] == "t0001":
            event["known"] |= {"training_flops": 3e20, "trainable_parameters": 1e300, "inference_flops": -1.0}

    edit_journal(folder, change)
    study = Study.open(folder)
    assert study.fault is None
    with closing(Journal(StudyFolder(folder))):
        pass
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert {row["training_flops"] for row in rows if row["trial"] == "t0001"} == {3e20}
    out = io.StringIO()
    for view in (PlainView(out), RichView(out)):
        view.show(study.record.plan(folder))
        for event in study.history.events():
            view.show(event)
        view.close()
    assert "t0001 complete" in out.getvalue()
    assert "t0001" in render(study)


def test_a_lost_database_is_not_begun_again(tmp_path: Path) -> None:
    """Its trials would be trained again, under the same names."""
    shutil.copytree(Path(__file__).parent / "old_study", tmp_path / "study")
    folder = StudyFolder(tmp_path / "study")
    directions: list[Direction] = ["maximize", "minimize"]
    name = StudyRecord.read(folder).study
    with closing(Journal(folder)) as journal:
        check_database(open_database(folder.database, Patience(lambda text: None), name, directions), journal)
        folder.database.unlink()
        empty = open_database(folder.database, Patience(lambda text: None), name, directions)
        with pytest.raises(
            StudyError, match=r"study.db: has no trials, but journal.jsonl has 4; restore the database, or"
        ):
            check_database(empty, journal)
