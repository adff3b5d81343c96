"""Which processes an embedded Ray cannot lose; shells and sleeping processes stand for its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray._private import worker as ray_worker

from benchmarks.local_cluster import until
from tuner.ray_vitals import RayVitals

# By what each is called in the sentence: its title, or its command line before it has one.
TITLES = {
    "dashboard agent": "exec -a ray::DashboardAgent sleep 600",
    "runtime environment agent": "exec -a /x/ray/_private/runtime_env/agent/main.py sleep 600",
    "": "exec -a ray::Lane sleep 600",
}
LONG = 20.0


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, psutil.Process]]:
    """A raylet with three children, and a control service."""
    script = "".join(f"({command}) & " for command in TITLES.values()) + "wait"
    raylet, control = subprocess.Popen(["/bin/bash", "-c", script]), subprocess.Popen(["/bin/sleep", "600"])
    servers = {"raylet": raylet, "gcs_server": control}
    processes = {name: [SimpleNamespace(process=server)] for name, server in servers.items()}
    monkeypatch.setattr(ray_worker, "_global_node", SimpleNamespace(all_processes=processes))

    def children() -> dict[str, psutil.Process]:
        named = {command.split()[2]: name for name, command in TITLES.items()}
        found = psutil.Process(raylet.pid).children()
        return {named[child.cmdline()[0]]: child for child in found if child.cmdline()[0] in named}

    below = until(lambda: found if len(found := children()) == len(TITLES) else None, "its children")
    yield below | {name: psutil.Process(server.pid) for name, server in servers.items()}
    for process in [*below.values(), raylet, control]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    raylet.wait()
    control.wait()


@pytest.mark.parametrize("without", ["", "pidfd_open"], ids=["Linux", "elsewhere"])
@pytest.mark.parametrize("name", ["raylet", "gcs_server", "dashboard agent", "runtime environment agent"])
def test_the_end_of_a_vital_process_is_noticed(
    node: dict[str, psutil.Process], name: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        monkeypatch.delattr(os, without)
    with closing(RayVitals()) as vitals:
        assert vitals.wait_for_end(0.05) is None
        node[name].kill()
        assert until(lambda: vitals.wait_for_end(0.05), "its end") == name


def test_the_kernel_wakes_who_waits(node: dict[str, psutil.Process]) -> None:
    with closing(RayVitals()) as vitals:
        started = time.monotonic()
        node["dashboard agent"].kill()
        assert vitals.wait_for_end(LONG) == "dashboard agent"
        assert time.monotonic() - started < LONG / 2


def test_a_worker_is_not_vital(node: dict[str, psutil.Process]) -> None:
    with closing(RayVitals()) as vitals:
        node[""].kill()
        assert vitals.wait_for_end(0.2) is None


def test_a_cluster_has_no_processes_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "_global_node", SimpleNamespace(all_processes={}))
    with closing(RayVitals()) as vitals:
        assert vitals.wait_for_end(0.01) is None
