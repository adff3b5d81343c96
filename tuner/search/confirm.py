"""From finished trials to a confirmed front: chosen on validation here, exported and measured on test by the lanes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import ray
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import StudyError
from tuner.lanes.messages import Confirmation
from tuner.pareto import pareto_front
from tuner.search.searcher import Objective, trial_id
from tuner.train.results import Measured

Point = dict[str, Any]
BASELINE, RECOMMENDED = "projection_only", "recommended"
WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Selection:
    """Trials worth a confirmation: the validation front, and the two that every search compares with."""

    trials: tuple[FrozenTrial, ...]
    front: frozenset[str]
    baseline: str | None


def select(study: optuna.Study, objectives: Sequence[Objective]) -> Selection:
    """Choose on validation values alone."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return Selection((), frozenset(), None)
    values = np.asarray([trial.values for trial in complete])
    chosen = {int(i) for i in pareto_front(values, [objective.direction for objective in objectives])}
    origins = [trial.user_attrs["origin"] for trial in complete]
    kept = [i for i in range(len(complete)) if i in chosen or origins[i] in (BASELINE, RECOMMENDED)]
    baseline = next((trial_id(complete[i].number) for i in kept if origins[i] == BASELINE), None)
    front = frozenset(trial_id(complete[i].number) for i in chosen)
    return Selection(tuple(complete[i] for i in kept), front, baseline)


def confirm(
    selection: Selection, coordinator: Any, look: Callable[[], None], say: Callable[[str], None]
) -> list[Point]:
    """Have the lanes export the selected trials and measure them from their files.

    Args:
        coordinator: handle of the study's `Coordinator` actor.
        look: called now and then until the points are there.
        say: told when some of them are.

    Returns:
        The points of front.json, by rising number of trainable parameters.

    Raises:
        StudyError: encoder, store or disk are no longer as they were.
    """
    trials = [
        {
            "trial": trial_id(trial.number),
            "origin": trial.user_attrs["origin"],
            "config": json.loads(trial.user_attrs["config"]),
        }
        for trial in selection.trials
    ]
    answer, left = Confirmation(), len(trials)
    while answer.points is None:
        look()
        answer = ray.get(coordinator.confirm.remote(trials, WAIT_SECONDS))
        if answer.reason is not None:
            raise StudyError(f"the front cannot be confirmed: {answer.reason}")
        if answer.left is not None and answer.left < left:
            left = answer.left
            say(f"{len(trials) - left} of {len(trials)} trials are confirmed")
    return _compared(answer.points, selection)


def _compared(measured: Sequence[Measured], selection: Selection) -> list[Point]:
    """Points beside the projection alone, whichever lanes have measured the two."""
    baseline = next((each for each in measured if each.point["trial"] == selection.baseline), None)
    points = []
    for each in measured:
        difference = each.minus(baseline) if baseline else None
        on_front = each.point["trial"] in selection.front
        points.append({**each.point, "test_vs_baseline": difference, "on_front": on_front})
    return sorted(points, key=lambda point: (point["trainable_parameters"], point["trial"]))
