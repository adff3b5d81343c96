"""What a cluster has and may have, in places for lanes: shipped cluster files, mixed nodes, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import requests
import yaml
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler._private.local.config import prepare_local

from tuner.config import read_yaml
from tuner.errors import ConfigError, StudyError
from tuner.lanes import capacity as module
from tuner.lanes.capacity import Capacity, NodeGroup, count_places, read_autoscaler, read_capacity, worker_groups
from tuner.lanes.fleet import FleetOptions, size_fleet

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD = NodeGroup(0, 0)
GPU_WORKERS = NodeGroup(4, 1, 8)
GROWS = Capacity((HEAD,), (HEAD, GPU_WORKERS))  # our cluster.yaml before anybody has asked for anything
STAYS = Capacity((NodeGroup(16, 4),))


# What the autoscaler's configuration allows


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster/gcp.yaml"])
def test_the_shipped_files_may_bring_eight_gpus(name: str) -> None:
    """Ten by their node types, of which the cluster has eight at once."""
    groups = worker_groups(read_yaml(REPOSITORY / name))
    assert groups is not None
    assert sum(group.count for group in groups) == 8
    assert {(group.cpus, group.gpus) for group in groups} == {(4, 1)}


def test_machines_by_ssh_are_not_brought_by_anybody() -> None:
    """As `ray up` completes the file for its head."""
    config, _ = prepare_local(read_yaml(REPOSITORY / "cluster/local.yaml"))
    assert worker_groups(config) is None


def test_the_largest_nodes_are_counted_first() -> None:
    """Three nodes at once, of four kinds; the head's own kind may have workers too."""
    kinds: dict[str, Any] = {
        "head": {"resources": {"CPU": 2}, "max_workers": 1},
        "small": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 5},
        "large": {"resources": {"CPU": 64, "GPU": 8}, "max_workers": 1},
        "without": {"resources": {"CPU": 96}},
    }
    config = {"max_workers": 3, "available_node_types": kinds, "head_node_type": "head"}
    assert worker_groups(config) == (NodeGroup(64, 8, 1), NodeGroup(4, 1, 2))


@pytest.mark.parametrize(("port", "groups"), [("6379", (NodeGroup(4, 1, 8),)), ("6380", None), ("6381", None)])
def test_the_file_is_that_of_this_clusters_own_monitor(
    port: str, groups: tuple[NodeGroup, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may be the head of several clusters, and each node has a `log_monitor.py` beside it."""
    scaling = f"--autoscaling-config={REPOSITORY / 'cluster.yaml'}"
    commands = [
        None,  # of a process that has just ended
        ["python", "ray/_private/log_monitor.py", "--gcs-address=10.0.0.1:6379"],
        ["python", "ray/autoscaler/v2/monitor.py", "--gcs-address=10.0.0.1:6380"],
        ["python", "ray/autoscaler/v2/monitor.py", "--gcs-address=10.0.0.1:6379", scaling],
    ]
    processes = [SimpleNamespace(info={"cmdline": command}) for command in commands]
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: processes)
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    assert read_autoscaler(port) == groups


def kubernetes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: dict[str, Any] | Exception) -> list[str]:
    """A head container of KubeRay's whose API server gives this answer; the paths it was asked for."""
    asked: list[str] = []

    def get(client: KubernetesHttpApiClient, path: str) -> dict[str, Any]:
        asked.append(f"{client._namespace}/{path}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    (tmp_path / "namespace").write_text("research\n")
    monkeypatch.setattr(module, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr(module, "_monitor_arguments", lambda port: None)
    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "tuner")
    return asked


def test_kuberay_is_asked_how_many_workers_may_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    documents = yaml.safe_load_all((REPOSITORY / "cluster/kuberay.yaml").read_text())
    cluster = next(document for document in documents if document["kind"] == "RayCluster")
    cluster["metadata"]["namespace"] = "research"
    asked = kubernetes(monkeypatch, tmp_path, cluster)
    assert read_autoscaler("6379") == (NodeGroup(4, 1, 8),)
    assert set(asked) == {"research/rayclusters/tuner"}


def test_a_cluster_that_may_not_be_read_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = kubernetes(monkeypatch, tmp_path, requests.HTTPError("403 Client Error: Forbidden"))
    with pytest.raises(StudyError, match=r"RayCluster tuner: cannot be read \(403 Client Error: Forbidden\)"):
        read_autoscaler("6379")
    assert len(asked) == 1, "and is not asked for half a minute"


def test_without_an_autoscaler_what_is_up_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0, "node:__internal_head__": 1.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"NodeID": "c", "Alive": False, "Resources": {"CPU": 8.0, "GPU": 2.0}},
    ]

    class Context:
        gcs_address = "127.0.0.1:6379"

        def get_node_id(self) -> str:
            return "a"

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(module, "_monitor_arguments", lambda port: ["monitor.py", "--gcs-address=127.0.0.1:6379"])
    assert read_capacity() == Capacity((NodeGroup(2, 0), NodeGroup(8, 2)))


# How many lanes, and how wide


def test_lanes_are_the_gpus_that_may_come() -> None:
    assert size_fleet(FleetOptions(), 100, GROWS).lanes == 8
    assert size_fleet(FleetOptions(workers=3), 100, GROWS).lanes == 2
    assert size_fleet(FleetOptions(), 100, STAYS).lanes == 4


def test_no_lane_is_asked_for_that_has_nothing_to_train() -> None:
    assert size_fleet(FleetOptions(), 3, GROWS).lanes == 3
    assert size_fleet(FleetOptions(pack=4), 9, GROWS).lanes == 3
    assert size_fleet(FleetOptions(lanes=5), 3, GROWS).lanes == 5, "unless somebody wants it"


def test_max_gpus_counts_lanes_times_workers() -> None:
    assert size_fleet(FleetOptions(max_gpus=3), 100, GROWS).lanes == 3
    assert size_fleet(FleetOptions(max_gpus=5, workers=2), 100, GROWS).lanes == 2
    assert size_fleet(FleetOptions(max_gpus=100), 100, GROWS).lanes == 8
    assert size_fleet(FleetOptions(max_gpus=4, lanes=2, workers=2), 100, GROWS).lanes == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lanes": 3, "workers": 2, "max_gpus": 5}, "lanes 3 with workers 2 need 6 GPUs, more than max_gpus 5"),
        ({"workers": 2, "max_gpus": 1}, "workers 2 need 2 GPUs, more than max_gpus 1"),
    ],
)
def test_more_than_max_gpus_is_refused_before_anything_starts(options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FleetOptions(**options)


@pytest.mark.parametrize(
    ("options", "capacity", "said"),
    [
        ({"lanes": 9}, GROWS, "need 9 GPUs; the cluster has 0 and its autoscaler may add 8$"),
        ({"lanes": 5}, STAYS, "lanes 5 with workers 1 need 5 GPUs; there are 4$"),
        ({"workers": 5}, STAYS, "lanes 1 with workers 5 need 5 GPUs; there are 4$"),
        ({"lanes": 3}, Capacity((NodeGroup(2, 0),)), "lanes 3 with workers 1 need as many CPUs; there are 2$"),
        ({}, Capacity((HEAD,), unread="no access"), r"need as many CPUs; there are 0 \(no access\)$"),
        ({}, Capacity((NodeGroup(8, 0), NodeGroup(0, 2))), "as many GPUs with a CPU on the same node; there are 0$"),
        ({"max_gpus": 1}, Capacity((NodeGroup(8, 0),)), "max_gpus 1: there are no GPUs; drop it"),
    ],
)
def test_what_can_never_be_had_is_refused(options: dict[str, int], capacity: Capacity, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        size_fleet(FleetOptions(**options), 100, capacity)


def test_a_gpu_lane_fits_on_each_kind_of_node_and_leaves_the_other_gpus_their_cpus() -> None:
    assert size_fleet(FleetOptions(lanes=1), 100, STAYS).threads == 4
    mixed = Capacity((NodeGroup(0, 0), NodeGroup(96, 0)), (NodeGroup(64, 8, 2), NodeGroup(4, 1, 8)))
    size = size_fleet(FleetOptions(), 100, mixed)
    assert (size.lanes, size.threads) == (24, 4)
    assert count_places(mixed.possible or (), size.threads, True) == 24
    # On the node that hosts it, a worker takes the share of its GPU there (`host_share`).
    assert [group.threads for group in mixed.possible or ()] == [8, 4]


def test_threads_of_a_cpu_lane_are_found_on_one_node() -> None:
    """Not in the sum over nodes; the largest number with which each worker has a place, tried one by one."""
    groups = (NodeGroup(4, 0, 3), NodeGroup(16, 0), NodeGroup(5, 0))
    for workers in range(1, 34):
        size = size_fleet(FleetOptions(lanes=workers), 100, Capacity(groups))
        each = [group.cpus for group in groups for _ in range(group.count)]
        fitting = [n for n in range(1, 17) if sum(cpus // n for cpus in each) >= workers]
        assert size.threads == max(fitting)
    assert size_fleet(FleetOptions(), 100, Capacity(groups)).threads == 16


def test_cpu_lanes_may_need_nodes_that_are_still_to_come() -> None:
    grows = Capacity((NodeGroup(2, 0),), (NodeGroup(2, 0), NodeGroup(8, 0, 4)))
    assert size_fleet(FleetOptions(), 100, grows).threads == 2
    assert size_fleet(FleetOptions(lanes=4), 100, grows).threads == 8
