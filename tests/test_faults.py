"""One search on a cluster of three nodes that loses its coordinator, a node by surprise and a node with notice.

The cluster is real, on this machine: a head without CPUs and worker nodes with a raylet each. Faults come one after
another into one search, since starting Ray is what takes time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Tiny
from searches import Driver, Runs, epochs_of
from test_pack_faults import BROKEN_CLIP, poisoned_store

from benchmarks.local_cluster import COORDINATOR, LANE, LocalCluster, kill, local_cluster, until
from tuner.study.events import EpochDone

pytestmark = pytest.mark.timeout(900)

TRIALS = 4
EPOCHS = 20
CAUGHT = 3  # the epoch after which a trial is disturbed
# Ray Train's actor that looks for notices. It is up some seconds after the workers, and the rest of a trial takes less
# than one: the worker is held until the watcher, which cannot be asked, has looked.
WATCHER = "PreemptionWatcher"
LOOK_SECONDS = 1.0
NOTICE_SECONDS = 600  # longer than the test: who waits for the node's end, waits too long


@dataclass
class Faulty:
    runs: Runs
    # What the journal had of the disturbed trial when the fault came, by fault.
    before: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # The lane's node before and after, by fault.
    nodes: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Names of the prefix caches that the nodes have kept.
    prefixes: list[str] = field(default_factory=list)


DISTURBED = {"coordinator killed": "t0001", "node killed": "t0002", "node drained": "t0003"}


@pytest.fixture(scope="module")
def faulty(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    runs = Runs(tmp_path_factory.mktemp("faults"), tiny)
    result = Faulty(runs)
    with local_cluster(nodes=3) as cluster, pytest.MonkeyPatch.context() as patch:
        # Trials of the tiny store end sooner than Ray Train's watcher would look for notices.
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.1")
        options = runs.new("--trials", TRIALS, "--epochs", EPOCHS, "--lanes", 1, "--address", cluster.address)
        with runs.driver(*options) as driver:
            for fault, trial in DISTURBED.items():
                disturb(cluster, driver, fault, trial, result)
            ended = driver.wait()
        assert ended.code == 0, ended
        result.prefixes = [path.name for path in (cluster.folder / "cache" / "prefix").iterdir()]
        yield result


def disturb(cluster: LocalCluster, driver: Driver, fault: str, trial: str, result: Faulty) -> None:
    """Wait until a trial has some epochs, do it, and see the trial go on."""
    driver.until(lambda epochs: (trial, CAUGHT) in epochs)
    node = cluster.lane_node()
    (lane,) = cluster.actors(LANE)
    if fault == "coordinator killed":
        kill(list(cluster.actors(COORDINATOR)))
    elif fault == "node killed":
        cluster.kill_node(node)
    else:
        # The trial must not end before the notice has been given.
        worker = psutil.Process(lane)
        worker.suspend()
        drain(cluster, node.node_id)
        until(lambda: cluster.actors(WATCHER), "the watcher of the lane's new workers")
        time.sleep(LOOK_SECONDS)
        worker.resume()
    result.before[fault] = [e for e in result.runs.journal() if e["event"] == "epoch_done" and e["trial"] == trial]
    seen = result.before[fault][-1]["epoch"]
    if fault != "coordinator killed":
        until(lambda: has_moved(cluster, driver, node.node_id), f"{fault}: a lane elsewhere")
    driver.until(lambda epochs: (trial, min(seen + 2, EPOCHS)) in epochs)
    result.nodes[fault] = (node.node_id, cluster.lane_node().node_id)


def has_moved(cluster: LocalCluster, driver: Driver, node: str) -> bool:
    assert driver.process.poll() is None, "the search ended before its lane was elsewhere"
    now = cluster.lane_node()
    return now is not None and now.node_id != node


def drain(cluster: LocalCluster, node: str) -> None:
    """What the watcher of a spot machine does at its notice."""
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(NOTICE_SECONDS)], check=True, capture_output=True)


def test_no_trial_is_lost(faulty: Faulty) -> None:
    assert faulty.runs.states() == {f"t{number:04d}": "complete" for number in range(TRIALS)}
    assert {point["trial"] for point in faulty.runs.front()["points"]} >= {"t0000", "t0001"}


def test_every_epoch_is_told_once(faulty: Faulty) -> None:
    counted = Counter(epochs_of(faulty.runs.journal()))
    assert counted == {(f"t{number:04d}", epoch): 1 for number in range(TRIALS) for epoch in range(1, EPOCHS + 1)}


@pytest.mark.parametrize("fault", DISTURBED)
def test_a_disturbed_trial_goes_on_from_its_last_epoch(faulty: Faulty, fault: str) -> None:
    """Its checkpoint has what was reported before, training times included; measured again, they would differ."""
    trial, before = DISTURBED[fault], faulty.before[fault]
    assert CAUGHT <= len(before) < EPOCHS, "it was disturbed in the middle"
    history = torch.load(faulty.runs.study / "checkpoints" / f"{trial}.pt", weights_only=True)["history"]
    for event in before:
        assert EpochDone.from_row(trial, history[event["epoch"] - 1]) == EpochDone.model_validate(event)


@pytest.mark.parametrize("fault", ["node killed", "node drained"])
def test_the_lane_moves_to_another_node(faulty: Faulty, fault: str) -> None:
    before, after = faulty.nodes[fault]
    assert before != after


def test_a_coordinator_that_was_killed_costs_no_worker(faulty: Faulty) -> None:
    before, after = faulty.nodes["coordinator killed"]
    assert before == after


def test_nodes_cache_where_they_say_themselves(faulty: Faulty) -> None:
    """The driver's own place for caches need not be there on a node."""
    assert faulty.prefixes
    assert not (faulty.runs.folder / "cache" / "prefix").exists()


def test_a_clip_that_ends_every_trial_is_in_the_last_sentence(tiny: Tiny, tmp_path: Path) -> None:
    """And in the table, with each trial; no lane dies of it."""
    poisoned_store(tiny, tmp_path / "store", BROKEN_CLIP)
    runs = Runs(tmp_path, replace(tiny, store_folder=tmp_path / "store"))
    with runs.driver(*runs.new("--trials", 2, "--epochs", 1)) as driver:
        ended = driver.wait()
    assert ended.code == 2, ended
    (sentence,) = [line for line in ended.err.splitlines() if line.startswith("tuner: ")]
    clip = f"the features of clip clip-{BROKEN_CLIP} ({BROKEN_CLIP}.wav, row {BROKEN_CLIP} of "
    assert f"all 2 trials failed, each because {clip}" in sentence
    rows = pq.read_table(runs.study / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["failed", "failed"]
    assert all(row["reason"].startswith(clip) for row in rows)
