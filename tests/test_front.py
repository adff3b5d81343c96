"""Which trials are confirmed and what they are compared with, over plain Optuna studies. No Ray, no lanes."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from tuner.config import TrialConfig
from tuner.search.front import Selection, _compared, select
from tuner.study.events import BASELINE, RECOMMENDED, SAMPLED
from tuner.study.objectives import TRAINABLE_PARAMETERS, choose_objectives
from tuner.study.points import Point, Scores
from tuner.train.results import Measured

BOTH = choose_objectives(["recall@10", TRAINABLE_PARAMETERS])
# Origin, recall and parameters. t0003 and t0005 are dominated; t0006 was stopped.
TRIALS = [
    (SAMPLED, 0.50, 4000),
    (BASELINE, 0.30, 1000),
    (SAMPLED, 0.40, 2000),
    (RECOMMENDED, 0.35, 3000),
    (SAMPLED, 0.60, 5000),
    (SAMPLED, 0.45, 9000),
    (SAMPLED, 0.99, 1),
]


@pytest.fixture
def study() -> optuna.Study:
    made = optuna.create_study(directions=[objective.direction for objective in BOTH])
    for number, (origin, recall, parameters) in enumerate(TRIALS):
        done = number < 6
        made.add_trial(
            create_trial(
                state=TrialState.COMPLETE if done else TrialState.FAIL,
                values=[recall, parameters] if done else None,
                user_attrs={"origin": origin, "config": TrialConfig().model_dump_json()},
            )
        )
    return made


def test_the_front_has_high_recall_for_few_parameters(study: optuna.Study) -> None:
    selection = select(study, BOTH)
    assert selection.front == {"t0000", "t0001", "t0002", "t0004"}
    assert selection.baseline == "t0001"
    assert [trial.number for trial in selection.trials] == [0, 1, 2, 3, 4], "the recommendation is measured too"


def test_a_study_without_references_has_its_front_alone() -> None:
    made = optuna.create_study(directions=[objective.direction for objective in BOTH])
    assert select(made, BOTH) == Selection((), frozenset(), None)


def measured(trial: str, recall: float, parameters: int) -> Measured:
    point = Point(
        trial=trial,
        origin=SAMPLED,
        config=TrialConfig(),
        lora_parameters=0,
        trainable_parameters=parameters,
        validation=Scores(),
        on_front=False,
    )
    return Measured(point, {"recall@10": recall}, {"recall@10": np.full(5, recall)})


def test_points_are_compared_with_the_baseline_wherever_it_stands(study: optuna.Study) -> None:
    """It is neither the first point that was measured nor the smallest one."""
    every = [measured("t0004", 0.6, 5000), measured("t0001", 0.3, 4000), measured("t0003", 0.2, 3000)]
    points = _compared(every, select(study, BOTH))
    assert [point.trial for point in points] == ["t0003", "t0001", "t0004"]
    differences = {point.trial: point.test_vs_baseline["recall@10"] for point in points}
    assert {trial: entry.difference for trial, entry in differences.items()} == pytest.approx(
        {"t0003": -0.1, "t0001": 0.0, "t0004": 0.3}
    )
    assert differences["t0004"].interval == pytest.approx((0.3, 0.3))
    assert [point.on_front for point in points] == [False, True, True]


def test_without_a_baseline_nothing_is_compared() -> None:
    (point,) = _compared([measured("t0004", 0.6, 5000)], Selection((), frozenset({"t0004"}), None))
    assert point.test_vs_baseline == {}
    assert point.on_front
