"""Whole searches on a cluster that starts with a head alone: machines come for them and go when they are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from autoscaling_cluster import PATIENCE, AutoscalingCluster, autoscaling_cluster
from conftest import Tiny
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

pytestmark = pytest.mark.timeout(1500)

MAX_NODES = 2
# Of a trial that is to be under way still when a second machine comes some seconds after the first.
EPOCHS = 60
TRAINS = "Lane"
# What must outlive a machine that goes: with a trial's client or a lane's controller, its study would lose time.
STAYS = {"Coordinator", "TrialClient", "TrainController"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[AutoscalingCluster]:
    """Up to two workers with a GPU each that is none: torch finds no driver and trains on the CPU."""
    # pytest's own folders are too deep: Ray's sockets may have 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="tuner-") as folder,
        autoscaling_cluster(Path(folder), {"CPU": 1, "GPU": 1}, MAX_NODES) as cluster,
    ):
        yield cluster


@dataclass
class Search:
    """A `tuner search` on the cluster, its events in a file."""

    process: subprocess.Popen[bytes]
    folder: Path
    study: str

    @property
    def events(self) -> list[dict[str, Any]]:
        text = (self.folder / f"{self.study}.out").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]

    @property
    def messages(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "message"]

    @property
    def epochs(self) -> list[tuple[str, int]]:
        return [(event["trial"], event["epoch"]) for event in self.events if event["event"] == "epoch_done"]

    def running(self) -> bool:
        return self.process.poll() is None

    def check(self) -> None:
        """It has ended, with a front."""
        assert self.process.wait(PATIENCE) == 0, (self.folder / f"{self.study}.err").read_text()[-3000:]
        assert json.loads((self.folder / "runs" / self.study / "front.json").read_text())["points"]


@contextmanager
def search(cluster: AutoscalingCluster, tiny: Tiny, folder: Path, study: str, *options: object) -> Iterator[Search]:
    given = ["--data", tiny.store_folder, "--batch-size", 12, "--precision", "fp32", "--runs", folder / "runs"]
    given += ["--address", cluster.address, "--study", study, "--json", *options]
    command = [sys.executable, "-c", "from tuner.cli import main; main()", "search", *map(str, given)]
    environment = os.environ | {"TUNER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with (folder / f"{study}.out").open("w") as out, (folder / f"{study}.err").open("w") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, cwd=folder)
    try:
        yield Search(process, folder, study)
    finally:
        process.kill()
        process.wait()


def test_machines_come_for_a_search_and_go_when_it_has_no_work_for_them(
    cluster: AutoscalingCluster, tiny: Tiny, tmp_path: Path
) -> None:
    assert cluster.past()[-1] == ({FAKE_HEAD_NODE_ID: 0.0}, [])
    with search(cluster, tiny, tmp_path, "grown", "--trials", 4, "--epochs", EPOCHS) as grown:
        grown.check()
    cluster.until_alone()
    past = cluster.past()
    assert max(sum(nodes.values()) for nodes, _ in past) == MAX_NODES
    waited = "waiting for a GPU: 0 of 2 lanes are up; the cluster has 0 GPUs, the autoscaler may add 2"
    arrivals = [text for text in grown.messages if "lanes are up" in text]
    assert arrivals[0] == waited
    assert arrivals[-1] == "2 of 2 lanes are up"
    assert any("torch sees no GPU" in text for text in grown.messages) == (not torch.cuda.is_available())

    actors = {actor for _, actors in past for actor in actors}
    nodes = {kind: {node for actor, node in actors if actor == kind} for kind, _ in actors}
    assert len(nodes.pop(TRAINS)) == MAX_NODES
    # Ray Train puts its watcher for preemptions anywhere; nothing is lost with one.
    nodes.pop("PreemptionWatcher", None)
    assert nodes.keys() >= STAYS
    assert set().union(*nodes.values()) == {FAKE_HEAD_NODE_ID}

    assert all(line.startswith("{") for line in (tmp_path / "grown.out").read_text().splitlines()), "nothing of Ray's"
    assert len(grown.epochs) == 4 * EPOCHS
    assert lanes_that_trained(grown.epochs) == MAX_NODES


def lanes_that_trained(epochs: list[tuple[str, int]]) -> int:
    """How many trials were under way at the same time; a lane without packs has one."""
    under_way: set[str] = set()
    most = 0
    for trial, epoch in epochs:
        under_way.add(trial)
        most = max(most, len(under_way))
        if epoch == EPOCHS:
            under_way.remove(trial)
    return most


def test_two_searches_that_take_one_gpu_each_train_at_the_same_time(
    cluster: AutoscalingCluster, tiny: Tiny, tmp_path: Path
) -> None:
    """Without `--max-gpus` the first would take both machines, and the second would wait for it to end."""
    with ExitStack() as stack:
        options = ("--trials", 2, "--epochs", EPOCHS, "--max-gpus", 1)
        both = [stack.enter_context(search(cluster, tiny, tmp_path, name, *options)) for name in ("left", "right")]
        deadline = time.monotonic() + PATIENCE
        while not all(one.epochs for one in both):
            assert time.monotonic() < deadline, [one.messages for one in both]
            assert all(one.running() for one in both)
            time.sleep(0.1)
        for one in both:
            one.check()
            assert len(one.epochs) == 2 * EPOCHS


def test_more_gpus_than_may_ever_come_are_refused(cluster: AutoscalingCluster, tiny: Tiny, tmp_path: Path) -> None:
    with search(cluster, tiny, tmp_path, "huge", "--trials", 2, "--lanes", 3) as huge:
        assert huge.process.wait(PATIENCE) == 2
    said = (tmp_path / "huge.err").read_text().strip().splitlines()[-1]
    assert "--lanes 3 with --workers 1 need 3 GPUs; the cluster has" in said
    assert not (tmp_path / "runs" / "huge").exists()
