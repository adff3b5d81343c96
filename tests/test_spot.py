"""The watcher of a spot machine against a metadata service on loopback that answers as the clouds' do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tuner.errors import ConfigError, StudyError
from tuner.service import spot
from tuner.service.spot import GCP_NOTICE_SECONDS, Notice, cloud_named, read_notice, watch

TOKEN = "a-session-token"


@dataclass
class Metadata:
    """What the service says: an answer or a status for each path, and what it was asked."""

    url: str = ""
    answers: dict[str, str | int] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def is_taken_back(self, seconds: float) -> None:
        """AWS's answer once an instance has been chosen."""
        time = (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.answers["/latest/meta-data/spot/instance-action"] = json.dumps({"action": "terminate", "time": time})


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata(answers={"/latest/api/token": TOKEN, "/computeMetadata/v1/instance/preempted": "FALSE"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            service.asked.append((self.command, self.path, headers))
            answer = service.answers.get(self.path, 404)
            if self.path.startswith("/latest/meta-data") and headers.get("x-aws-ec2-metadata-token") != TOKEN:
                answer = 401
            if self.path.startswith("/computeMetadata") and headers.get("metadata-flavor") != "Google":
                answer = 403
            body = answer.encode() if isinstance(answer, str) else b""
            self.send_response(200 if isinstance(answer, str) else answer)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield service
        server.shutdown()
        thread.join()


def test_aws_has_no_notice_until_it_has(metadata: Metadata) -> None:
    assert read_notice("aws", metadata.url) is None
    metadata.is_taken_back(seconds=120)
    notice = read_notice("aws", metadata.url)
    assert notice is not None
    assert 115 <= notice.seconds <= 120
    method, _, headers = metadata.asked[0]
    assert (method, headers["x-aws-ec2-metadata-token-ttl-seconds"]) == ("PUT", "21600")


def test_a_notice_that_has_passed_leaves_no_time(metadata: Metadata) -> None:
    metadata.is_taken_back(seconds=-30)
    assert read_notice("aws", metadata.url) == Notice(0)


def test_google_cloud_says_true(metadata: Metadata) -> None:
    assert read_notice("gcp", metadata.url) is None
    metadata.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
    assert read_notice("gcp", metadata.url) == Notice(GCP_NOTICE_SECONDS)


def test_no_proxy_stands_between(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service answers on the machine's own link alone; nobody answers on this proxy's port."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert read_notice("aws", metadata.url) is None


def test_the_node_is_drained_once_and_trouble_on_the_way_is_outlasted(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service fails, then has nothing to say, then gives notice; the cluster does not answer at first."""
    monkeypatch.setitem(spot.POLL_SECONDS, "aws", 0.0)
    said: list[str] = []
    drained: list[Notice] = []
    rounds = 0

    def sleep(_: float) -> None:
        nonlocal rounds
        rounds += 1
        metadata.answers["/latest/api/token"] = TOKEN
        if rounds == 3:
            metadata.is_taken_back(seconds=60)

    def drain(notice: Notice) -> None:
        drained.append(notice)
        if len(drained) == 1:
            raise StudyError("the node cannot be drained")

    monkeypatch.setattr(time, "sleep", sleep)
    metadata.answers["/latest/api/token"] = 503
    watch("aws", metadata.url, drain, said.append)
    assert rounds == 4
    assert [55 <= notice.seconds <= 60 for notice in drained] == [True, True]
    assert [line.split(";")[0].split(" in ")[0] for line in said] == [
        f"{metadata.url}: no answer that means anything (HTTP Error 503: Service Unavailable)",
        "this machine is taken away",
        "the node cannot be drained",
        "this machine is taken away",
    ]


def test_other_clouds_are_refused() -> None:
    with pytest.raises(ConfigError, match="give aws or gcp"):
        cloud_named("azure")
