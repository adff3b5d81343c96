"""Which processes of an embedded Ray are ended: sleeping ones that bear its names and hold its log files open."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import ray

from benchmarks.local_cluster import until
from tuner import loopback
from tuner.leftovers import end_leftovers, end_own
from tuner.loopback import AUTH_MODE, FOLDER_VARIABLE, abandon_ray, embedded_ray

Start = Callable[..., subprocess.Popen[bytes]]
AGENT = "ray::DashboardAgent"


@pytest.fixture
def dead() -> int:
    """The process id of a driver that has ended."""
    driver = subprocess.Popen(["/bin/true"])
    driver.wait()
    return driver.pid


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process under a title, with a log file of a driver's session open."""
    with ExitStack() as started:

        def start(title: str, driver: int, folder: Path = tmp_path) -> subprocess.Popen[bytes]:
            logs = folder / f"session_2026-01-01_00-00-00_000000_{driver}" / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            # Named as its file, as the kernel has it, and titled as its first argument.
            program = tmp_path / title.replace(":", "")
            if not program.exists():
                program.symlink_to("/bin/sleep")
            with (logs / f"{title}.out").open("wb") as log:
                process = subprocess.Popen([title, "600"], executable=program, stdout=log)
            started.callback(process.wait)
            started.callback(process.kill)
            until(lambda: psutil.Process(process.pid).cmdline()[:1] == [title], "its title")
            return process

        yield start


def ended(*processes: subprocess.Popen[bytes]) -> list[bool]:
    """Which of them have ended, after time for the kernel to end them all."""
    for process in processes:
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    return [process.poll() is not None for process in processes]


def test_what_a_killed_driver_has_left_is_ended(start: Start, dead: int, tmp_path: Path) -> None:
    left = [start(title, dead) for title in (AGENT, "ray::Lane", "ray-dashboard-StateHead-0")]
    end_leftovers(tmp_path)
    assert ended(*left) == [True, True, True]


def test_a_ray_that_runs_keeps_all_its_processes(start: Start, dead: int, tmp_path: Path) -> None:
    """Its driver lives; or a server does, though no driver can be seen: it may be in another container."""
    kept = [start(AGENT, os.getpid()), start(AGENT, dead), start("raylet", dead)]
    end_leftovers(tmp_path)
    assert ended(*kept) == [False, False, False]


def test_a_driver_that_nobody_has_buried_is_dead(start: Start, tmp_path: Path) -> None:
    driver = subprocess.Popen(["/bin/true"])
    until(lambda: psutil.Process(driver.pid).status() == psutil.STATUS_ZOMBIE, "its end")
    agent = start(AGENT, driver.pid)
    end_leftovers(tmp_path)
    assert ended(agent) == [True]
    driver.wait()


def test_processes_of_other_programs_and_folders_are_left_alone(start: Start, dead: int, tmp_path: Path) -> None:
    """Somebody reads the log of a dead Ray, and another Ray of this user has ended."""
    kept = [start("tail", dead), start(AGENT, dead, tmp_path / "elsewhere")]
    end_leftovers(tmp_path / "ours")
    end_leftovers(tmp_path)
    assert ended(*kept) == [False, False]


def test_a_process_ends_its_own_ray_whole(start: Start, dead: int, tmp_path: Path) -> None:
    ours = [start(title, os.getpid()) for title in (AGENT, "gcs_server")]
    kept = start(AGENT, dead)
    end_own(tmp_path)
    assert ended(*ours, kept) == [True, True, False]


def test_servers_that_another_process_has_started_are_not_our_own(tmp_path: Path) -> None:
    """A driver in a container may have our process id there."""
    logs = tmp_path / f"session_2026-01-01_00-00-00_000000_{os.getpid()}" / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "raylet").symlink_to("/bin/sleep")
    with (logs / "raylet.out").open("wb") as log:
        shell = subprocess.Popen(["/bin/bash", "-c", f"{tmp_path / 'raylet'} 600 & wait"], stdout=log)
    (raylet,) = until(lambda: [p for p in psutil.Process(shell.pid).children() if p.name() == "raylet"], "a raylet")
    end_own(tmp_path)
    assert raylet.is_running() and raylet.status() != psutil.STATUS_ZOMBIE
    raylet.kill()
    shell.wait()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Starts nothing, in a folder of its own."""
    monkeypatch.setenv(AUTH_MODE, "disabled")
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(loopback, "_private_folder", lambda: tmp_path)
    monkeypatch.setattr(ray, "init", lambda address, **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("no_ray")
def test_the_next_embedded_ray_ends_what_the_last_one_left(start: Start, dead: int, tmp_path: Path) -> None:
    left = start(AGENT, dead, tmp_path / "ray")
    with embedded_ray():
        assert ended(left) == [True]


@pytest.mark.usefixtures("no_ray")
def test_a_folder_that_other_rays_may_use_is_not_looked_through(
    start: Start, dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    left = start(AGENT, dead, tmp_path / "ray")
    with embedded_ray():
        assert ended(left) == [False]


@pytest.mark.usefixtures("no_ray")
def test_nothing_is_left_of_a_start_that_failed_after_its_servers(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own shutdown has ended the raylet; its agents are nobody's children then."""
    left: list[subprocess.Popen[bytes]] = []

    def init(address: str, **options: object) -> None:
        left.append(start(AGENT, os.getpid(), tmp_path / "ray"))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt), embedded_ray():
        pass
    assert ended(*left) == [True]


@pytest.mark.usefixtures("no_ray")
def test_a_ray_that_cannot_go_on_is_abandoned(start: Start, tmp_path: Path) -> None:
    left = [start(title, os.getpid(), tmp_path / "ray") for title in ("gcs_server", AGENT)]
    abandon_ray()
    assert ended(*left) == [True, True]
