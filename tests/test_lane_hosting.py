"""Which helper actors Ray Train starts beside a lane, and what is reported when a lane ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from conftest import Tiny
from ray.train import RunConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tuner.lanes.hosting import LaneTrainer, host_lane
from tuner.lanes.lane import LaneConfig

# Ray Data reads settings of its own that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
HELPERS = {DatasetsCallback, PlacementGroupCleanerCallback}


@pytest.mark.parametrize(
    ("embedded", "left"), [(True, set()), (False, {PlacementGroupCleanerCallback})], ids=["embedded", "cluster"]
)
def test_a_lane_goes_without_the_helpers_that_it_has_no_use_for(embedded: bool, left: set[type]) -> None:
    plain = DataParallelTrainer(print, run_config=RunConfig(name="plain"))._create_default_callbacks()
    ours = LaneTrainer(print, run_config=RunConfig(name="lane"), embedded=embedded)._create_default_callbacks()
    assert {type(callback) for callback in plain} >= HELPERS
    assert {type(callback) for callback in ours} & HELPERS == left
    assert {type(callback) for callback in plain} - HELPERS <= {type(callback) for callback in ours}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ray.exceptions.ActorDiedError(),
            "its Train controller was killed or crashed; nothing is lost, resume with "
            "`tuner search --resume s --runs /r`",
        ),
        (RuntimeError("Ray Train's\n own words"), "Ray Train's own words"),
    ],
    ids=["killed controller", "another error"],
)
def test_the_end_of_a_lane_is_reported(
    error: Exception, reason: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def fit(trainer: LaneTrainer) -> None:
        raise error

    coordinator = SimpleNamespace(fatal=SimpleNamespace(remote=told.append))
    monkeypatch.setattr(LaneTrainer, "fit", fit)
    monkeypatch.setattr(ray, "get_actor", lambda name: coordinator)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    values: dict[str, Any] = {"storage": None, "capacity": 1, "workers": 1, "threads": 1, "use_gpu": False}
    host_lane(LaneConfig("lane-0", "s", "space", "coordinator", tiny.settings(), "/r/s", **values), embedded=True)
    assert told == [f"lane-0 ended: {reason}"]
