"""One live head a study in a storage: who may take it, who must leave it, and what never happens to its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Tiny, clock_of
from searches import STUDY

from tuner import cli
from tuner.errors import StorageError, StudyError
from tuner.search.durable import head_lease
from tuner.search.durable.head_lease import LEASE_FILE, SETTLE_SECONDS, WATCH_SECONDS, Head, HeadLease, only_head
from tuner.search.durable.mirror import mirrored
from tuner.search.request import discard_record
from tuner.storage import Storage
from tuner.study.folder import StudyFolder

ELSEWHERE = Head(host="other-node", machine="its boot", pid=41, driver="theirs")
DEADLINE = 60.0


@pytest.fixture
def place(tmp_path: Path) -> Storage:
    """Where studies are kept, of which one has files."""
    storage = Storage.parse(str(tmp_path / "place"))
    storage.at(STUDY).write("study.json", json.dumps({"study": STUDY, "sessions": 1}).encode())
    return storage


@pytest.fixture
def kept(place: Storage) -> Storage:
    return place.at(STUDY)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return clock_of(head_lease, monkeypatch)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals and looks so often that a test can wait for them."""
    for name, seconds in {"RENEW": 0.02, "POLL": 0.05, "WATCH": 5.0, "SETTLE": 0.01, "RENEW_PATIENCE": 0.0}.items():
        monkeypatch.setattr(head_lease, name if name.endswith("PATIENCE") else f"{name}_SECONDS", seconds)


def never(said: str) -> None:
    raise AssertionError(said)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lease_of(kept: Storage, head: Head, say: Callable[[str], None] = never) -> HeadLease:
    return HeadLease(STUDY, kept, say, head)


def renewals(kept: Storage) -> int:
    return int(json.loads(kept.read(LEASE_FILE) or b"{}").get("renewals", 0))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended_pid() -> int:
    """Of a process that was here and has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# While a head lives


@pytest.mark.parametrize("end", [None, StudyError("all trials failed"), KeyboardInterrupt()])
def test_a_head_says_that_it_lives_until_it_ends(
    place: Storage, kept: Storage, hurried: None, end: BaseException | None
) -> None:
    try:
        with only_head(STUDY, place, never, never):
            first = renewals(kept)
            written = json.loads(kept.read(LEASE_FILE) or b"")
            assert (written["pid"], written["host"]) == (os.getpid(), Head.here().host)
            until(lambda: renewals(kept) > first + 1)
            if end is not None:
                raise end
    except (StudyError, KeyboardInterrupt) as raised:
        assert raised is end
    assert kept.names() == ["study.json"]


def test_a_study_in_no_storage_needs_no_lease() -> None:
    with only_head(STUDY, None, never, never) as lease:
        assert lease is None


def test_another_heads_search_is_refused_and_left_alone(place: Storage, kept: Storage, clock: SimpleNamespace) -> None:
    """As soon as its count moves, however late that is."""
    other = lease_of(kept, ELSEWHERE)
    other.claim()
    clock.now, said = 0.0, list[str]()
    clock.on_sleep = lambda: other.renew() if clock.now == WATCH_SECONDS - 3 else None
    with (
        pytest.raises(StudyError, match=rf"study {STUDY}: other-node \(pid 41\) is running it.*`tuner stop {STUDY}`"),
        only_head(STUDY, place, said.append, never),
    ):
        raise AssertionError("two heads")
    assert clock.now == WATCH_SECONDS - 3
    assert said == [f"study {STUDY}: waiting up to 30 s to see whether other-node (pid 41) is still running it"]
    assert json.loads(kept.read(LEASE_FILE) or b"")["driver"] == "theirs"
    assert kept.names() == [LEASE_FILE, "study.json"]


def test_a_search_that_ends_while_it_is_watched_leaves_the_study(kept: Storage, clock: SimpleNamespace) -> None:
    other = lease_of(kept, ELSEWHERE)
    other.claim()
    clock.now, clock.on_sleep = 0.0, other.release
    lease_of(kept, Head.here(), lambda text: None).claim()
    assert clock.now < 5


# When a head is gone


def test_a_head_that_was_lost_elsewhere_is_waited_for_and_replaced(kept: Storage, clock: SimpleNamespace) -> None:
    lease_of(kept, ELSEWHERE).claim()
    clock.now, said = 0.0, list[str]()
    own = lease_of(kept, Head.here(), said.append)
    own.claim()
    assert clock.now == WATCH_SECONDS + SETTLE_SECONDS
    assert len(said) == 1
    own.renew()


def test_a_driver_that_was_killed_here_is_replaced_at_once(kept: Storage, clock: SimpleNamespace) -> None:
    lease_of(kept, replace(Head.here(), pid=ended_pid(), driver="killed")).claim()
    clock.now = 0.0
    lease_of(kept, Head.here(), never).claim()
    assert clock.now == SETTLE_SECONDS


@pytest.mark.parametrize(
    "changes",
    [{"host": "other-node"}, {"machine": "an earlier boot"}, {"pid": os.getpid()}],
    ids=["host", "boot", "pid"],
)
def test_elsewhere_a_pid_says_nothing(kept: Storage, clock: SimpleNamespace, changes: dict[str, Any]) -> None:
    """Nor does one that is taken here, perhaps by another process."""
    head = {**vars(Head.here()), "pid": ended_pid(), "driver": "lost", **changes}
    lease_of(kept, Head(**head)).claim()
    clock.now = 0.0
    lease_of(kept, Head.here(), lambda text: None).claim()
    assert clock.now > WATCH_SECONDS


def test_a_machine_that_does_not_know_its_boot_trusts_no_pid(
    kept: Storage, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_lease, "_machine", lambda: "")
    lease_of(kept, replace(Head.here(), pid=ended_pid(), driver="lost")).claim()
    clock.now = 0.0
    lease_of(kept, Head.here(), lambda text: None).claim()
    assert clock.now > WATCH_SECONDS


def test_a_lease_that_cannot_be_read_is_one_of_somebody(kept: Storage, clock: SimpleNamespace) -> None:
    kept.write(LEASE_FILE, b"{")
    clock.on_sleep, said = lambda: kept.write(LEASE_FILE, b"{{"), list[str]()
    with pytest.raises(StudyError, match="another machine is running it"):
        lease_of(kept, Head.here(), said.append).claim()
    assert said == [f"study {STUDY}: waiting up to 30 s to see whether another machine is still running it"]
    clock.on_sleep = lambda: None
    own = lease_of(kept, Head.here(), lambda text: None)
    own.claim()
    own.renew()


# Two at the same moment, and a head that comes back


def test_of_two_heads_in_one_moment_the_later_writer_stays(kept: Storage, clock: SimpleNamespace) -> None:
    first, second = lease_of(kept, replace(Head.here(), driver="first")), lease_of(kept, ELSEWHERE)

    def other_writes() -> None:
        clock.on_sleep = lambda: None
        second._write(kept)

    clock.on_sleep = other_writes
    with pytest.raises(StudyError, match=r"other-node \(pid 41\) is running it"):
        first.claim()
    first.release()
    second.renew()


@contextmanager
def away(place: Storage) -> Iterator[None]:
    """The shared folder cannot be reached."""
    folder, aside = Path(place.uri), Path(f"{place.uri}.aside")
    folder.rename(aside)
    folder.write_bytes(b"no folder")
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def test_a_storage_that_is_away_ends_nothing(place: Storage, kept: Storage, hurried: None) -> None:
    failed = threading.Event()
    with only_head(STUDY, place, never, never) as lease, pytest.MonkeyPatch.context() as patch:
        assert lease is not None
        renew = lease.renew

        def watched() -> None:
            try:
                renew()
            except StorageError:
                failed.set()
                raise

        patch.setattr(lease, "renew", watched)
        with away(place):
            assert failed.wait(DEADLINE)
        before = renewals(kept)
        until(lambda: renewals(kept) > before)


def test_a_lease_that_somebody_removed_is_written_again(place: Storage, kept: Storage, hurried: None) -> None:
    with only_head(STUDY, place, never, never) as lease:
        assert lease is not None
        lease.sessions = 1
        kept.remove(LEASE_FILE)
        until(lambda: renewals(kept) > 0)


def test_a_head_that_was_away_ends_and_touches_nothing(place: Storage, kept: Storage, hurried: None) -> None:
    told, heard = list[str](), threading.Event()

    def superseded(sentence: str) -> None:
        told.append(sentence)
        heard.set()

    with only_head(STUDY, place, never, superseded):
        kept.write(LEASE_FILE, theirs := json.dumps({**vars(ELSEWHERE), "renewals": 7}).encode())
        assert heard.wait(DEADLINE)
        assert "other-node (pid 41) has taken the study over" in told[0]
    assert kept.read(LEASE_FILE) == theirs
    assert len(told) == 1


def test_a_head_hears_of_another_that_has_come_and_gone(kept: Storage, clock: SimpleNamespace) -> None:
    """Its lease is no longer there, but the study has been resumed since."""
    own = lease_of(kept, Head.here())
    own.claim()
    own.sessions = 1
    kept.remove(LEASE_FILE)
    kept.write("study.json", b'{"sessions": 2}')
    with pytest.raises(StudyError, match="another machine has continued the study"):
        own.renew()
    assert not kept.exists(LEASE_FILE)


# What a head writes besides


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / STUDY
    folder.mkdir(parents=True)
    (folder / "study.json").write_text('{"sessions": 1, "trials": 3}')
    return folder


def test_a_heads_copies_end_where_anothers_begin(
    kept: Storage, run_dir: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.search.durable.mirror.MIRROR_SECONDS", 0.02)
    own = lease_of(kept, Head.here())
    own.claim()
    with (
        pytest.raises(StudyError, match=r"other-node \(pid 41\) has taken the study over"),
        mirrored(run_dir, kept, own),
    ):
        (run_dir / "journal.jsonl").write_text("ours\n")
        until(lambda: kept.exists("journal.jsonl"))
        lease_of(kept, ELSEWHERE)._write(kept)
        kept.write("journal.jsonl", b"theirs\n")
        (run_dir / "journal.jsonl").write_text("ours, and more\n")
        (run_dir / "front.json").write_text("{}")
        (mirror,) = (thread for thread in threading.enumerate() if thread.name == "mirror")
        mirror.join(DEADLINE)
        assert not mirror.is_alive()
    assert kept.read("journal.jsonl") == b"theirs\n"
    assert not kept.exists("front.json")


def test_a_search_that_fails_after_it_was_superseded_says_its_own_reason(
    kept: Storage, run_dir: Path, clock: SimpleNamespace
) -> None:
    own = lease_of(kept, Head.here())
    own.claim()
    with pytest.raises(StudyError, match="its own reason"), mirrored(run_dir, kept, own):
        lease_of(kept, ELSEWHERE)._write(kept)
        (run_dir / "front.json").write_text("{}")
        raise StudyError("its own reason")
    assert not kept.exists("front.json")


def test_another_heads_record_is_not_discarded(
    place: Storage, kept: Storage, run_dir: Path, clock: SimpleNamespace
) -> None:
    """A new study that could not start takes its own record back, and no other."""
    request: Any = SimpleNamespace(folder=StudyFolder(run_dir), study_storage=kept)
    own = lease_of(kept, Head.here())
    own.claim()
    lease_of(kept, ELSEWHERE)._write(kept)
    discard_record(request, own)
    assert kept.exists("study.json")
    assert not run_dir.exists()


# The command

SUPERSEDED = """
import sys, threading
from tuner import cli
from tuner.search import driver
from tuner.search.durable import head_lease
head_lease.RENEW_SECONDS = 0.05

def search_for_ever(*arguments):
    print("searching", flush=True)
    threading.Event().wait()

driver.run_search = search_for_ever
cli.main()
"""


def test_a_search_that_was_superseded_ends_whatever_it_waits_for(place: Storage, tiny: Tiny, tmp_path: Path) -> None:
    """As it would in a call to a cluster that is busy with what another head has begun."""
    options = ["search", "--data", tiny.store_folder, "--study", "mine", "--storage", place.uri]
    command = [sys.executable, "-c", SUPERSEDED, *map(str, options)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "searching\n"
            lease_of(place.at("mine"), ELSEWHERE)._write(place.at("mine"))
            _, said = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert process.returncode == 2
    sentence = (
        "this search was suspended or disconnected, and other-node (pid 41) has taken the study over; "
        "this search ends, and the study continues there"
    )
    assert said == f"tuner: study mine: {sentence}\n"
    assert json.loads(place.at("mine").read(LEASE_FILE) or b"")["driver"] == "theirs"


def test_a_resumption_is_refused_before_anything_is_brought_here(
    place: Storage, kept: Storage, tmp_path: Path, hurried: None, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is fetched from a living search would be taken for as new as the storage once that has ended."""
    other, ended = lease_of(kept, ELSEWHERE), threading.Event()
    other.claim()
    thread = threading.Thread(target=head_lease._keep, args=(other, ended, never))
    thread.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tuner", "search", "--resume", STUDY, "--storage", place.uri, "--trials", "9"])
    try:
        with pytest.raises(SystemExit) as refused:
            cli.main()
    finally:
        ended.set()
        thread.join()
    said = capsys.readouterr()
    assert (refused.value.code, said.out) == (2, "")
    waited, sentence = said.err.splitlines()
    assert "waiting up to 5 s" in waited
    assert sentence.startswith(f"tuner: study {STUDY}: other-node (pid 41) is running it in {kept}; wait for it")
    assert not (tmp_path / "runs").exists()
    assert set(contents(tmp_path)) == {Path(kept.place) / LEASE_FILE, Path(kept.place) / "study.json"}
