"""What a Ray cluster has and what its autoscaler may add, in places for workers.

Ray publishes the second on hosted platforms alone (`ClusterConfig` in its GCS; nothing in Ray itself writes it). So
what the autoscaler itself reads is read here: the file that the monitor on the head was started with, or the RayCluster
object of KubeRay. Autoscaler v1 and v2 read the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from tuner.config import read_yaml
from tuner.errors import StudyError, TunerError

HEAD_RESOURCE = "node:__internal_head__"
# A fraction of the head node's own resource: keeps drivers, coordinator and trial clients off nodes that may go away.
HEAD_NODE = {HEAD_RESOURCE: 0.001}
# Kubernetes tells every pod where it lives; older operators do not set RAY_CLUSTER_NAMESPACE for the head's container.
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Ray bounds all workers so where a file does not.
MAX_WORKERS = 2


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that are alike: CPUs and GPUs of each, as Ray counts them, and how many there are or may be."""

    cpus: int
    gpus: int
    count: int = 1

    @property
    def threads(self) -> int:
        """CPUs that are the fair share of one GPU's worker here; at least one."""
        return max(1, self.cpus // max(1, self.gpus))

    def places(self, threads: int, use_gpu: bool) -> int:
        """How many workers with that many CPUs (and a GPU each) fit on all these nodes."""
        each = self.cpus // threads
        return self.count * (min(each, self.gpus) if use_gpu else each)


@dataclass(frozen=True)
class Capacity:
    """Nodes that are up, and those that could be up at once; None: there is no autoscaler that brings any.

    `unread` says why the autoscaler's configuration cannot be read.
    """

    present: tuple[NodeGroup, ...]
    possible: tuple[NodeGroup, ...] | None = None
    unread: str | None = None

    @property
    def gpus(self) -> int:
        """GPUs that can be up at once."""
        return max(count_gpus(self.present), count_gpus(self.possible or ()))

    @property
    def cpus(self) -> int:
        """CPUs that can be up at once."""
        return max(count_cpus(self.present), count_cpus(self.possible or ()))

    def places(self, use_gpu: bool) -> int:
        """How many workers fit at once, each with one CPU or more, on one node each."""
        return max(count_places(groups, 1, use_gpu) for groups in (self.present, self.possible or ()))

    def threads(self, workers: int, use_gpu: bool) -> int:
        """CPUs to reserve for each of so many workers, one number for all since Ray may put a worker on any node.

        With a GPU: the smallest share of a GPU among the nodes that have one, so that a worker fits on each of them and
        leaves the GPUs beside it their own. Without: the most that lets all of them find a place.
        """
        if use_gpu:
            hosts = [group for group in (*self.present, *(self.possible or ())) if group.gpus and group.cpus]
            return min(group.threads for group in hosts)
        groups = self.present if count_places(self.present, 1, False) >= workers else self.possible or ()
        most = max(group.cpus for group in groups)
        return next(n for n in range(most, 0, -1) if count_places(groups, n, False) >= workers)


def count_gpus(groups: Iterable[NodeGroup]) -> int:
    """GPUs of all these nodes."""
    return sum(group.gpus * group.count for group in groups)


def count_cpus(groups: Iterable[NodeGroup]) -> int:
    """CPUs of all these nodes."""
    return sum(group.cpus * group.count for group in groups)


def count_places(groups: Iterable[NodeGroup], threads: int, use_gpu: bool) -> int:
    """How many workers with that many CPUs (and a GPU each) fit on all these nodes."""
    return sum(group.places(threads, use_gpu) for group in groups)


def read_capacity() -> Capacity:
    """Ask the cluster that is connected, and its autoscaler where it has one."""
    nodes = present_nodes()
    gcs_port = str(ray.get_runtime_context().gcs_address).rpartition(":")[2]
    try:
        found = _on_head(read_autoscaler, nodes, gcs_port)
    except TunerError as error:
        # Ray wraps what another process raised into its traceback.
        return Capacity(_groups(nodes.values()), unread=str(getattr(error, "cause", error)))
    if found is None:
        return Capacity(_groups(nodes.values()))
    heads = _groups(resources for resources in nodes.values() if HEAD_RESOURCE in resources)
    return Capacity(_groups(nodes.values()), (*heads, *found))


def present_nodes() -> dict[str, Mapping[str, float]]:
    """Resources of each node that is up, by node id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def node_group(resources: Mapping[str, float]) -> NodeGroup:
    """One node, from what Ray says of it."""
    return NodeGroup(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _groups(nodes: Iterable[Mapping[str, float]]) -> tuple[NodeGroup, ...]:
    return tuple(map(node_group, nodes))


def _on_head(function: Any, nodes: Mapping[str, Mapping[str, float]], *arguments: Any) -> Any:
    """Call a function where the head's files and processes are."""
    if HEAD_RESOURCE in nodes[ray.get_runtime_context().get_node_id()]:
        return function(*arguments)
    return ray.get(ray.remote(num_cpus=0, resources=HEAD_NODE)(function).remote(*arguments))


def read_autoscaler(gcs_port: str) -> tuple[NodeGroup, ...] | None:
    """Workers that the autoscaler of this machine's Ray head may keep up at once; None where it brings none.

    Args:
        gcs_port: of the cluster, since a machine may be the head of several.

    Raises:
        ConfigError, StudyError: there is an autoscaler, and its configuration cannot be read.
    """
    monitor = _monitor_arguments(gcs_port)
    flag = "--autoscaling-config="
    if monitor is not None:
        files = [argument.removeprefix(flag) for argument in monitor if argument.startswith(flag)]
        return worker_groups(read_yaml(Path(files[0]).expanduser())) if files else None
    # Without a monitor of the head's own, the autoscaler runs in a container beside it.
    name = os.environ.get("RAY_CLUSTER_NAME")
    return worker_groups(_kuberay_config(name)) if name else None


def _monitor_arguments(gcs_port: str) -> list[str] | None:
    for process in psutil.process_iter(["cmdline"]):
        arguments: list[str] = process.info["cmdline"] or []
        # Not log_monitor.py, which each node has.
        if any(Path(argument).name == "monitor.py" for argument in arguments) and any(
            argument.startswith("--gcs-address=") and argument.endswith(f":{gcs_port}") for argument in arguments
        ):
            return arguments
    return None


def _kuberay_config(name: str) -> Mapping[str, Any]:
    import requests
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        # Asked once before: the producer tries for 20 s and writes a traceback each time.
        KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
        producer: Any = AutoscalingConfigProducer
        config: Mapping[str, Any] = producer(name, namespace)()
        return config
    except (OSError, requests.RequestException) as error:
        raise StudyError(f"RayCluster {name}: cannot be read ({' '.join(str(error).split())})") from None


def worker_groups(config: Mapping[str, Any]) -> tuple[NodeGroup, ...] | None:
    """The most worker nodes that an autoscaler's configuration allows at once; None where they are not described.

    The file's `max_workers` bounds all types together: those with most GPUs, then most CPUs, are counted first.
    """
    left = int(config.get("max_workers", MAX_WORKERS))
    groups = []
    for name, kind in config["available_node_types"].items():
        count = kind.get("max_workers", 0 if name == config.get("head_node_type") else left)
        resources = kind.get("resources") or {}
        groups.append(replace(node_group(resources), count=count))
    kept = []
    for group in sorted(groups, key=lambda group: (group.gpus, group.cpus), reverse=True):
        count = min(group.count, left)
        if group.cpus and count > 0:
            kept.append(replace(group, count=count))
            left -= count
    # Machines by ssh have no resources in their file: what is up is what there is.
    return tuple(kept) or None
