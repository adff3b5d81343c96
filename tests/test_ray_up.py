"""`ray up` for real: cluster/local.yaml over ssh to a machine made of this one, searches on it, `ray down`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import Tiny
from loopback_host import LoopbackHost, free_port, loopback_host

from tuner.service.cluster_files.check import check_cluster_file

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = "far"
TRIALS = 2
LIMIT = 400.0  # seconds for one command of Ray's, on a busy machine

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(800)]


@dataclass
class Laptop:
    """Where the commands are typed: another home than the cluster's, the same token."""

    host: LoopbackHost
    file: Path
    dashboard_port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def token(self) -> str:
        return (self.host.folder / "laptop/.ray/auth_token").read_text()

    def run(self, program: str, *arguments: object) -> str:
        """Run `ray` or `tuner` in the repository's folder; what it printed."""
        command = [str(Path(sys.prefix) / "bin" / program), *map(str, arguments)]
        environment = os.environ | {
            "HOME": str(self.host.folder / "laptop"),
            "RAY_TMPDIR": str(self.host.folder / "l"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    """A cluster that is up; whatever the tests did, `ray down` must leave nothing."""
    # pytest's own folders are too deep: Ray's sockets may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="tuner-") as name, loopback_host(Path(name)) as host:
        for folder in ("laptop", "l", "r"):
            (host.folder / folder).mkdir()
        laptop = Laptop(host, host.folder / "local.yaml", free_port())
        laptop.file.write_text(yaml.safe_dump(filled(laptop), sort_keys=False))
        assert check_cluster_file(laptop.file) == []
        laptop.run("ray", "get-auth-token", "--generate")
        laptop.run("ray", "up", "--yes", laptop.file)
        yield laptop
        assert host.processes()
        laptop.run("ray", "down", "--yes", laptop.file)
        _, left = psutil.wait_procs(host.processes(), timeout=20)
        assert left == []


def filled(laptop: Laptop) -> dict[str, Any]:
    """The shipped file with this machine's names; ports of its own, since another Ray may hold the usual ones."""
    text = (REPOSITORY / "cluster/local.yaml").read_text()
    text = text.replace("6379", str(free_port()))
    ports = f"--dashboard-port={laptop.dashboard_port} --dashboard-agent-listen-port={free_port()}"
    text = text.replace("--dashboard-host=127.0.0.1", f"--dashboard-host=127.0.0.1 {ports}")
    values: dict[str, Any] = yaml.safe_load(text)
    values["cluster_name"] = laptop.host.folder.name
    values["provider"]["head_ip"] = "127.0.0.1"
    proxy = f"{laptop.host.proxy} %h"
    values["auth"] = {"ssh_user": laptop.host.user, "ssh_private_key": str(laptop.host.key), "ssh_proxy_command": proxy}
    return values


def test_what_is_up_is_what_the_file_says(laptop: Laptop) -> None:
    """The project and the token are there; the dashboard is for loopback, and for those who have the token."""
    home = laptop.host.home
    assert (home / ".ray/auth_token").read_text() == laptop.token
    assert (home / "tuner/pyproject.toml").read_bytes() == (REPOSITORY / "pyproject.toml").read_bytes()
    assert dashboard_answers(laptop.dashboard_port, None) == 401
    assert dashboard_answers(laptop.dashboard_port, laptop.token) == 200
    assert listening_addresses(laptop.dashboard_port) == {"127.0.0.1"}
    assert "Active" in laptop.run("ray", "exec", laptop.file, "ray status")


def test_a_search_is_submitted_followed_and_remembered(laptop: Laptop, tiny: Tiny) -> None:
    runs = laptop.host.folder / "runs"
    options = ["--data", tiny.store_folder, "--batch-size", 12, "--epochs", 1, "--precision", "fp32"]
    given = [*options, "--trials", TRIALS, "--study", STUDY, "--runs", runs, "--json"]
    said = laptop.run("tuner", "search", "--address", laptop.address, *given)
    front = json.loads((runs / STUDY / "front.json").read_text())
    assert front["study"] == STUDY
    assert {point["trial"] for point in front["points"]} <= {f"t{number:04d}" for number in range(TRIALS)}
    assert any(point["on_front"] for point in front["points"])
    assert said.count('"event": "epoch_done"') == TRIALS
    assert "on the front; report: " in said

    listed = laptop.run("tuner", "studies", "--address", laptop.address).splitlines()
    assert listed[1].split()[:4] == [STUDY, "attention_only", laptop.host.user, "succeeded"]
    assert listed[1].endswith(tiny.encoder.source)
    status = laptop.run("tuner", "status", STUDY, "--address", laptop.address)
    assert f"{TRIALS} of {TRIALS} trials: {TRIALS} complete" in status
    again = laptop.run("tuner", "logs", STUDY, "--address", laptop.address, "--json")
    assert again.count('"event": "epoch_done"') == TRIALS

    page, adapters = laptop.host.folder / "laptop/page.html", laptop.host.folder / "laptop/adapters"
    laptop.run("tuner", "report", STUDY, "--address", laptop.address, "--out", page)
    assert "Points to choose from" in page.read_text()
    laptop.run("tuner", "export", STUDY, "--address", laptop.address, "--out", adapters)
    points = [point["trial"] for point in front["points"] if point["on_front"]]
    assert [(adapters / trial / "card.json").read_bytes() for trial in points] == [
        (runs / STUDY / "adapters" / trial / "card.json").read_bytes() for trial in points
    ]


def dashboard_answers(port: int, token: str | None) -> int:
    """The HTTP status of the jobs API, asked with or without the token."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def listening_addresses(port: int) -> set[str]:
    """On which addresses of this machine somebody listens on this port."""
    listening = [s.laddr for s in psutil.net_connections(kind="tcp") if s.status == psutil.CONN_LISTEN]
    return {address.ip for address in listening if address and address.port == port}
