"""Files in a folder and in buckets of S3 and GCS servers by one contract; stores, studies, lanes that rely on it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pyarrow.fs as pafs
import pytest
from bucket_server import BucketServer, bucket_server
from conftest import Tiny
from finished_study import start_study
from gcs_server import gcs_server
from optuna.trial import TrialState
from searches import STUDY

from tuner import cli
from tuner.commands.actions.run_search import Place, _free_name
from tuner.commands.actions.stores import place_of
from tuner.config import TrialConfig
from tuner.data.remote import fetch_store, open_store, upload_store
from tuner.data.store import META_FILE, Store
from tuner.errors import ConfigError, DataError, StorageError, StudyError, TunerError
from tuner.lanes.files import LaneFiles
from tuner.patience import PATIENCE_VARIABLE
from tuner.search.durable.adopt import adopt
from tuner.search.durable.mirror import Mirror, checkpointed, fetch_study, mirrored
from tuner.search.request import check_new, fixed_configurations, open_record, resumed_request
from tuner.search.searcher import StudySearcher
from tuner.space import SearchSpace, load_space
from tuner.storage import Storage
from tuner.study.folder import StudyFolder
from tuner.study.objectives import choose_objectives

LARGE = 11 * 1024**2  # three parts of a multipart upload


@pytest.fixture(scope="module")
def server() -> Iterator[BucketServer]:
    with bucket_server() as server:
        yield server


@pytest.fixture(scope="module")
def google() -> Iterator[Callable[[str], Storage]]:
    with gcs_server() as storage_of:
        yield storage_of


@pytest.fixture(params=["folder", "s3", "gs"])
def storage(
    request: pytest.FixtureRequest, server: BucketServer, google: Callable[[str], Storage], tmp_path: Path
) -> Storage:
    places = {
        "folder": lambda: Storage.parse(str(tmp_path / "place")),
        "s3": lambda: server.storage(tmp_path.name),
        "gs": lambda: google(tmp_path.name),
    }
    return places[request.param]()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# What every storage does


@pytest.mark.parametrize("size", [0, 1000, LARGE])
def test_what_is_uploaded_is_downloaded(storage: Storage, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    storage.upload(write(tmp_path / "file", content), "a/b/file")
    storage.download("a/b/file", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == content == storage.read("a/b/file")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_names_are_those_of_files(storage: Storage) -> None:
    for name in ("b/two", "b/c/three", "one"):
        storage.write(name, b"x")
    assert storage.names() == ["b/c/three", "b/two", "one"]
    assert storage.at("b").names() == storage.at("", "b").names() == ["c/three", "two"]
    assert storage.at("nothing").names() == []
    assert storage.folders() == ["b"]
    assert storage.exists("b/two")
    assert not storage.exists("b"), "a folder"
    assert Storage.parse(storage.at("b").place).names() == ["c/three", "two"]


def test_the_last_upload_counts(storage: Storage, tmp_path: Path) -> None:
    storage.upload(write(tmp_path / "long", os.urandom(LARGE)), "name")
    storage.upload(write(tmp_path / "short", b"new"), "name")
    assert storage.read("name") == b"new"
    assert storage.names() == ["name"]


def test_what_is_not_there(storage: Storage, tmp_path: Path) -> None:
    assert storage.read("none") is None
    storage.remove("none")
    for fetch in (storage.download, storage.download_folder):
        with pytest.raises(StorageError, match=r"none.* there"):
            fetch("none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_removed_is_gone(storage: Storage) -> None:
    storage.write("name", b"x")
    storage.remove("name")
    assert storage.names() == []


def test_a_folder_replaces_the_one_that_is_here(storage: Storage, tmp_path: Path) -> None:
    for name in ("card.json", "weights", "more/notes"):
        write(tmp_path / "adapter" / name, name.encode())
    storage.upload_folder(tmp_path / "adapter", "adapters/t0001", last="card.json")
    write(tmp_path / "here" / "stale", b"of an older export")
    storage.download_folder("adapters/t0001", tmp_path / "here")
    found = {
        path.relative_to(tmp_path / "here").as_posix() for path in (tmp_path / "here").rglob("*") if path.is_file()
    }
    assert found == {"card.json", "weights", "more/notes"}


def test_a_folder_is_complete_when_its_last_file_is_there(server: BucketServer, tmp_path: Path) -> None:
    for name in ("a", "card.json", "z"):
        write(tmp_path / "adapter" / name, b"x")
    before = len(server.requests)
    server.storage("order").upload_folder(tmp_path / "adapter", "t0001", last="card.json")
    puts = [path.rpartition("/")[2] for method, path in server.requests[before:] if method == "PUT"]
    assert list(dict.fromkeys(puts)) == ["a", "z", "card.json"]


def test_a_name_that_leads_out_of_the_folder_is_refused(server: BucketServer, tmp_path: Path) -> None:
    """A bucket's names are anything; that of a file here must not be."""
    server.put("hostile/adapters/../../escaped", b"x")
    storage = server.storage("hostile")
    assert storage.names() == ["adapters/../../escaped"]
    with pytest.raises(StorageError, match="leads out of the folder"):
        storage.download_folder("adapters", tmp_path / "deep" / "er" / "here")
    assert not list(tmp_path.rglob("escaped"))


def test_a_storage_is_pickled_without_its_connection(storage: Storage) -> None:
    import pickle

    storage.write("name", b"x")
    assert pickle.loads(pickle.dumps(storage.at("."))).uri == storage.uri
    assert pickle.loads(pickle.dumps(storage)).read("name") == b"x"


# Whole or not at all


def test_a_folder_shows_a_file_when_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.parse(str(tmp_path / "place")).patient(0)
    storage.write("name", b"old")
    seen: list[tuple[list[str], bytes | None]] = []
    move = pafs.LocalFileSystem.move

    class Watched(pafs.LocalFileSystem):
        def move(self, source: str, target: str) -> None:
            seen.append((storage.names(), storage.read("name")))
            if len(seen) > 1:
                raise OSError("the power went")
            move(self, source, target)

    monkeypatch.setattr("tuner.storage._file_system", lambda uri: (Watched(), str(tmp_path / "place")))
    monkeypatch.setattr(pafs, "LocalFileSystem", pafs.LocalFileSystem)
    storage.write("name", b"newer")
    with pytest.raises(StorageError, match="the power went"):
        storage.write("name", b"newest")
    assert seen == [(["name"], b"old"), (["name"], b"newer")]
    assert storage.read("name") == b"newer"
    assert len(list((tmp_path / "place").iterdir())) == 1


def test_an_upload_that_breaks_off_leaves_what_was_there(server: BucketServer, tmp_path: Path) -> None:
    storage = server.storage("broken").patient(0)
    storage.write("name", b"old")
    before = len(server.requests)
    path = write(tmp_path / "large", os.urandom(LARGE))
    broken = server.refusing("403 Forbidden", "AccessDenied", lambda: len(server.requests) > before + 3)
    with broken, pytest.raises(StorageError, match="access is denied"):
        storage.upload(path, "name")
    assert storage.read("name") == b"old"


# Away, full, closed


@pytest.mark.parametrize("trouble", ["away", "full"])
def test_a_moment_of_trouble_is_waited_out(server: BucketServer, trouble: str) -> None:
    storage = server.storage(f"moment-{trouble}")
    attempts = len(server.requests)
    with ExitStack() as over:
        over.enter_context(server.full() if trouble == "full" else server.away())
        repair = threading.Timer(1.5, over.pop_all().close)
        repair.start()
        storage.write("name", b"x")
        repair.join()
    if trouble == "full":
        assert len(server.requests) - attempts > 4, "refused at first"
    assert storage.read("name") == b"x"


@pytest.mark.parametrize(
    ("trouble", "sentence"), [("away", "cannot be reached, and still not after 1 s"), ("full", "full, and still so")]
)
def test_trouble_that_stays_is_one_sentence(
    server: BucketServer, monkeypatch: pytest.MonkeyPatch, trouble: str, sentence: str
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    storage = server.storage("trouble")
    with server.full() if trouble == "full" else server.away(), pytest.raises(StorageError, match=sentence) as caught:
        storage.write("name", b"x")
    assert str(caught.value).startswith("s3://tuner/trouble/name: ")
    assert "\n" not in str(caught.value)


def test_denied_access_is_not_waited_for(server: BucketServer) -> None:
    started = time.monotonic()
    with server.closed():
        calls: tuple[Callable[[Storage], object], ...]
        calls = (lambda s: s.write("name", b"x"), lambda s: s.names(), lambda s: s.read("name"))
        for call in calls:
            with pytest.raises(StorageError, match="access is denied"):
                call(server.storage("closed"))
    assert time.monotonic() - started < 60, "the patience is two minutes"


def test_a_bucket_that_is_not_there_is_named(server: BucketServer) -> None:
    other = Storage.parse(server.uri("x").replace("tuner/x", "nobody/x"))
    with pytest.raises(StorageError, match="s3://nobody/x/name: there is no such bucket"):
        other.write("name", b"x")


def test_a_full_disk_here_is_not_the_storages_fault(storage: Storage, tmp_path: Path) -> None:
    storage.write("name", b"x")
    write(tmp_path / "file", b"")
    with pytest.raises(StorageError, match=f"^{tmp_path}/file: cannot be written"):
        storage.download("name", tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("http://host/path", "give a folder, s3://bucket/path or gs://bucket/path"),
        ("s3:///path", "names no bucket"),
        ("file://folder", "three slashes"),
        ("s3://key:hidden-word@bucket/path", "holds credentials"),
        ("s3://key:hidden-word/with/slash@bucket/path", "holds credentials"),
        ("s3://bucket/path?secret_key=hidden-word", "holds credentials"),
    ],
)
def test_a_uri_that_cannot_be_used_is_one_sentence_without_its_secrets(uri: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        Storage.parse(uri)
    assert "hidden-word" not in str(caught.value)


def test_an_option_that_arrow_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="colour"):
        Storage.parse("s3://bucket/path?colour=red").names()


def test_google_is_not_left_to_retry_for_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client retries by itself; nobody answers here."""
    monkeypatch.setattr("tuner.storage.GOOGLE_RETRY", "retry_limit_seconds=1")
    storage = Storage.parse("gs://anonymous@bucket/path?endpoint_override=127.0.0.1:9&scheme=http").patient(1)
    started = time.monotonic()
    with pytest.raises(StorageError, match="gs://anonymous@bucket/path/name: cannot be reached"):
        storage.write("name", b"x")
    assert time.monotonic() - started < 60


# Prepared stores


def test_a_store_is_downloaded_once_and_is_the_same(server: BucketServer, tiny: Tiny, cache: Path) -> None:
    place = server.storage("store")
    upload_store(tiny.store_folder, place)
    here = open_store(place.place)
    assert here.folder == cache / "stores" / "tiny-store"
    reference = Store.open(tiny.store_folder)
    assert all((here.features(clip) == reference.features(clip)).all() for clip in range(len(reference)))
    before = len(server.requests)
    assert fetch_store(place.place) == here.folder
    upload_store(tiny.store_folder, place)
    assert {path for _, path in server.requests[before:]} == {f"/tuner/store/{META_FILE}"}


def test_a_damaged_copy_is_downloaded_anew(server: BucketServer, tiny: Tiny) -> None:
    place = server.storage("again")
    upload_store(tiny.store_folder, place)
    damaged = fetch_store(place.place) / "captions.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert len(open_store(place.place)) == len(tiny.store())


def test_a_store_that_is_not_whole_is_none(server: BucketServer, tiny: Tiny, cache: Path) -> None:
    place = server.storage("half").patient(0)
    before = len(server.requests)
    broken = server.refusing("403 Forbidden", "AccessDenied", lambda: len(server.requests) > before + 12)
    with broken, pytest.raises(StorageError):
        upload_store(tiny.store_folder, place)
    assert place.names() and META_FILE not in place.names()
    with pytest.raises(DataError, match=r"half.*: not a complete store .*tuner prepare --out"):
        fetch_store(place.place)
    assert not (cache / "stores").exists()


@pytest.mark.parametrize("bad", [{"fingerprint": "../../out"}, {"files": {"../out": 1}}, {"files": {"/etc/out": 1}}])
def test_a_store_cannot_write_outside_the_cache(
    server: BucketServer, tiny: Tiny, tmp_path: Path, bad: dict[str, Any]
) -> None:
    place = server.storage("foreign")
    upload_store(tiny.store_folder, place)
    meta = json.loads((tiny.store_folder / META_FILE).read_text())
    place.write(META_FILE, json.dumps(meta | bad).encode())
    with pytest.raises(DataError, match="not a complete store"):
        fetch_store(place.place)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_files_are_not_replaced_by_a_store(server: BucketServer, tiny: Tiny) -> None:
    place = server.storage("taken")
    place.write("thesis.tex", b"x")
    with pytest.raises(DataError, match="holds other files"):
        upload_store(tiny.store_folder, place)
    assert place.names() == ["thesis.tex"]


def test_prepare_puts_its_store_where_it_is_told(
    server: BucketServer,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it prepares is `test_prepare.py`'s; here it has prepared it before."""
    monkeypatch.setattr("tuner.commands.actions.prepare.make_store", lambda *given: tiny.store_folder)
    uri = server.uri("prepared")
    (tmp_path / "manifest.csv").touch()
    arguments = ["prepare", str(tmp_path / "manifest.csv"), "--encoder", "e", "--text-encoder", "t", "--out", uri]
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"{uri}\n"
    assert len(open_store(uri)) == len(tiny.store())


def test_a_store_of_this_machine_alone_is_put_into_the_storage(storage: Storage, tiny: Tiny, cache: Path) -> None:
    """The demo and manifests are prepared into the cache of the head; lanes on other nodes ask the storage."""
    own = shutil.copytree(tiny.store_folder, cache / "stores" / "tiny-store")
    place = place_of(own, "demo", storage)
    assert place == storage.at("stores", "tiny-store").place
    shutil.rmtree(own)
    assert len(open_store(place)) == len(tiny.store())
    assert place_of(tiny.store_folder, str(tiny.store_folder), storage) == str(tiny.store_folder), (
        "a place of the user's"
    )
    assert place_of(own, "s3://b/store", storage) == "s3://b/store"


# A lane's files


def test_a_lane_goes_on_from_the_storages_copy(storage: Storage, tmp_path: Path, cache: Path) -> None:
    """Two workers on two nodes that share no folder."""
    config = TrialConfig().model_dump(mode="json")
    first, second = (LaneFiles(tmp_path / "unused", storage, f"lane-{index}") for index in (0, 1))
    first.fetch("t0001")
    assert not first.checkpoint("t0001").exists()
    for epoch in (b"1", b"2"):
        write(first.checkpoint("t0001"), epoch)
        first.keep("t0001", config)
    second.fetch("t0001")
    assert second.checkpoint("t0001").read_bytes() == b"2"
    assert checkpointed(storage) == {1: TrialConfig()}
    assert checkpointed(storage, {1}) == {}
    assert not (tmp_path / "unused").exists()
    for files in (first, second):
        files.close()
    assert not list((cache / "lanes").iterdir())


def test_a_lane_removes_what_a_killed_worker_left(storage: Storage, tmp_path: Path, cache: Path) -> None:
    nobody = 2**22 + 1  # more than Linux gives
    left = write(cache / "lanes" / f"lane-0.{nobody}" / "checkpoints" / "t0001.pt", b"x")
    other = write(cache / "lanes" / f"lane-1.{nobody}" / "checkpoints" / "t0002.pt", b"x")
    LaneFiles(tmp_path, storage, "lane-0")
    assert not left.exists()
    assert other.exists()


def test_without_a_storage_the_studys_folder_is_used_as_it_is(tmp_path: Path) -> None:
    files = LaneFiles(tmp_path, None, "lane-0")
    path = write(files.checkpoint("t0001"), b"x")
    files.fetch("t0001")
    files.keep("t0001", {})
    files.keep_adapter("t0001")
    files.close()
    assert files.checkpoint("t0001") == tmp_path / "checkpoints" / "t0001.pt"
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == [path]


# A study's files


def study_files(folder: Path, **changes: Any) -> Path:
    """A study with a database of one table, as a driver has it."""
    write(folder / "study.json", json.dumps({"study": folder.name, "sessions": 1, **changes}).encode())
    write(folder / "journal.jsonl", b'{"event": "trial"}\n')
    (folder / "study.db").unlink(missing_ok=True)
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("create table trials (number integer)")
    database.close()
    return folder


def count_rows(database: Path) -> int:
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        return int(connection.execute("select count(*) from trials").fetchone()[0])
    finally:
        connection.close()


def test_only_what_has_changed_is_copied(server: BucketServer, tmp_path: Path) -> None:
    folder = study_files(tmp_path / "study")
    mirror = Mirror(folder, server.storage("mirror"))
    mirror.copy()
    assert mirror.storage.names() == ["journal.jsonl", "study.db", "study.json"]
    before = len(server.requests)
    mirror.copy()
    assert len(server.requests) == before
    write(folder / "journal.jsonl", b"longer\n")
    mirror.copy()
    assert {path for _, path in server.requests[before:]} == {"/tuner/mirror/journal.jsonl"}
    assert mirror.storage.read("journal.jsonl") == b"longer\n"


def test_a_database_is_copied_whole_while_it_is_written(storage: Storage, tmp_path: Path) -> None:
    folder, ended = study_files(tmp_path / "study"), threading.Event()

    def insert() -> None:
        connection = sqlite3.connect(folder / "study.db", timeout=60)
        while not ended.is_set():
            with connection:
                connection.executemany("insert into trials values (?)", [(number,) for number in range(100)])
            # As often as a fast search does, not so often that nobody else gets a turn.
            ended.wait(0.02)
        connection.close()

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        copies: list[int] = []
        deadline = time.monotonic() + 60
        while len(copies) < 5 or copies[-1] == copies[0]:
            assert time.monotonic() < deadline, copies
            Mirror(folder, storage).copy()
            storage.download("study.db", tmp_path / "copy.db")
            copies.append(count_rows(tmp_path / "copy.db"))
    finally:
        ended.set()
        thread.join()
    assert all(rows % 100 == 0 for rows in copies), "no half of a transaction"
    assert copies == sorted(copies)


def test_a_search_is_followed_and_whole_at_its_end(storage: Storage, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tuner.search.durable.mirror.MIRROR_SECONDS", 0.05)
    folder = study_files(tmp_path / "study")
    with mirrored(folder, storage):
        assert storage.exists("study.json"), "before anything is trained"
        write(folder / "front.json", b"early")
        deadline = time.monotonic() + 60
        while storage.read("front.json") != b"early":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        monkeypatch.setattr("tuner.search.durable.mirror.MIRROR_SECONDS", 1e6)
        write(folder / "front.json", b"last")
    assert storage.read("front.json") == b"last"


def test_what_ends_a_search_is_what_is_said(server: BucketServer, tmp_path: Path) -> None:
    folder, storage = study_files(tmp_path / "study"), server.storage("ends")
    with pytest.raises(StudyError, match="its own reason"), mirrored(folder, storage):
        write(folder / "front.json", b"x")
        raise StudyError("its own reason")
    assert storage.exists("front.json")
    with pytest.raises(StudyError, match="its own reason"), mirrored(folder, storage), server.closed():
        write(folder / "front.json", b"longer")
        raise StudyError("its own reason")


def test_a_result_that_cannot_be_copied_is_said_to_be_here(server: BucketServer, tmp_path: Path) -> None:
    folder = study_files(tmp_path / "study")
    refused = server.closed()
    try:
        said = pytest.raises(StorageError, match=f"access is denied.*the result is only in {folder}")
        with said, mirrored(folder, server.storage("unsaid")):
            write(folder / "front.json", b"x")
            refused.__enter__()
    finally:
        refused.__exit__(None, None, None)


def test_the_copy_with_more_drivers_wins(storage: Storage, tmp_path: Path) -> None:
    theirs = study_files(tmp_path / "their" / "study", sessions=2)
    Mirror(theirs, storage).copy()
    ours = study_files(tmp_path / "our" / "study", sessions=2)
    write(ours / "journal.jsonl", b"ours")
    fetch_study(ours, storage)
    assert (ours / "journal.jsonl").read_bytes() == b"ours", "a tie: the storage is behind the driver it came from"
    study_files(ours, sessions=1)
    write(ours / "front.json", b"of the older one")
    fetch_study(ours, storage)
    assert json.loads((ours / "study.json").read_text())["sessions"] == 2
    assert not (ours / "front.json").exists()
    shutil.rmtree(ours)
    fetch_study(ours, storage)
    assert {path.name for path in ours.iterdir()} == {"study.json", "study.db", "journal.jsonl"}


def test_a_half_fetched_study_is_fetched_again(storage: Storage, tmp_path: Path) -> None:
    Mirror(study_files(tmp_path / "their" / "study"), storage).copy()
    write(tmp_path / "our" / "study" / "journal.jsonl", b"half")
    fetch_study(tmp_path / "our" / "study", storage)
    assert (tmp_path / "our" / "study" / "journal.jsonl").read_bytes() != b"half"


def test_a_name_is_taken_in_the_storage_too(storage: Storage, tmp_path: Path) -> None:
    storage.at(STUDY).write("study.json", b"{}")
    with pytest.raises(StudyError, match=f"study {STUDY} exists in .*--resume {STUDY} --storage"):
        check_new(StudyFolder(tmp_path / STUDY), storage)
    check_new(StudyFolder(tmp_path / "another"), storage)
    late: Any = SimpleNamespace(folder=StudyFolder(tmp_path / STUDY), storage=storage)
    nothing: Any = None
    with pytest.raises(StudyError, match=f"study {STUDY} exists in .*--resume {STUDY} --storage"):
        open_record(late, nothing, nothing, resume=False)


def test_an_unnamed_study_gets_the_first_free_name(storage: Storage, tmp_path: Path) -> None:
    """One that could not start has left an empty folder, which Arrow makes in S3 too."""
    for folder in ("space", "space-2", "space-3"):
        storage.at(folder).write("driver.json", b"{}")
        storage.at(folder).remove("driver.json")
    storage.at("space").write("study.json", b"{}")
    assert _free_name(Place(tmp_path, storage), "space") == "space-2"
    (tmp_path / "space-2").mkdir()
    assert _free_name(Place(tmp_path, storage), "space") == "space-3"
    assert _free_name(Place(tmp_path, None), "other") == "other"


def test_a_study_that_is_nowhere_cannot_be_resumed(storage: Storage, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=f"study {STUDY}: is not in "):
        resumed_request(StudyFolder(tmp_path / STUDY), None, storage)
    start_study(tiny, tmp_path / STUDY)
    with pytest.raises(StudyError, match="give the storage that it was started with"):
        resumed_request(StudyFolder(tmp_path / STUDY), None, storage)


# Trials that the database does not know


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("attention_only")


def new_study() -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize"])


def searcher(study: optuna.Study, space: SearchSpace, trials: int) -> StudySearcher:
    objectives = choose_objectives(["recall@1", "trainable_parameters"])
    costs = {"trainable_parameters": 10.0}
    return StudySearcher(study, space, objectives, lambda config: costs, fixed_configurations(), trials, {}, seed=3)


def suggested(searcher: StudySearcher, trials: int) -> list[TrialConfig]:
    values = [searcher.suggest(f"tune-{number}") for number in range(trials)]
    return [TrialConfig.model_validate(value["config"]) for value in values]


def begun(space: SearchSpace, trials: int) -> list[TrialConfig]:
    """Configurations of the first trials of a study, as lanes have them beside their checkpoints."""
    return suggested(searcher(new_study(), space, trials), trials)


def test_adopted_trials_are_handed_out_first_under_their_numbers(space: SearchSpace) -> None:
    configs = begun(space, 4)
    study = new_study()
    adopt(study, space, fixed_configurations(), dict(enumerate(configs)))
    adopt(study, space, fixed_configurations(), dict(enumerate(configs)))
    again = searcher(study, space, 5)
    assert again.remaining == 5
    handed = [again.suggest(f"tune-{number}") for number in range(4)]
    assert [item["trial"] for item in handed] == [f"t{n:04d}" for n in range(4)]
    assert [item["config"] for item in handed] == [config.model_dump(mode="json") for config in configs]
    assert [item["origin"] for item in handed] == ["projection_only", "recommended", "sampled", "sampled"]
    new = again.suggest("tune-4")
    assert (new["trial"], new["origin"]) == ("t0004", "sampled")


def test_the_sampler_learns_from_an_adopted_trial(space: SearchSpace) -> None:
    reference, study = new_study(), new_study()
    known = searcher(reference, space, 4)
    configs = dict(enumerate(suggested(known, 4)))
    adopt(study, space, fixed_configurations(), configs)
    assert [trial.params for trial in study.trials] == [trial.params for trial in reference.trials]
    assert [trial.distributions for trial in study.trials] == [trial.distributions for trial in reference.trials]


def test_a_number_without_a_checkpoint_is_used_up(space: SearchSpace) -> None:
    configs = begun(space, 4)
    study = new_study()
    adopt(study, space, fixed_configurations(), {3: configs[3]})
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 3 + [TrialState.RUNNING]
    again = searcher(study, space, 3)
    handed = [again.suggest(f"tune-{number}") for number in range(3)]
    assert [item["trial"] for item in handed] == ["t0003", "t0004", "t0005"]
    assert [item["origin"] for item in handed] == ["sampled", "projection_only", "recommended"]


def test_a_trial_that_was_being_written_down_keeps_its_number(space: SearchSpace) -> None:
    """The database was copied between Optuna's first word of a trial and ours."""
    configs = begun(space, 3)
    study = new_study()
    adopt(study, space, fixed_configurations(), dict(enumerate(configs[:2])))
    study.ask()
    adopt(study, space, fixed_configurations(), {2: configs[2]})
    again = searcher(study, space, 3)
    assert suggested(again, 3) == configs


def test_known_trials_stay_as_they_are(space: SearchSpace) -> None:
    study = new_study()
    known = searcher(study, space, 2)
    configs = dict(enumerate(suggested(known, 2)))
    known.on_trial_complete("tune-0", {"epoch": 2, "final": True, "recall@1": 0.5})
    before = study.get_trials()
    adopt(study, space, fixed_configurations(), configs)
    assert study.get_trials() == before


def test_errors_of_a_storage_are_sentences_for_users() -> None:
    assert issubclass(StorageError, TunerError)
    assert StorageError("x").exit_code == 2
