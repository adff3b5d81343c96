"""Which processes an embedded Ray cannot lose; shells and sleeping processes stand for its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from types import SimpleNamespace

import psutil
import pytest
from ray._private import worker as ray_worker

from benchmarks.local_cluster import until
from tuner.ray_vitals import RayVitals

LONG = 20.0


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, psutil.Process]]:
    """A raylet with a child, and a control service."""
    raylet = subprocess.Popen(["/bin/bash", "-c", "(exec -a ray::Lane sleep 600) & wait; exec sleep 600"])
    control = subprocess.Popen(["/bin/sleep", "600"])
    servers = {"raylet": raylet, "gcs_server": control}
    processes = {name: [SimpleNamespace(process=server)] for name, server in servers.items()}
    monkeypatch.setattr(ray_worker, "_global_node", SimpleNamespace(all_processes=processes))
    child = until(lambda: next(iter(psutil.Process(raylet.pid).children()), None), "its child")
    yield {"child": child} | {name: psutil.Process(server.pid) for name, server in servers.items()}
    for process in (child, raylet, control):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    raylet.wait()
    control.wait()


@pytest.mark.parametrize("without", ["", "pidfd_open"], ids=["Linux", "elsewhere"])
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
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
        node["raylet"].kill()
        assert vitals.wait_for_end(LONG) == "raylet"
        assert time.monotonic() - started < LONG / 2


def test_what_a_raylet_has_started_is_not_vital(node: dict[str, psutil.Process]) -> None:
    """Workers die and come again, and agents come and go while Ray starts and ends."""
    with closing(RayVitals()) as vitals:
        node["child"].kill()
        assert vitals.wait_for_end(0.2) is None


def test_a_cluster_has_no_processes_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "_global_node", SimpleNamespace(all_processes={}))
    with closing(RayVitals()) as vitals:
        assert vitals.wait_for_end(0.01) is None
