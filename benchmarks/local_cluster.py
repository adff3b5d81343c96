"""A Ray cluster of several nodes on this machine: a head without CPUs, and worker nodes that can be lost one by one.

Each node has a raylet of its own, and whatever that starts; Ray tells them apart as it would machines. They share this
machine's cores, disk and clock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

LANE, COORDINATOR = "Lane", "Coordinator"  # classes of actors
PATIENCE = 120.0


class LocalCluster:
    """The nodes, by Ray's own `cluster_utils`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.nodes: list[Any] = []
        self._cluster: Any = None

    @property
    def address(self) -> str:
        """Where a driver connects."""
        address: str = self._cluster.gcs_address
        return address

    def start(self, nodes: int) -> None:
        """Bring up a head and so many worker nodes with one CPU each."""
        from ray.cluster_utils import Cluster

        # Ray starts the dashboard's other half in any case; 8265 may be another cluster's.
        head = {"num_cpus": 0, "gcs_server_port": self.port, "include_dashboard": False, "dashboard_port": free_port()}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, **self._common()})
        self.nodes = [self._cluster.add_node(num_cpus=1, **self._common()) for _ in range(nodes)]

    def _common(self) -> dict[str, Any]:
        return {"temp_dir": str(self.folder / "ray")}

    def kill_node(self, node: Any) -> None:
        """SIGKILL for everything a node runs, like a machine that is switched off."""
        self.nodes.remove(node)
        kill(_pids(node))
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """SIGKILL for the head's control service, raylet and all they run; worker nodes find out for themselves."""
        head = self._cluster.head_node
        kill(_pids(head))
        head.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    def stop(self) -> None:
        """Nothing is left of it."""
        if self._cluster:
            from ray.experimental.internal_kv import _internal_kv_reset

            # Starting a head leaves its client with whatever in this process notes its use of Ray; a client of a
            # control service that has gone ends the whole process when it is asked, a minute later.
            self._cluster.global_state.disconnect()
            _internal_kv_reset()  # type: ignore[no-untyped-call]
        for node in [*self.nodes, *([self._cluster.head_node] if self._cluster else [])]:
            pids = _pids(node)
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            kill(pids)
        self.nodes, self._cluster = [], None

    def actors(self, name: str) -> dict[int, str]:
        """Process id and node id of each actor of a class that runs."""
        table = self._cluster.global_state.actor_table(None).values()
        alive = [actor for actor in table if actor["State"] == "ALIVE" and actor["ActorClassName"] == name]
        return {actor["Pid"]: actor["Address"]["NodeID"] for actor in alive}

    def lane_node(self) -> Any:
        """The worker node that the only lane is on, None while it is on none."""
        places = set(self.actors(LANE).values())
        return next((node for node in self.nodes if node.node_id in places), None)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _pids(node: Any) -> list[int]:
    """A node's raylet and everything below it; nothing of a node that has been killed."""
    pids = []
    for raylet in node.all_processes.get("raylet", []):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(raylet.process.pid)
            pids += [process.pid, *(child.pid for child in process.children(recursive=True))]
    return pids


def kill(pids: list[int]) -> None:
    """SIGKILL for these processes, and wait until they have gone."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            processes.append(psutil.Process(pid))
            os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=PATIENCE)


def until(reached: Callable[[], object], what: str, seconds: float = PATIENCE) -> Any:
    """Ask again and again until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := reached():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


@contextmanager
def local_cluster(nodes: int) -> Iterator[LocalCluster]:
    """A cluster with so many worker nodes, and nothing left of it afterwards."""
    # Ray's sockets may have 107 characters, and its note of the latest cluster must not be everyone's.
    folder = Path(tempfile.mkdtemp(prefix="tuner-"))
    # Its nodes write their caches where `TUNER_CACHE` was when they were started.
    with patch.dict(os.environ, RAY_TMPDIR=str(folder), TUNER_CACHE=str(folder / "cache")):
        cluster = LocalCluster(folder, free_port())
        try:
            cluster.start(nodes)
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(folder, ignore_errors=True)
