"""Folders of studies: damaged records, journals, fronts and databases, in `report`, `export` and `search --resume`."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import Any

import optuna
import pytest
from conftest import Tiny
from finished_study import write_study
from fuzzing import Bench, Files
from generators import changed, to_json, torn, values
from hypothesis import strategies as st
from in_process import stand_in_for_ray
from test_fuzz_stores import files_of

from tuner.patience import Patience
from tuner.search.durable.database import PatientStorage
from tuner.study.folder import StudyFolder
from tuner.study.journal import read_history

# Of a folder of files that it was about to change.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

STUDY = "mine"


@pytest.fixture(scope="module")
def study(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A finished study of two trials, as a search leaves it."""
    folder = write_study(tiny, tmp_path_factory.mktemp("study") / STUDY)
    storage = PatientStorage(folder / "study.db", Patience(lambda text: None))
    database = optuna.create_study(storage=storage, study_name=STUDY, directions=["maximize", "minimize"])
    for trial in read_history(StudyFolder(folder))[0].trials:
        attributes = {"origin": trial.origin, "config": trial.config.model_dump_json()}
        measured = [trial.value("recall@10"), trial.value("trainable_parameters")]
        database.add_trial(optuna.trial.create_trial(values=measured, user_attrs=attributes))
    return files_of(folder, f"{STUDY}/")


@st.composite
def studies(draw: st.DrawFn, sound: Files) -> Files:
    """A study with one of its files changed, torn or missing."""
    files = dict(sound)
    names = ["study.json", "study.json", "front.json", "front.json", "journal.jsonl", "journal.jsonl", "study.db"]
    name = f"{STUDY}/{draw(st.sampled_from(names) | st.sampled_from([name.partition('/')[2] for name in files]))}"
    content = files.pop(name)
    if draw(st.integers(0, 19)) == 0:
        return files
    if name.endswith(".json"):
        text = draw(changed(json.loads(content)).map(to_json))
        new = draw(st.one_of(st.just(text), st.just(text), torn(content)))
    elif name.endswith(".jsonl"):
        new = draw(journals(content))
    elif name.endswith(".db"):
        new = draw(st.one_of(torn(content), databases(content)))
    else:
        new = draw(torn(content))
    return files | {name: new}


@st.composite
def journals(draw: st.DrawFn, content: bytes) -> bytes:
    """A journal with changed, dropped, doubled and moved lines."""
    lines = content.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["change", "change", "torn", "drop", "double", "move", "other"])):
            case "change":
                try:
                    event = json.loads(lines[place])
                except ValueError:
                    continue
                lines[place] = draw(changed(event).map(to_json))
            case "torn":
                lines[place] = draw(torn(lines[place]))
            case "drop" if len(lines) > 1:
                del lines[place]
            case "double":
                lines.insert(place, lines[place])
            case "move":
                lines.append(lines.pop(place))
            case _:
                lines[place] = draw(values().map(to_json))
    return b"\n".join(lines) + draw(st.sampled_from([b"\n", b""]))


@st.composite
def databases(draw: st.DrawFn, content: bytes) -> bytes:
    """A database with other values, or without a table or its rows."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(content)
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = draw(st.sampled_from(["trials", "trial_user_attributes", "trial_values", "studies", *tables]))
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        column = draw(st.sampled_from(columns))
        odd: Any = draw(
            st.sampled_from(
                [None, "", "x", -1, 2**62, 1e300, b"\xff", "RUNNING", "WAITING", '{"lora": 1}', "[" * 9_999]
            )
        )
        arguments: tuple[Any, ...] = ()
        match draw(st.sampled_from(["set", "set", "delete", "drop"])):
            case "set":
                statement, arguments = f"UPDATE OR IGNORE {table} SET {column} = ?", (odd,)
            case "delete":
                statement = f"DELETE FROM {table}"
            case _:
                statement = f"DROP TABLE {table}"
        try:
            database.execute(statement, arguments)
            database.commit()
        except sqlite3.Error:
            database.rollback()
        return database.serialize()


def test_studies(bench: Bench, study: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_ray(monkeypatch)
    # A disk that is away is waited for; here a fault counts at once.
    monkeypatch.setenv("TUNER_STORAGE_PATIENCE", "0")
    report, export = ("report", STUDY, "--runs", "."), ("export", STUDY, "--runs", ".", "--out", "taken")
    resume = ("search", "--resume", STUDY, "--runs", ".")
    for command in (report, export, resume):
        bench.lay(study)
        bench.sound(*command)

    @bench.inputs(st.tuples(studies(study), st.sampled_from([report, export, resume, resume])), suite=30)
    def one(case: tuple[Files, tuple[object, ...]]) -> None:
        bench.lay(case[0])
        bench.run(*case[1])
