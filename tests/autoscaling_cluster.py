"""A Ray cluster on this machine whose autoscaler starts and ends nodes: Ray's provider for its own tests.

Ray's `AutoscalingCluster` reads an example file that its wheel lacks, and calls `ray stop`, which ends every Ray on the
machine. Here the head runs in a folder of its own for home, and what has that home is all that is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from loopback_host import free_port, processes_of
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

PATIENCE = 500.0  # seconds for anything that the cluster does, on a busy machine
STARTS = 4
OBJECT_STORE_BYTES = 80 * 1024**2
IDLE_SECONDS = 3.0
# Everything that listens gets a port that is free, since another Ray may have the usual ones; and so the head does not
# wait for its agents, which must else start within 15 s.
PORT_OPTIONS = (
    "--port",
    "--ray-client-server-port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
UNUSED_LISTS = (*(f"{name}_commands" for name in COMMANDS), "cluster_synced_files", "rsync_exclude", "rsync_filter")
UNUSED_TABLES = ("auth", "docker", "file_mounts")
# Prints what the GCS knows, again and again. In a process of its own: Ray ends one whose GCS has gone.
WATCH = """
import json, sys, time
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(GcsClientOptions.create(sys.argv[1], None, True, False))
while True:
    nodes = {n["NodeID"]: n["Resources"].get("GPU", 0.0) for n in state.node_table() if n["Alive"]}
    alive = [actor for actor in state.actor_table(None).values() if actor["State"] == "ALIVE"]
    print(json.dumps([nodes, [(a["ActorClassName"], a["Address"]["NodeID"]) for a in alive]]), flush=True)
    time.sleep(0.1)
"""


@dataclass
class AutoscalingCluster:
    """A head without CPUs, and what its GCS told of nodes and actors ever since."""

    address: str
    watched: Path

    def past(self) -> list[tuple[dict[str, float], list[tuple[str, str]]]]:
        """GPUs of each node that was up, and class and node of each actor that ran, every tenth of a second."""
        text = self.watched.read_text()
        seen = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [(nodes, [(kind, node) for kind, node in actors]) for nodes, actors in seen]

    def until_alone(self) -> None:
        """Wait until the head is the only node."""
        deadline = time.monotonic() + PATIENCE
        seen = len(self.past())
        while not any(nodes == {FAKE_HEAD_NODE_ID: 0.0} for nodes, _ in self.past()[seen:]):
            assert time.monotonic() < deadline, self.past()[-1:]
            time.sleep(0.2)


def provider_file(address: str, worker: dict[str, Any], max_workers: int) -> dict[str, Any]:
    """The autoscaler's file, with one type of worker and the address of the head."""
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    resources = {**worker, "object_store_memory": OBJECT_STORE_BYTES}
    gpu = {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": max_workers}
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "provider": {
            # By the type that Ray has for it, it would want its example file.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head, "gpu": gpu},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 8,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        # What `ray up` would fill in; the autoscaler does not start without it.
        **{key: [] for key in UNUSED_LISTS},
        **{key: {} for key in UNUSED_TABLES},
        "file_mounts_sync_continuously": False,
    }


@contextmanager
def autoscaling_cluster(folder: Path, worker: dict[str, Any], max_workers: int) -> Iterator[AutoscalingCluster]:
    """Start a head with autoscaler v2 and up to so many workers.

    Args:
        folder: with a short path, since Ray's sockets lie below it.
        worker: resources of one worker node; GPUs are declared, nobody looks for them.
    """
    home, watched = folder / "home", folder / "watched"
    home.mkdir()
    environment = os.environ | {
        "HOME": str(home),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
    }
    with ExitStack() as stack:
        stack.callback(_end_all, home)
        address = _start_head(stack, folder, environment, worker, max_workers)
        seen = stack.enter_context(watched.open("w"))
        watching = [sys.executable, "-c", WATCH, address]
        watcher = stack.enter_context(subprocess.Popen(watching, env=environment, stdout=seen))
        # Popen waits for it when the stack unwinds.
        stack.callback(_end_all, home)
        assert _reaches(lambda: watched.stat().st_size > 0, watcher), "nobody answers at the head"
        yield AutoscalingCluster(address, watched)


def _start_head(
    stack: ExitStack, folder: Path, environment: dict[str, str], worker: dict[str, Any], max_workers: int
) -> str:
    """The address of a head that is up. Ray gives one 30 s to start, which a busy machine may not keep."""
    log = folder / "log"
    for attempt in range(STARTS):
        ports = [free_port() for _ in PORT_OPTIONS]
        address, file = f"127.0.0.1:{ports[0]}", folder / "autoscaler.yaml"
        file.write_text(yaml.safe_dump(provider_file(address, worker, max_workers)))
        command = [str(Path(sys.prefix) / "bin/ray"), "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0"]
        command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder / str(attempt)}"]
        command += [f"--autoscaling-config={file}", "--include-dashboard=false"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += [f"{option}={port}" for option, port in zip(PORT_OPTIONS, ports, strict=True)]
        out = stack.enter_context(log.open("w"))
        head = stack.enter_context(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        stack.callback(_end_all, Path(environment["HOME"]))
        if _reaches(lambda: "Ray runtime started" in log.read_text(), head):
            return address
        _end_all(Path(environment["HOME"]))
    raise AssertionError(f"the head did not come up: {log.read_text()}")


def _end_all(home: Path) -> None:
    doomed = processes_of(home)
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(doomed, timeout=PATIENCE)


def _reaches(state: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether it gets there before its process ends."""
    deadline = time.monotonic() + PATIENCE
    while not state():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
