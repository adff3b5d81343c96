"""A Ray head of our own with its dashboard, on loopback of this machine: what a laptop reaches through a tunnel."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PATIENCE = 180.0  # seconds for Ray to come up, on a busy machine


@contextmanager
def local_head(environment: dict[str, str] | None = None, log: int | None = subprocess.DEVNULL) -> Iterator[str]:
    """The address of its dashboard; jobs find this environment's own `tuner`.

    Args:
        environment: variables that jobs have besides.
        log: where Ray says how it comes up.
    """
    programs = Path(sys.executable).parent
    port, dashboard, agent, client = free_ports(4)
    # Ray's sockets may have 107 characters, so no folder of pytest's.
    with tempfile.TemporaryDirectory(prefix="tuner-", ignore_cleanup_errors=True) as folder:
        command = [str(programs / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        # Another Ray on this machine has the usual one.
        command += [f"--dashboard-agent-listen-port={agent}"]
        variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
        head = subprocess.Popen(command, env={**os.environ, **variables, **(environment or {})}, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            until_answered(head, f"{address}/api/version")
            yield address
        finally:
            _end(head)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def until_answered(server: subprocess.Popen[bytes], url: str) -> None:
    """Wait until a server that was just started answers.

    Raises:
        RuntimeError: it has ended, or is still silent.
    """
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10):
            return
        time.sleep(0.2)
    raise RuntimeError(f"nothing came up at {url}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """Not `ray stop`, which ends every Ray on the machine."""
    family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    head.wait(timeout=PATIENCE)
    _, left = psutil.wait_procs(family, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)
