"""Processes that an embedded Ray has left running: found by the log files that they hold open, and ended.

The kernel ends Ray's servers with their driver. What the raylet has started must find out by itself, and its agents
take up to two minutes for it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

# While one of these runs, so does its Ray.
SERVERS = ("raylet", "gcs_server")
# How the processes below a raylet and below a dashboard name themselves; somebody else may read the same log.
TITLES = ("ray::", "ray-dashboard")
# A session's folder: session_<date>_<time>_<microseconds>_<process id of the driver>
SESSION = "session_"


def end_leftovers(folder: Path) -> None:
    """End what is left of sessions whose driver and servers have ended: a driver that was killed cleans up nothing.

    Args:
        folder: where Ray keeps the sessions of this program and user, and of nobody else.
    """
    _end(folder, lambda driver, servers: not servers and not _driver_lives(driver))


def end_own(folder: Path) -> None:
    """End all that is left of the sessions of this process, their servers included."""
    us = os.getpid()
    _end(folder, lambda driver, servers: driver == us and all(server.ppid() == us for server in servers))


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended; a container's first process may be one that never looks after its orphans."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end(folder: Path, chosen: Callable[[int, list[psutil.Process]], bool]) -> None:
    for session, processes in _sessions(folder.resolve()).items():
        driver = session.rpartition("_")[2]
        with suppress(psutil.Error):
            servers = [process for process in processes if process.name() in SERVERS]
            if driver.isdecimal() and chosen(int(driver), servers):
                _kill(processes)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _sessions(folder: Path) -> dict[str, list[psutil.Process]]:
    """Ray's processes of this user by the name of their session below the folder."""
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if _is_rays(process) and process.uids().real == os.getuid():
                for name in {_session(Path(file.path), folder) for file in process.open_files()} - {None}:
                    found[str(name)].append(process)
    return found


def _is_rays(process: psutil.Process) -> bool:
    title = "".join(process.cmdline()[:1])
    return lives(process) and (process.name() in SERVERS or title.startswith(TITLES))


def _session(file: Path, folder: Path) -> str | None:
    """Name of the session below the folder that a file belongs to."""
    name = file.relative_to(folder).parts[0] if file.is_relative_to(folder) else ""
    return name if name.startswith(SESSION) else None


def _driver_lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return lives(psutil.Process(pid))
    return False
