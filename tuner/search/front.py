"""From finished trials to a confirmed front: select on validation here; lanes export and measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.config import TrialConfig
from tuner.errors import StudyError
from tuner.lanes.fleet import Fleet
from tuner.lanes.messages import Confirmation
from tuner.study.events import BASELINE, SAMPLED, trial_id
from tuner.study.objectives import Objective
from tuner.study.pareto import front
from tuner.study.points import Belief, Point
from tuner.train.results import Candidate, Measured

WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Selection:
    """Trials to confirm: the validation front, and those that were not drawn: references and the user's own."""

    trials: tuple[FrozenTrial, ...]
    front: frozenset[str]
    baseline: str | None
    beliefs: Mapping[str, Belief] = field(default_factory=dict)


def select(
    study: optuna.Study, objectives: Sequence[Objective], beliefs: Mapping[str, Belief] | None = None
) -> Selection:
    """Choose the trials by validation only.

    Args:
        beliefs: what is believed of them; without it their measured values decide.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if beliefs:
        names = [trial_id(trial.number) for trial in complete]
        chosen = {row for row, name in enumerate(names) if name in beliefs and beliefs[name].on_front}
    else:
        chosen = set(front([trial.values for trial in complete], objectives))
    origins = [trial.user_attrs["origin"] for trial in complete]
    kept = [i for i in range(len(complete)) if i in chosen or origins[i] != SAMPLED]
    baseline = next((trial_id(complete[i].number) for i in kept if origins[i] == BASELINE), None)
    on_front = frozenset(trial_id(complete[i].number) for i in chosen)
    return Selection(tuple(complete[i] for i in kept), on_front, baseline, dict(beliefs or {}))


def confirm_front(
    selection: Selection, lanes: Fleet, look: Callable[[], None], report: Callable[[str], None]
) -> list[Point]:
    """Have the lanes export the selected trials and measure them from their files.

    Args:
        look: called from time to time until all points are measured.
        report: called with a sentence when more points are measured.

    Returns:
        The points of front.json, by increasing number of trainable parameters.

    Raises:
        StudyError: the encoder, the store or the disk has changed or failed.
    """
    trials = [
        Candidate(
            trial_id(trial.number),
            trial.user_attrs["origin"],
            TrialConfig.model_validate_json(trial.user_attrs["config"]),
        )
        for trial in selection.trials
    ]
    answer, left = Confirmation(), len(trials)
    while answer.points is None:
        look()
        answer = lanes.confirm(trials, WAIT_SECONDS)
        if answer.reason is not None:
            raise StudyError(f"cannot confirm the front: {answer.reason}")
        if answer.left is not None and answer.left < left:
            left = answer.left
            report(f"{len(trials) - left} of {len(trials)} trials are confirmed")
    return _compared(answer.points, selection)


def _compared(measured: Sequence[Measured], selection: Selection) -> list[Point]:
    """Points compared with the projection alone; different lanes may have measured the two."""
    baseline = next((each for each in measured if each.point.trial == selection.baseline), None)
    points = [
        each.point.model_copy(
            update={
                "test_vs_baseline": each.minus(baseline) if baseline else {},
                "on_front": each.point.trial in selection.front,
                "belief": selection.beliefs.get(each.point.trial),
            }
        )
        for each in measured
    ]
    return sorted(points, key=lambda point: (point.trainable_parameters, point.trial))
