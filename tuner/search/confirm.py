"""From finished trials to a confirmed front: chosen on validation here, exported and measured on test by a lane."""

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


def confirm(selection: Selection, coordinator: Any, waiting: Callable[[], None]) -> list[Point]:
    """Have a lane export the selected trials and measure them from their files.

    Args:
        coordinator: handle of the study's `Coordinator` actor.
        waiting: called now and then until the points are there.

    Returns:
        The points of front.json, by rising number of trainable parameters.

    Raises:
        StudyError: encoder, store or disk are no longer as they were.
    """
    trials = [
        [trial_id(trial.number), trial.user_attrs["origin"], json.loads(trial.user_attrs["config"])]
        for trial in selection.trials
    ]
    plan = {"trials": trials, "baseline": selection.baseline}
    while True:
        waiting()
        answer: Confirmation = ray.get(coordinator.confirm.remote(plan, WAIT_SECONDS))
        if answer.reason is not None:
            raise StudyError(f"the front cannot be confirmed: {answer.reason}")
        if answer.points is not None:
            break
    for point in answer.points:
        point["on_front"] = point["trial"] in selection.front
    return sorted(answer.points, key=lambda point: (point["trainable_parameters"], point["trial"]))
