"""What a search says while its lanes wait for machines: a coordinator that answers at once, no Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tuner.lanes import fleet as fleet_module
from tuner.lanes.capacity import Capacity, NodeGroup
from tuner.lanes.fleet import Fleet, FleetSize
from tuner.lanes.messages import Muster
from tuner.search import lane_watch as module
from tuner.search.lane_watch import LOOK_SECONDS, START_SECONDS, LaneWatch
from tuner.study.events import View

HEAD = NodeGroup(0, 0)


class Scene:
    """Lanes that come up when told to, a clock that runs when told to, and what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capacity: Capacity, lanes: int, pack: int = 1) -> None:
        self.up = 0
        self.notes: tuple[str, ...] = ()
        self.now = 1000.0
        self.present = capacity.present
        self.free = 0.0
        self.failures: list[str] = []
        self.said: list[str] = []
        self.needed: list[int] = []
        ray = SimpleNamespace(get=lambda answer: answer, available_resources=lambda: {"GPU": self.free})
        for place in (module, fleet_module):
            monkeypatch.setattr(place, "ray", ray)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "present_nodes", self.nodes)
        monkeypatch.setattr(module, "failed_launches", lambda: self.failures)
        coordinator = SimpleNamespace(
            muster=SimpleNamespace(remote=lambda: Muster(tuple(map(str, range(self.up))), self.notes)),
            need=SimpleNamespace(remote=self.needed.append),
        )
        view = cast("View", SimpleNamespace(show=lambda event: self.said.append(event.text)))
        size = FleetSize(lanes, 1, True, capacity)
        self.watch = LaneWatch(Fleet(coordinator, "coordinator", lanes, pack), size, 1, view)

    def nodes(self) -> dict[str, Any]:
        return {str(i): {"CPU": float(g.cpus), "GPU": float(g.gpus)} for i, g in enumerate(self.present)}

    def look(self, later: float = LOOK_SECONDS) -> list[str]:
        """Everything said since the last look."""
        before = len(self.said)
        self.now += later
        self.watch.look()
        return self.said[before:]


def test_a_search_says_what_it_waits_for_and_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, Capacity((HEAD,), (HEAD, NodeGroup(4, 1, 8))), 4)
    waiting = "waiting for a GPU: 0 of 4 lanes are up; the cluster has 0 GPUs, the autoscaler may add 8"
    assert scene.look() == [waiting]
    assert scene.look() == [], "once"
    scene.up = 2
    assert scene.look() == ["2 of 4 lanes are up"]
    for up in (1, 2):
        scene.up = up
        assert scene.look(START_SECONDS) == [], "a coordinator that was started again hears of them once more"
    scene.up = 4
    assert scene.look() == ["4 of 4 lanes are up"]


def test_lanes_that_have_their_place_are_not_talked_of(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, Capacity((NodeGroup(8, 2),)), 2)
    assert scene.look() == []
    scene.up = 2
    assert scene.look() == []


def test_places_that_others_have_taken_are_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They look free when the search starts; only time shows that they are not."""
    scene = Scene(monkeypatch, Capacity((NodeGroup(8, 1),)), 1)
    assert scene.look() == []
    said = "waiting for a GPU: 0 of 1 lanes are up; the cluster has 1 GPU, 0 of them free"
    assert scene.look(START_SECONDS) == [said]


def test_it_looks_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, Capacity((HEAD,), (HEAD, NodeGroup(4, 1, 8))), 1)
    scene.look()
    scene.up = 1
    assert scene.look(LOOK_SECONDS / 2) == []
    assert scene.look(LOOK_SECONDS) == ["1 of 1 lanes are up"]


def test_what_cannot_be_started_and_what_lanes_notice_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, Capacity((HEAD,), (HEAD, NodeGroup(4, 1, 8))), 2)
    scene.failures = ["the autoscaler could not start gpu_spot: no capacity"]
    assert scene.look()[1:] == scene.failures
    scene.notes = ("lane 0: no driver",)
    scene.up = 1
    assert scene.look() == ["lane 0: no driver", "1 of 2 lanes are up"]
    assert scene.look(module.ASK_SECONDS) == []


def test_lanes_without_trials_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many stay as the trials left need; nobody is told twice."""
    scene = Scene(monkeypatch, Capacity((NodeGroup(16, 4),)), 4, pack=2)
    scene.up = 4
    for remaining, needed in [(9, []), (7, []), (6, [3]), (5, [3]), (1, [3, 1]), (0, [3, 1])]:
        scene.watch.remaining = lambda remaining=remaining: remaining
        scene.look()
        assert scene.needed == needed


def test_lanes_stay_that_will_confirm_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, Capacity((NodeGroup(16, 4),)), 4)
    scene.up = 4
    left = SimpleNamespace()
    scene.watch.remaining, scene.watch.front = lambda: left.trials, lambda: left.front
    for left.trials, left.front, needed in [(5, 3, []), (3, 5, []), (2, 3, [3]), (1, 2, [3, 2]), (0, 2, [3, 2])]:
        scene.look()
        assert scene.needed == needed
