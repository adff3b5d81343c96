"""Whole searches that keep everything in a bucket: their folder is deleted, their driver killed, their server away."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bucket_server import BucketServer, bucket_server
from conftest import Tiny
from optuna.trial import TrialState
from searches import STUDY, Ended, Runs, epochs_of

from tuner.data.remote import upload_store
from tuner.errors import StudyError
from tuner.patience import PATIENCE_VARIABLE
from tuner.search.durable.head_lease import LEASE_FILE, only_head
from tuner.search.durable.mirror import fetch_study
from tuner.storage import Storage
from tuner.train.export import read_card

# Several searches share a fixture, and each starts a Ray of its own.
pytestmark = pytest.mark.timeout(1200)

LONG = 6  # epochs of a trial that is to be caught in the middle
AWAY_SECONDS = 4.0


@pytest.fixture(scope="module")
def server() -> Iterator[BucketServer]:
    with bucket_server() as server:
        yield server


@dataclass
class Machine(Runs):
    """A head with its own folder of studies and its own cache, where searches are kept in a bucket."""

    uri: str

    def new(self, *options: object) -> list[object]:
        return [*super().new(*options), "--storage", self.uri]

    @property
    def kept(self) -> Storage:
        """The study in the bucket."""
        return Storage.parse(self.uri).at(STUDY)

    def values(self) -> list[tuple[str, list[float] | None]]:
        return [(trial.user_attrs["config"], trial.values) for trial in self.trials() if "config" in trial.user_attrs]

    def left_by_lanes(self) -> list[Path]:
        return list((self.folder / "cache" / "lanes").glob("*"))


# A search, then another head


@dataclass
class Moved:
    first: Machine
    refused: StudyError  # to a head that came while the first one was searching
    ended: Ended
    before: list[tuple[str, list[float] | None]]
    front: dict[str, Any]
    second: Machine


@pytest.fixture(scope="module")
def moved(tiny: Tiny, server: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """Three trials from a store in the bucket; then a new machine, with nothing but the bucket, adds two."""
    upload_store(tiny.store_folder, server.storage("stores/tiny"))
    first, second = (Machine(tmp_path_factory.mktemp(name), tiny, server.uri("moved")) for name in ("first", "second"))
    options = first.new("--trials", 3, "--epochs", 2)
    options[options.index("--data") + 1] = server.uri("stores/tiny")
    with first.driver(*options) as driver:
        driver.until(lambda _: first.kept.exists(LEASE_FILE))
        with pytest.raises(StudyError) as refused, only_head(STUDY, Storage.parse(first.uri), print, print):
            pass
        ended = driver.wait()
    assert ended.code == 0, ended
    before, front = first.values(), first.front()
    second.finish("--resume", STUDY, "--trials", 5, "--storage", second.uri)
    return Moved(first, refused.value, ended, before, front, second)


def test_a_search_keeps_everything_in_the_bucket(moved: Moved) -> None:
    names = moved.first.kept.names()
    study = {"study.json", "study.db", "journal.jsonl", "trials.parquet", "front.json", "report.html"}
    trials = {f"checkpoints/t{n:04d}.{ending}" for n in range(5) for ending in ("pt", "json")}
    assert study | trials <= set(names)
    assert LEASE_FILE not in names, "removed at the end"
    for name in study - {"study.db"}:
        assert moved.first.kept.read(name) == (moved.second.study / name).read_bytes(), name


def test_another_head_is_kept_off_while_the_first_one_searches(moved: Moved) -> None:
    """And costs it nothing: the next tests look at what the first one has done."""
    assert " is running it in s3://tuner/moved/study; wait for it, or end it first" in str(moved.refused)


def test_lanes_write_into_their_own_scratch_and_leave_nothing(moved: Moved) -> None:
    for machine in (moved.first, moved.second):
        assert not (machine.study / "checkpoints").exists()
        assert machine.left_by_lanes() == []


def test_the_driver_has_what_a_search_without_a_storage_has(moved: Moved) -> None:
    for machine in (moved.first, moved.second):
        for point in machine.front()["points"]:
            assert read_card(machine.study / point["adapter"]).trial == point["trial"]
    assert "on the front; report: " in moved.ended.err


def test_a_new_head_keeps_what_was_finished_and_adds_to_it(moved: Moved) -> None:
    after = moved.second.values()
    assert after[:3] == moved.before
    assert len(after) == 5
    assert [trial.state for trial in moved.second.trials()] == [TrialState.COMPLETE] * 5
    counted = Counter(epochs_of(moved.second.journal()))
    assert counted == {(f"t{n:04d}", epoch): 1 for n in range(5) for epoch in (1, 2)}


def test_a_point_is_measured_the_same_on_the_new_head(moved: Moved) -> None:
    """Exported again, from the checkpoints in the bucket."""
    old = {point["trial"]: point for point in moved.front["points"]}
    new = {point["trial"]: point for point in moved.second.front()["points"]}
    both = old.keys() & new.keys()
    assert {"t0000", "t0001"} <= both
    for trial in both:
        assert {**new[trial], "on_front": None} == {**old[trial], "on_front": None}


def test_the_record_says_where_it_is_kept(moved: Moved, server: BucketServer) -> None:
    record = json.loads((moved.second.study / "study.json").read_text())
    assert (record["storage"], record["sessions"]) == (server.uri("moved"), 2)
    assert record["settings"]["store"] == server.uri("stores/tiny")


def test_the_first_head_comes_back_and_takes_what_the_second_did(moved: Moved) -> None:
    """Its own copy is older: it must not overwrite the newer one."""
    assert json.loads((moved.first.study / "study.json").read_text())["sessions"] == 1
    fetch_study(moved.first.study, moved.first.kept)
    assert len(moved.first.trials()) == 5


# A server that is away, then full for good; a driver that is killed; another head with an old copy of the study


@dataclass
class Hardship:
    first: Machine
    second: Machine
    away_from: list[tuple[str, int]]
    away_to: list[tuple[str, int]]
    full: Ended
    resumed: Ended  # the second head, after the first one's kill -9
    journal: list[dict[str, Any]]  # of the first head when its driver was killed
    copied: list[dict[str, Any]]  # what the second head found of it in the bucket


@pytest.fixture(scope="module")
def hardship(tiny: Tiny, server: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Hardship:
    """The server is away for seconds during t0000 and full for good during t0001, which ends the search. Resumed, its
    driver gets a kill -9 in t0001, and its machine is lost. Another one resumes from the bucket alone, whose copy of
    the study is put back to what it was before t0001: as old as it can be."""
    first, second = (Machine(tmp_path_factory.mktemp(name), tiny, server.uri("hard")) for name in ("one", "two"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(PATIENCE_VARIABLE, "12")
        with first.driver(*first.new("--trials", 3, "--epochs", LONG)) as driver:
            away_from = driver.until(lambda epochs: ("t0000", 2) in epochs)
            with server.away():
                time.sleep(AWAY_SECONDS)
                away_to = driver.until(lambda epochs: True)
            old = {name: first.kept.read(name) for name in ("study.db", "journal.jsonl")}
            driver.until(lambda epochs: ("t0001", 2) in epochs)
            with server.full():
                full = driver.wait()
    with first.driver("--resume", STUDY) as driver:
        driver.until(lambda epochs: ("t0001", 4) in epochs)
        driver.kill()
    journal = first.journal()
    shutil.rmtree(first.folder)
    for name, content in old.items():
        # A driver's first seconds may not have been copied at all.
        if content is None:
            first.kept.remove(name)
        else:
            first.kept.write(name, content)
    copied = [json.loads(line) for line in (old["journal.jsonl"] or b"").decode().splitlines()]
    resumed = second.finish("--resume", STUDY, "--storage", second.uri)
    return Hardship(first, second, away_from, away_to, full, resumed, journal, copied)


def test_a_server_that_is_away_for_seconds_costs_seconds(hardship: Hardship) -> None:
    assert len(hardship.away_to) - len(hardship.away_from) <= 1, "an epoch counts when the storage has it"
    assert ("t0000", LONG) in epochs_of(hardship.journal)


def test_a_server_that_stays_full_ends_the_search_with_a_sentence(hardship: Hardship) -> None:
    assert hardship.full.code == 2, hardship.full
    (said,) = (line for line in hardship.full.err.splitlines() if line.startswith("tuner: "))
    assert "s3://tuner/hard/study/checkpoints/t0001.pt: full, and still so after 12 s; make room there" in said


def test_a_killed_driver_of_this_machine_is_not_waited_for(hardship: Hardship) -> None:
    """Its lease is still there, and is taken over at once."""
    assert "waiting up to" not in hardship.resumed.err


def test_the_storages_copy_was_behind(hardship: Hardship) -> None:
    """What the next tests are about: it knows nothing of t0001 nor of the end of t0000."""
    assert {event["trial"] for event in hardship.copied} <= {"t0000"}
    assert not [event for event in hardship.copied if event["event"] == "trial_ended"]


def test_no_trial_and_no_epoch_is_lost_with_the_head(hardship: Hardship) -> None:
    """What was told before the kill is told again word by word, by checkpoints, not trained again."""
    told = {(e["trial"], e["epoch"]): e for e in hardship.journal if e["event"] == "epoch_done"}
    again = {(e["trial"], e["epoch"]): e for e in hardship.second.journal() if e["event"] == "epoch_done"}
    assert {key: again[key] for key in told} == told
    assert again.keys() == {(f"t{n:04d}", epoch) for n in range(3) for epoch in range(1, LONG + 1)}
    assert hardship.second.states() == {f"t{n:04d}": "complete" for n in range(3)}


def test_trials_keep_their_numbers_and_configurations(hardship: Hardship) -> None:
    before = {e["trial"]: e["config"] for e in hardship.journal if e["event"] == "trial_started"}
    after = {f"t{t.number:04d}": json.loads(t.user_attrs["config"]) for t in hardship.second.trials()}
    assert len(after) == 3
    assert {trial: after[trial] for trial in before} == before
    origins = [trial.user_attrs["origin"] for trial in hardship.second.trials()]
    assert origins == ["projection_only", "recommended", "sampled"]


# Refusals


def test_a_bucket_that_denies_access_is_one_sentence(tiny: Tiny, server: BucketServer, tmp_path: Path) -> None:
    """Before Ray starts, and nothing is left: the same command works when the right is there."""
    machine = Machine(tmp_path, tiny, server.uri("denied"))
    with server.closed(), machine.driver(*machine.new("--trials", 1)) as driver:
        ended = driver.wait()
    assert ended.code == 2, ended
    said = [line for line in ended.err.splitlines() if not line.startswith('{"imported"')]
    assert len(said) == 1
    assert "s3://tuner/denied/study/study.json: access is denied; give this machine the right" in said[0]
    assert not machine.study.exists()
    assert machine.kept.names() == []


def test_a_study_of_this_name_in_the_bucket_is_not_overwritten(moved: Moved, tiny: Tiny, tmp_path: Path) -> None:
    machine = Machine(tmp_path, tiny, moved.first.uri)
    with machine.driver(*machine.new("--trials", 1)) as driver:
        ended = driver.wait()
    assert ended.code == 2
    assert (
        f"study {STUDY} exists in s3://tuner/moved; resume it with `tuner search --resume {STUDY} --storage s3://"
        in ended.err
    )
