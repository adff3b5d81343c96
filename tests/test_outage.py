"""A driver's files on a disk that is full or away, one driver a study, and a driver whose cluster has gone."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from conftest import clock_of
from optuna.trial import TrialState
from sqlalchemy import event

from tuner import patience as patience_module
from tuner.config import TrialConfig
from tuner.errors import StudyError
from tuner.lanes import lifeline as lifeline_module
from tuner.lanes.lifeline import Lifeline
from tuner.patience import PATIENCE_VARIABLE, Patience
from tuner.search.durable.database import PatientStorage
from tuner.search.durable.driver_lock import only_driver
from tuner.study.events import EpochDone, TrialStarted
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal

TRIAL = TrialStarted(trial="t0000", origin="sampled", config=TrialConfig())
EPOCH = EpochDone(trial="t0000", epoch=1, loss=0.5)


def epochs_of(journal: Journal) -> list[int]:
    return [epoch for trial in journal.history.trials for epoch in trial.epochs]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return clock_of(patience_module, monkeypatch)


class SmallDisk(io.FileIO):
    """A file on a disk with room for so many bytes more: what fits is written, then writing fails."""

    room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(memoryview(data)[: self.room])
        self.room -= written
        return written


def test_a_journal_on_a_full_disk_goes_on_where_it_stopped(tmp_path: Path, clock: SimpleNamespace) -> None:
    """In the middle of a line; once there is room, the rest of that very line follows."""
    said: list[str] = []
    with closing(Journal(StudyFolder(tmp_path), Patience(said.append))) as journal:
        journal.start(TRIAL)
        journal._file.close()
        journal._file = disk = SmallDisk(tmp_path / "journal.jsonl", "ab")
        disk.room = 10
        clock.on_sleep = lambda: setattr(disk, "room", 10_000)
        journal.epoch(EPOCH)
    with closing(Journal(StudyFolder(tmp_path))) as again:
        assert epochs_of(again) == [1]
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "journal.jsonl: OSError: [Errno 28] No space left" in said[0]


def test_a_disk_that_stays_full_is_one_sentence_and_leaves_a_whole_journal(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    journal = Journal(StudyFolder(tmp_path), Patience(lambda text: None))
    journal.start(TRIAL)
    journal._file.close()
    journal._file = disk = SmallDisk(tmp_path / "journal.jsonl", "ab")
    disk.room = 10
    with pytest.raises(StudyError, match="the storage has failed for 120 s"):
        journal.epoch(EPOCH)
    waited = clock.now
    with pytest.raises(StudyError, match="the storage has failed"):
        journal.end("t0000", "stopped")
    assert clock.now == waited, "what did not come within its patience is not waited for again"
    journal.close()
    with closing(Journal(StudyFolder(tmp_path))) as again:
        assert epochs_of(again) == []
        assert again.epoch(EPOCH), "the epoch is told again by a resumed study"
    with closing(Journal(StudyFolder(tmp_path))) as last:
        assert epochs_of(last) == [1]


def test_a_table_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(StudyFolder(tmp_path))
    journal.start(TRIAL)
    journal.write_parquet()
    journal.epoch(EPOCH)

    def write(table: Any, path: Path) -> None:
        path.write_bytes(b"half a table")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(pq, "write_table", write)
        with pytest.raises(StudyError, match=r"trials\.parquet: the storage has failed"):
            journal.write_parquet()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    assert "loss" not in pq.read_table(tmp_path / "trials.parquet").column_names
    journal.close()
    assert "loss" in pq.read_table(tmp_path / "trials.parquet").column_names


# The study's database


ROOM = 100_000  # pages of a database with room for all that is asked of it


class Database:
    """A study whose database may have so many pages: SQLite's own `database or disk is full`, as of a full disk."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        storage = PatientStorage(folder / "study.db", Patience(say))
        self.study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
        self.pages = ROOM
        event.listen(storage.engine, "checkout", self._limit)

    def _limit(self, connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {self.pages}")

    def add_trial(self) -> int:
        trial = self.study.ask()
        trial.set_user_attr("config", "x" * 20_000)
        self.study.tell(trial, 1.0)
        return trial.number


def test_a_full_database_waits(tmp_path: Path, clock: SimpleNamespace) -> None:
    said: list[str] = []
    database = Database(tmp_path, said.append)
    clock.on_sleep = lambda: setattr(database, "pages", ROOM)
    numbers = []
    for _ in range(3):
        database.pages = 1
        numbers.append(database.add_trial())
    assert numbers == [0, 1, 2], "an attempt that failed leaves no trial"
    assert "study.db: OperationalError: (sqlite3.OperationalError) database or disk is full" in said[0]
    trials = Database(tmp_path, said.append).study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3


def test_a_database_that_stays_full_is_one_sentence(tmp_path: Path, clock: SimpleNamespace) -> None:
    database = Database(tmp_path, lambda text: None)
    database.pages = 1
    with pytest.raises(StudyError, match=r"study\.db: the storage has failed for 120 s .*disk is full"):
        database.add_trial()
    database.pages = ROOM
    assert database.add_trial() > 0, "the file is whole"


def test_mistakes_are_not_waited_for(tmp_path: Path, clock: SimpleNamespace) -> None:
    before = clock.now
    study = Database(tmp_path, lambda text: None).study
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(ValueError, match="Cannot tell a COMPLETE trial"):
        study.tell(trial, 2.0)
    assert clock.now == before


# One driver a study

HOLDER = """
import sys, time
from pathlib import Path
from tuner.search.durable.database import PatientStorage
from tuner.search.durable.driver_lock import only_driver
from tuner.study.events import EpochDone, TrialStarted
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal
with only_driver(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_study_has_one_driver_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "study"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match="study study: another process is running it"), only_driver(run_dir):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with only_driver(run_dir), only_driver(tmp_path / "runs" / "other"):
        pass
    assert not list((tmp_path / "runs").iterdir())


# A cluster that has gone


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A lifeline that asks often; `answer` is what the cluster answers."""
    cluster = SimpleNamespace(answer=lambda: [{"NodeID": "here", "Alive": True}])
    context = SimpleNamespace(get_node_id=lambda: "here")

    def nodes() -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = cluster.answer()
        return answer

    monkeypatch.setattr(lifeline_module, "ray", SimpleNamespace(get_runtime_context=lambda: context, nodes=nodes))
    seconds = {"LOST_SECONDS": 0.5, "ANSWER_SECONDS": 0.5, "PING_SECONDS": 0.02, "LOOK_SECONDS": 0.01}
    for name, value in seconds.items():
        monkeypatch.setattr(lifeline_module, name, value)
    return cluster


class Losses:
    """Remembers why Ray was lost, and when."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.came = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.came.set()


def hang() -> list[dict[str, Any]]:
    threading.Event().wait(30)
    return []


def fail() -> list[dict[str, Any]]:
    raise RuntimeError("no answer")


SILENCES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "it does not answer": hang,
    "it fails": fail,
    "a new one has taken its place": list,
    "the node is dead": lambda: [{"NodeID": "here", "Alive": False}],
}


@pytest.mark.parametrize("silence", SILENCES)
def test_a_driver_learns_that_its_cluster_has_gone(fast: SimpleNamespace, silence: str) -> None:
    lost = Losses()
    with closing(Lifeline(lost)) as lifeline:
        lifeline.start()
        lifeline.end_if_broken()
        assert not lost.reasons
        fast.answer = SILENCES[silence]
        assert lost.came.wait(20)
    assert lost.reasons == ["the Ray cluster has gone"]


class Ends:
    """Vital processes of which one ends at some look, for whoever looks."""

    looks = 0

    def wait_for_end(self, seconds: float) -> str | None:
        time.sleep(seconds)
        Ends.looks -= 1
        return "raylet" if Ends.looks < 0 else None

    def close(self) -> None: ...


def test_a_driver_learns_at_once_that_a_process_of_its_own_ray_has_ended(
    fast: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one may still answer that all is well."""
    lost = Losses()
    monkeypatch.setattr(lifeline_module, "LOST_SECONDS", 600.0)
    with closing(Lifeline(lost)) as lifeline:
        monkeypatch.setattr(lifeline_module, "RayVitals", Ends)
        monkeypatch.setattr(Ends, "looks", 3)
        lifeline.start()
        assert lost.came.wait(20)
    assert lost.reasons == ["Ray has ended, because its raylet was killed or crashed"]


def test_an_error_before_the_silence_is_noticed_is_the_clusters_doing(fast: SimpleNamespace) -> None:
    lost = Losses()
    with closing(Lifeline(lost)) as lifeline:
        lifeline.start()
        fast.answer = fail
        lifeline.end_if_broken()
        assert lost.reasons


def test_an_error_before_the_end_of_a_process_is_noticed_is_its_doing(
    fast: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Losses()
    monkeypatch.setattr(lifeline_module, "RayVitals", Ends)
    monkeypatch.setattr(Ends, "looks", 0)
    with pytest.raises(RuntimeError), closing(Lifeline(lost)) as lifeline, lifeline.watching():
        raise RuntimeError("the actor died")
    assert set(lost.reasons) == {"Ray has ended, because its raylet was killed or crashed"}


def test_a_search_that_fails_by_itself_keeps_its_own_error(fast: SimpleNamespace) -> None:
    lost = Losses()
    with closing(Lifeline(lost)) as lifeline:
        lifeline.end_if_broken()  # before Ray is up
        lifeline.start()
        lifeline.end_if_broken()
    assert not lost.reasons


def test_a_driver_that_was_stopped_has_heard_nothing_and_lost_nothing(
    fast: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a suspended terminal, say: its clock goes on meanwhile, and nobody could answer it."""
    lost, hand = Losses(), SimpleNamespace(stopped=0.0)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + hand.stopped, sleep=time.sleep)
    monkeypatch.setattr(lifeline_module, "time", clock)
    answered = threading.Event()

    def answer_again() -> list[dict[str, Any]]:
        if hand.stopped:
            answered.set()
        return [{"NodeID": "here", "Alive": True}]

    with closing(Lifeline(lost)) as lifeline:
        lifeline.start()
        fast.answer = fail
        time.sleep(0.1)
        hand.stopped = 3600.0
        time.sleep(0.1)
        fast.answer = answer_again
        assert answered.wait(20)
        lifeline.end_if_broken()
        assert not lost.reasons
        fast.answer = fail
        assert lost.came.wait(20), "a silence after it counts"


def test_storage_has_its_whole_time_where_this_process_was_stopped(clock: SimpleNamespace) -> None:
    attempts: list[float] = []

    def stop() -> None:
        clock.now += 3600
        clock.on_sleep = lambda: None

    def full() -> None:
        attempts.append(clock.now)
        raise OSError(errno.ENOSPC, "No space left on device")

    clock.on_sleep = stop
    with pytest.raises(StudyError, match="has failed for 120 s"):
        Patience(lambda text: None).outlast(Path("study"), full)
    assert len(attempts) > 10
    assert attempts[-1] - attempts[0] == pytest.approx(3720)


def test_the_patience_can_be_set(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(PATIENCE_VARIABLE, "7")
    with pytest.raises(StudyError, match="study: the storage has failed for 7 s"):
        Patience(lambda text: None).outlast(Path("study"), full)
    assert clock.now == 1007
