"""The report of a running search: what its server answers and to whom, and that the page follows the study."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Tiny
from finished_study import CONFIGS, KNOWN, STUDY, epoch_done, points_of, start_study, write_front, write_study

from tuner.errors import ConfigError, StudyError
from tuner.report.html import write_report
from tuner.report.live import JsonView
from tuner.report.serve import LOOPBACK, LiveReport
from tuner.report.watch import WatchedFolder
from tuner.service.jobs import live_job
from tuner.service.jobs.cluster import Cluster, StudyJob
from tuner.service.jobs.live_job import WatchedJob
from tuner.study.events import BASELINE, SAMPLED, EpochDone, Event, StudyStarted, TrialStarted
from tuner.study.folder import StudyFolder
from tuner.study.journal import Journal
from tuner.study.progress import progress_of
from tuner.study.study import Study

TRIALS = 3
PATIENCE = 120.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tiny, tmp_path_factory.mktemp("runs") / STUDY)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A study of three trials that has begun with none."""
    start_study(tiny, tmp_path / STUDY, TRIALS)
    return tmp_path / STUDY


@contextmanager
def serving(server: LiveReport) -> Iterator[LiveReport]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: LiveReport, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection(LOOPBACK, server.server_port, timeout=60)
    with closing(connection):
        connection.request(method, path, headers={"Host": host or f"{LOOPBACK}:{server.server_port}"})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def told(server: LiveReport, path: str) -> dict[str, Any]:
    status, _, text = ask(server, path)
    assert status == 200, text
    values: dict[str, Any] = json.loads(text)
    return values


def run_trial(journal: Journal, trial: str, epochs: int = 2, recall: float = 0.5) -> None:
    origin, config = CONFIGS.get(trial, (SAMPLED, CONFIGS["t0001"][1]))
    journal.start(TrialStarted(trial=trial, origin=origin, config=config, known=KNOWN))
    for epoch in range(1, epochs + 1):
        journal.epoch(epoch_done(trial, epoch, {"recall@10": recall}))


# A study in a folder


def test_each_epoch_is_something_new_to_draw(folder: Path) -> None:
    with serving(LiveReport(WatchedFolder(folder))) as server, closing(Journal(StudyFolder(folder))) as journal:
        empty = told(server, "/status")
        assert not empty["ended"] and empty["text"].startswith("0 of 3 trials ended, 0 of 6 epochs")
        assert "No trial has started yet." in told(server, "/content")["html"]
        run_trial(journal, "t0000", epochs=1, recall=0.25)
        first = told(server, "/status")
        assert first["version"] != empty["version"]
        assert first["text"].startswith("0 of 3 trials ended, 1 of 6 epochs, front 0 points, time left unknown")
        content = told(server, "/content")
        assert content["version"] == first["version"]
        assert "t0000" in content["html"] and "0.250" in content["html"]
        assert {"front", "curves"} <= content["charts"].keys()
        assert told(server, "/status") == first, "nothing new, nothing to draw"
        journal.end("t0000", "failed", "loss became <b>nan</b>")
        assert told(server, "/status")["text"].startswith("1 of 3 trials ended, 2 of 6 epochs")
        assert "loss became &lt;b&gt;nan&lt;/b&gt;" in told(server, "/content")["html"]


def test_the_page_is_the_report_and_asks_this_server_alone(finished: Path) -> None:
    """Same content as the file; only the live one may connect, and only to where it came from."""
    still = write_report(finished).read_text(encoding="utf-8")
    with serving(LiveReport(WatchedFolder(finished))) as server:
        status, headers, page = ask(server, "/")
        content = told(server, "/content")["html"]
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert content in page and content.replace(str(finished), "") in still.replace(str(finished), "")
    assert "; connect-src 'self'\"" in page and "default-src 'none'" in page
    assert "setTimeout(poll" in page and "://" not in page.split("<script")[0]
    for sign in ("connect-src", "setTimeout(poll", 'id="live"'):
        assert sign not in still, "a file has nobody to ask"
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"


def test_it_ends_with_the_front_of_all_trials(tiny: Tiny, finished: Path, folder: Path) -> None:
    """Not with that of an earlier, shorter search, which is what an extended study has meanwhile."""
    points = points_of(finished)
    with serving(LiveReport(WatchedFolder(folder))) as server, closing(Journal(StudyFolder(folder))) as journal:
        for trial in CONFIGS:
            run_trial(journal, trial)
            journal.end(trial, "complete")
        write_front(folder, points, trials=2)
        assert not told(server, "/status")["ended"]
        assert "Points to choose from" not in told(server, "/content")["html"]
        run_trial(journal, "t0002")
        journal.end("t0002", "complete")
        confirming = told(server, "/status")
        assert not confirming["ended"] and "the front is being confirmed" in confirming["text"]
        write_front(folder, points, trials=3)
        ended = told(server, "/status")
        assert ended["ended"] and ended["text"].startswith("the search has ended, last change at ")
        content = told(server, "/content")
        assert "Points to choose from" in content["html"] and content["version"] == ended["version"]


def test_a_front_without_a_number_of_trials_is_final(finished: Path) -> None:
    """As version 0.1 wrote it."""
    front = Study.open(finished).front
    assert front is not None and front.trials is None


def test_the_state_is_that_of_the_report(finished: Path) -> None:
    study = Study.open(finished)
    progress = progress_of(study.record.plan(finished), study.history)
    assert [trial.trial for trial in progress.trials] == [trial.trial for trial in study.measured] == list(CONFIGS)
    (finished / "front.json").rename(finished / "front")
    try:
        assert {trial.trial for trial in progress.front()} == Study.open(finished).on_front
    finally:
        (finished / "front").rename(finished / "front.json")
    assert progress.epochs_settled == progress.epochs_total == 4


def test_a_damaged_file_is_said_and_got_over(folder: Path) -> None:
    """The page keeps what it shows, and asks again."""
    record = (folder / "study.json").read_text()
    with serving(LiveReport(WatchedFolder(folder))) as server:
        (folder / "study.json").write_text("{")
        status, _, text = ask(server, "/status")
        assert status == 503 and "study.json: is damaged" in text
        assert ask(server, "/content")[0] == 503
        (folder / "study.json").write_text(record)
        assert told(server, "/content")["html"]


def test_no_study_no_server(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study here"):
        WatchedFolder(tmp_path)


# Who may ask


def test_only_this_machine_under_its_own_name(folder: Path) -> None:
    """A foreign page whose name was made to point to loopback comes under that name."""
    with serving(LiveReport(WatchedFolder(folder))) as server:
        port = server.server_port
        for host in (f"{LOOPBACK}:{port}", f"localhost:{port}", "localhost", f"{LOOPBACK}:1"):
            assert ask(server, "/status", host=host)[0] == 200, host
        for host in ("evil.example", f"evil.example:{port}", f"{LOOPBACK}.evil.example", "0.0.0.0", "[::1", "@", ""):
            status, _, text = ask(server, "/content", host=host or " ")
            assert (status, "far" in text) == (403, False), host
        listening = [s.laddr.ip for s in psutil.Process().net_connections() if s.status == psutil.CONN_LISTEN]
        assert set(listening) == {LOOPBACK}


def test_only_get_and_only_three_pages(folder: Path) -> None:
    with serving(LiveReport(WatchedFolder(folder))) as server:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            assert ask(server, "/status", method)[0] == 501
        for path in ("/study.json", "/../study.json", "//etc/passwd", "/status/", "/%2e%2e/study.json"):
            assert ask(server, path)[0] == 404
        assert ask(server, "/status?x=1")[0] == 200


def test_a_taken_port_is_one_sentence(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port {port}: .*; give another port, or 0"):
            LiveReport(WatchedFolder(folder), port)


def test_the_command_serves_until_it_is_interrupted(finished: Path) -> None:
    # A shell starts what runs in its background with SIGINT ignored, the tests themselves perhaps too.
    listen = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    listen += "from tuner.cli import main; sys.argv[0] = 'tuner'; main()"
    command = [sys.executable, "-c", listen, "report", str(finished), "--live"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split()[0]
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
            connection.request("GET", "/status")
            assert json.loads(connection.getresponse().read())["ended"] is True
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0
        assert process.stderr.read() == ""


# A search on a cluster


class Search:
    """A cluster with one search, whose lines the test says, and whose files a folder has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, StudyJob("one", STUDY, "s", "tiny", "me", "RUNNING", None)
        self.lines: list[str] = []
        self.fetched = 0
        self.fails: StudyError | None = None
        self._changed = threading.Condition()

    def follow(self, job: StudyJob, on_line: Callable[[str], None]) -> StudyJob:
        """As `Cluster.follow`."""
        heard = 0
        while not self.job.ended or heard < len(self.lines):
            with self._changed:
                told = partial(self._has_news, heard)
                self._changed.wait_for(told, PATIENCE)
            for line in self.lines[heard:]:
                on_line(line)
                heard += 1
        return self.job

    def _has_news(self, heard: int) -> bool:
        return len(self.lines) > heard or self.job.ended

    def say(self, event: Event) -> None:
        out = io.StringIO()
        JsonView(out).show(event)
        with self._changed:
            self.lines.append(out.getvalue())
            self._changed.notify_all()

    def end(self, state: str) -> None:
        with self._changed:
            self.job = StudyJob("one", STUDY, "s", "tiny", "me", state, None)
            self._changed.notify_all()

    def records(self, folder: Path) -> None:
        """As of a `StudySource`."""
        self.fetched += 1
        if self.fails:
            raise self.fails
        for name in ("study.json", "journal.jsonl", "front.json"):
            if (self.folder / name).exists():
                (folder / name).write_bytes((self.folder / name).read_bytes())

    def points(self, folder: Path, trials: Any, best: bool) -> None:
        raise NotImplementedError("a page needs no adapters")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watch(search: Search) -> WatchedJob:
    cluster: Cluster = search  # type: ignore[assignment]
    return WatchedJob(cluster, search.job, search)


def test_a_search_elsewhere_is_followed_by_its_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State at once; what is drawn comes in pieces that cost a job, so no more often than is allowed."""
    search = Search(folder)
    watched = watch(search)
    assert watched.status().text == "the search is starting"
    search.say(
        StudyStarted(study=STUDY, space="s", objectives=("recall@10",), trials=TRIALS, epochs=2, run_dir=str(folder))
    )
    search.say(TrialStarted(trial="t0000", origin=BASELINE, config=CONFIGS["t0000"][1], known=KNOWN))
    with closing(Journal(StudyFolder(folder))) as journal:
        run_trial(journal, "t0000", epochs=1, recall=0.25)
    search.say(EpochDone(trial="t0000", epoch=1, loss=0.5, metrics={"recall@10": 0.25}, train_seconds=2.0))
    wait_for(lambda: "1 of 6 epochs" in watched.status().text)
    before = watched.status()
    assert (search.fetched, before.version, before.ended) == (1, "0", False)
    assert not watched.study().trials, "drawn from what was fetched at the start"
    monkeypatch.setattr(live_job, "FETCH_SECONDS", 0.0)
    assert watched.status().version == "1"
    study = watched.study()
    assert (search.fetched, [trial.value("recall@10") for trial in study.trials]) == (2, [0.25])
    assert watched.elsewhere
    assert watched.study() is study and watched.status().version == "1"


def test_the_end_elsewhere_is_fetched_at_once(folder: Path, finished: Path) -> None:
    search = Search(folder)
    watched = watch(search)
    with closing(Journal(StudyFolder(folder))) as journal:
        for number in range(TRIALS):
            run_trial(journal, f"t{number:04d}")
            journal.end(f"t{number:04d}", "complete")
    write_front(folder, points_of(finished), trials=TRIALS)
    search.end("SUCCEEDED")
    wait_for(lambda: watched.status().version == "1")
    assert not watched.status().ended, "the last of it is not drawn yet"
    assert watched.study().front is not None
    assert (watched.status().ended, watched.status().text) == (True, "the search has ended (succeeded)")
    assert search.fetched == 2


def test_a_head_that_is_away_is_not_asked_at_each_poll(folder: Path) -> None:
    search = Search(folder)
    with serving(LiveReport(watch(search))) as server:
        assert ask(server, "/")[0] == 200
        search.fails = StudyError("the head sent nothing")
        search.end("FAILED")
        wait_for(lambda: told(server, "/status")["version"] == "1")
        for _ in range(3):
            assert ask(server, "/content")[0::2] == (503, "the head sent nothing")
    assert search.fetched == 2
