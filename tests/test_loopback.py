"""What is done for the processes of an embedded Ray when it ends; the Ray is a shell under the name of its raylet."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray

from benchmarks.local_cluster import until
from tuner import loopback
from tuner.loopback import AUTH_MODE, embedded_ray


@contextmanager
def child_of(program: Path) -> Iterator[psutil.Process]:
    """A process that lives on, below one of this name."""
    program.symlink_to("/bin/bash")
    parent = subprocess.Popen([program, "-c", "sleep 600 & wait"])
    try:
        (child,) = until(lambda: psutil.Process(parent.pid).children(), "a child")
        yield child
    finally:
        for process in psutil.Process(parent.pid).children():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        parent.kill()
        parent.wait()


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    """The worker of a Ray that has been started; it does not end with it."""
    monkeypatch.setenv(AUTH_MODE, "disabled")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda address: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with child_of(tmp_path / "raylet") as worker:
        yield worker


def test_a_worker_that_does_not_end_is_ended(
    worker: psutil.Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing else that this process has started."""
    monkeypatch.setattr(loopback, "END_SECONDS", 0.1)
    with child_of(tmp_path / "logger") as another:
        with embedded_ray():
            assert worker.is_running()
        until(lambda: not worker.is_running(), "its end")
        assert another.is_running()


@pytest.mark.timeout(60)
def test_a_worker_that_has_ended_is_not_waited_for(worker: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where nobody has asked how it ended."""
    monkeypatch.setattr(loopback, "END_SECONDS", 600.0)
    monkeypatch.setattr(ray, "shutdown", worker.kill)
    parent = worker.parent()
    assert parent is not None
    parent.suspend()
    with embedded_ray():
        pass
    assert worker.status() == psutil.STATUS_ZOMBIE
