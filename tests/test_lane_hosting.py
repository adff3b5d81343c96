"""Which helper actors Ray Train starts beside a lane."""

from __future__ import annotations

import pytest
from ray.train import RunConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tuner.lanes.hosting import LaneTrainer

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
