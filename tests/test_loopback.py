"""What is done for the processes of an embedded Ray when it has ended; no Ray."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.local_cluster import until
from tuner import loopback


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
def worker(tmp_path: Path) -> Iterator[psutil.Process]:
    with child_of(tmp_path / "raylet") as worker:
        yield worker


def test_workers_are_those_below_the_raylet(worker: psutil.Process, tmp_path: Path) -> None:
    with child_of(tmp_path / "logger"):
        assert loopback._workers() == [worker]


def test_a_worker_that_does_not_end_is_ended(worker: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "END_SECONDS", 0.1)
    assert loopback._runs(worker)
    loopback._see_off([worker])
    until(lambda: not loopback._runs(worker), "its end")


def test_workers_that_have_ended_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where nobody has asked how they ended."""
    monkeypatch.setattr(loopback, "END_SECONDS", 600.0)
    ended = subprocess.Popen(["true"])
    process = psutil.Process(ended.pid)
    loopback._see_off([process])
    assert process.status() == psutil.STATUS_ZOMBIE
    ended.wait()
    loopback._see_off([process])
