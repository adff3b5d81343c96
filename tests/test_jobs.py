"""Searches as jobs: events read back, lost connections, what of a command line is sent. A cluster: `test_ray_up`."""

from __future__ import annotations

import http.server
import io
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tiny
from scripted_head import Head

from tuner import cli
from tuner.config import TrialConfig
from tuner.errors import ConfigError, StudyError
from tuner.report.live import JsonView
from tuner.service.jobs import follow
from tuner.service.jobs.cluster import Cluster, connect
from tuner.service.jobs.feed import EventFeed
from tuner.study.events import (
    SAMPLED,
    EpochDone,
    Event,
    FrontChanged,
    Message,
    StudyStarted,
    TrialEnded,
    TrialStarted,
    parse_line,
)


@dataclass
class Told:
    """A view that writes down what it is shown."""

    events: list[Event] = field(default_factory=list)

    def show(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing."""


def started(trials: int = 5, run_dir: str = "/runs/s") -> StudyStarted:
    objectives = ("recall@10", "trainable_parameters")
    return StudyStarted(study="s", space="full", objectives=objectives, trials=trials, epochs=2, run_dir=run_dir)


def begun(trial: str, parameters: float) -> TrialStarted:
    known = {"trainable_parameters": parameters}
    return TrialStarted(trial=trial, origin=SAMPLED, config=TrialConfig(), known=known)


def epoch(trial: str, recall: float, loss: float = 0.5) -> EpochDone:
    return EpochDone(trial=trial, epoch=1, loss=loss, metrics={"recall@10": recall}, train_seconds=1.5)


def printed(*events: Event) -> str:
    """What `--json` prints of these events."""
    out = io.StringIO()
    view = JsonView(out)
    for event in events:
        view.show(event)
    return out.getvalue()


# Events


def test_a_view_there_is_a_view_here() -> None:
    """What `--json` prints on the head shows a view here the very events that a view there would have been shown, but
    for marks that end lines."""
    events: list[Event] = [
        started(),
        begun("t0000", 77),
        epoch("t0000", 0.25),
        Message(text="confirming, ünïcode\u2028"),
        TrialEnded(trial="t0000", state="failed", reason="loss became nan"),
        FrontChanged(trials=("t0000", "t0003")),
    ]
    here, said = Told(), list[str]()
    feed = EventFeed(here, said.append)
    for line in printed(*events).split("\n"):
        feed.line(line)
    events[3] = Message(text="confirming, ünïcode\\u2028")
    assert here.events == events
    assert said == []


def test_a_loss_that_diverged_stays_one() -> None:
    here = Told()
    EventFeed(here, print).line(printed(epoch("t0000", 0.25, loss=float("nan"))))
    (event,) = here.events
    assert isinstance(event, EpochDone) and event.loss is None and event.metrics == {"recall@10": 0.25}


def test_words_are_passed_on_and_the_machinery_is_not() -> None:
    here, said = Told(), list[str]()
    feed = EventFeed(here, said.append)
    for line in (
        "2026-11-23 08:30:16,599\tINFO job_manager.py:568 -- Runtime env is setting up.",
        "*** SIGTERM received at time=1795425100 on cpu 1 ***",
        "PC: @     0x7f676c8a3f16  (unknown)  (unknown)",
        "@     0x7f676c85a050  (unknown)  (unknown)",
        "[2026-11-23 09:11:40,015 E 8449 8449] logging.cc:474: PC: @     0x7f676c8a3f16  (unknown)  (unknown)",
        "\x1b[0mtuner: no such store",
        "",
        '{"event": "epoch", "trial"',
    ):
        feed.line(line)
    assert said == ["tuner: no such store", '{"event": "epoch", "trial"']
    assert here.events == []


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "no such"}',
        '{"event": "trial_ended", "trial": "../t0000", "state": "failed"}',
        '{"event": "message", "text": ' + "[" * 100_000,
        '{"event": "message", "text": ' + "9" * 5_000 + "}",
        '{"event": "message", "text": "\\ud800"}',
    ],
)
def test_what_is_no_event_is_shown_to_nobody(line: str) -> None:
    """Whatever a head prints, a view here is shown whole events alone."""
    here, said = Told(), list[str]()
    EventFeed(here, said.append).line(line)
    assert here.events == []
    assert said == ([line] if parse_line(line) is None else [])


# Following over bad connections


def test_every_line_comes_once_however_often_the_line_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end in the middle of lines, connections break, and each new one tells everything again."""
    monkeypatch.setattr(follow, "RETRY_SECONDS", 0.0)
    text = "".join(f"line {number}\n" for number in range(20)) + "last, without an end"
    head = Head([text[start : start + 7] for start in range(0, len(text), 7)], [3, 0, 11, None])
    cluster, lines = Cluster(head), list[str]()  # type: ignore[arg-type]
    ended = cluster.follow(cluster.find("s"), lines.append)
    assert lines == text.splitlines()
    assert ended.state == "SUCCEEDED"
    assert head.connections == []


def test_a_silent_connection_is_asked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    class Silent(Head):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            self.connections.pop(0)
            if self.connections:
                await asyncio.sleep(3600)
            self.status = "FAILED"
            yield "tuner: it failed\n"

    monkeypatch.setattr(follow, "QUIET_SECONDS", 0.05)
    cluster, lines = Cluster(Silent(["tuner: it failed\n"], [0, 0])), list[str]()  # type: ignore[arg-type]
    assert cluster.follow(cluster.find("s"), lines.append).state == "FAILED"
    assert lines == ["tuner: it failed"]


# Submitting


def tuner(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tuner", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


THERE = ("--address", "http://head:8265", "--data", "/mnt/s t", "--runs", "/mnt/runs")


def test_what_the_user_wrote_is_sent_and_nothing_else(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options left out are left to the head, whose defaults may be others."""
    given = ["--objective", "recall@1", "--objective", "trainable_parameters", "--pad-to-30s", "--trials", "3"]
    assert tuner(monkeypatch, "search", *THERE, *given, "--study", "s", "--space", "full", "--json") == 0
    (job,) = head.submitted
    assert job["entrypoint"] == (
        "tuner search --address auto --json --data '/mnt/s t' --pad-to-30s --objective recall@1 "
        "--objective trainable_parameters --trials 3 --runs /mnt/runs --study s --space full"
    )
    assert job["metadata"].keys() == {"study", "space", "encoder", "user"}
    assert [job["metadata"][key] for key in ("study", "space", "encoder")] == ["s", "full", "that of s t"]
    assert job["runtime_env"] is None


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--data", "/mnt/store", "--encoder", "openai/whisper-small"], ["full", "openai/whisper-small"]),
        ([], ["full", "Whisper tiny.en of the demo"]),
        (["--resume", "s"], ["attention_only", "whisper-small"]),
    ],
)
def test_the_job_shows_space_and_encoder(
    given: list[str], shown: list[str], head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a resumed study are those that it was started with, which this machine need not know."""
    head.space = "attention_only"
    own = [] if "--resume" in given else ["--study", "s", "--space", "full"]
    assert tuner(monkeypatch, "search", "--address", "http://head:8265", "--runs", "/r", *own, *given) == 0
    assert [head.submitted[0]["metadata"][key] for key in ("space", "encoder")] == shown


def test_the_encoder_of_a_store_that_both_see_is_read_there(
    head: Head, monkeypatch: pytest.MonkeyPatch, tiny: Tiny
) -> None:
    given = ["--address", "http://head:8265", "--runs", "/r", "--data", str(tiny.store_folder), "--study", "s"]
    assert tuner(monkeypatch, "search", *given) == 0
    assert head.submitted[0]["metadata"]["encoder"] == tiny.encoder.source


def test_a_space_of_the_users_own_travels_along(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space = {"name": "mine", "description": "Mine.", "dimensions": {"head.hidden": {"int": [8, 16]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(space | {"fixed": {"head.kind": "mlp"}}))
    sent: list[str] = []
    keep = Head.submit_job

    def look(self: Head, **given: Any) -> str:
        sent.extend(path.name for path in Path(given["runtime_env"]["working_dir"]).iterdir())
        return keep(self, **given)

    monkeypatch.setattr(Head, "submit_job", look)
    assert tuner(monkeypatch, "search", *THERE, "--space", "mine.yaml", "--study", "s") == 0
    assert sent == ["mine.yaml"]
    assert head.submitted[0]["entrypoint"].endswith("--study s --space mine.yaml")
    assert head.submitted[0]["metadata"]["space"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "here/store", "--runs", "/r"], "--data here/store: on a cluster, give a folder that all"),
        (["--data", "/there"], "--runs runs: on a cluster, give a folder that all its nodes see"),
        (["--data", "store", "--storage", "s3://b/studies"], "--data store: on a cluster, give a folder that all its"),
        (["--storage", "studies"], "--storage studies: on a cluster, give a folder that all its nodes see"),
        (["--storage", "s3://key:hidden-word@b/x"], "--storage s3://***@b/x: holds a password or key"),
        (["--data", "/d", "--runs", "/r", "--space", "ful"], "did you mean full?"),
    ],
)
def test_what_cannot_work_there_is_refused_here(
    arguments: list[str],
    said: str,
    head: Head,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tuner(monkeypatch, "search", "--address", "http://head:8265", *arguments) == 2
    assert said in capsys.readouterr().err
    assert head.submitted == []


def test_with_a_storage_nodes_share_no_folder(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["--data", "s3://b/stores/demo", "--storage", "s3://b/studies"]
    assert tuner(monkeypatch, "search", "--address", "http://head:8265", *places, "--study", "s") == 0
    assert head.submitted[0]["entrypoint"] == (
        "tuner search --address auto --json --data s3://b/stores/demo --storage s3://b/studies --study s "
        "--space attention_only"
    )


def test_a_study_runs_once_at_a_time(head: Head) -> None:
    head.status = "RUNNING"
    cluster = Cluster(head)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="study s runs already as one; follow it with `tuner logs s`"):
        cluster.submit("s", "full", "whisper-small", [], None)
    assert cluster.stop(cluster.find("s")).state == "STOPPED"
    with pytest.raises(StudyError, match="has ended already"):
        cluster.stop(cluster.find("s"))
    with pytest.raises(ConfigError, match="study t: not on this cluster, which knows s"):
        cluster.find("t")


def test_status_says_how_far_it_is_and_what_failed(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Event] = [started()]
    for trial, parameters, recall in (
        ("t0000", 77, 0.25),
        ("t0001", 700, 0.5),
        ("t0002", 7000, 0.6),
        ("t0003", 70, 0.3),
    ):
        told += [begun(trial, parameters), epoch(trial, recall)]
    told += [TrialEnded(trial=trial, state="complete") for trial in ("t0000", "t0001")]
    told.append(TrialEnded(trial="t0002", state="failed", reason="loss became nan in epoch 2"))
    head.log, head.status = [printed(*told)], "RUNNING"
    assert tuner(monkeypatch, "status", "s", "--address", "http://head:8265") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "study s, space full, encoder whisper-small, of me: running"
    assert lines[1].startswith("4 of 5 trials: ") and ", about " in lines[1]
    assert {"2 complete", "1 failed", "1 running"} <= set(lines[1].split(": ")[1].split(", "))
    assert lines[2] == "t0002 failed: loss became nan in epoch 2"
    assert lines[3] == "front 2 points so far:"
    assert [line.split()[0] for line in lines[4:]] == ["t0000", "t0001"]


def test_stopping_says_how_to_go_on(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head.status, head.log = "RUNNING", ["no event\n", printed(started(run_dir="/mnt/runs/s"))]
    assert tuner(monkeypatch, "stop", "s", "--address", "http://head:8265") == 0
    again = "tuner search --resume s --runs /mnt/runs --address http://head:8265"
    assert capsys.readouterr().out == f"study s: stopped; resume it with `{again}`\n"


# Connecting


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This user's own token must not decide what a test sees."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers the version to everyone and jobs to those with the token, as a cluster does."""

    def do_GET(self) -> None:
        allowed = self.path.startswith("/api/version") or self.headers["Authorization"] == "Bearer c0ffee"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        jobs_told = b"[]" if self.path.startswith("/api/jobs") else b'{"version": "4", "ray_version": "2.60.0"}'
        self.wfile.write(jobs_told if allowed else b"Unauthorized")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_missing_or_wrong_token_is_one_sentence(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match=f"{refusing}: the cluster requires its token"):
        connect(refusing)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "decaf")
    with pytest.raises(StudyError, match="the cluster requires its token") as raised:
        connect(refusing)
    assert "decaf" not in str(raised.value)


def test_the_token_is_found_where_ray_looks_for_it(
    refusing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("c0ffee\n")
    assert connect(refusing).studies() == []
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="elsewhere: the token cannot be read"):
        connect(refusing)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee")
    assert connect(refusing).studies() == []


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(StudyError, match=r"http://127\.0\.0\.1:9: no Ray dashboard answers"):
        connect("http://127.0.0.1:9")
