"""Trials that a study's database does not know, though they have begun to leave checkpoints.

A head that is lost takes the last seconds of its database with it. What it had begun meanwhile is written into the
study again under its old number, as still running: the searcher hands it out first, and a lane goes on from its
checkpoint, which tells all of its epochs again, or only tells them if the trial was finished.
"""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from tuner.config import TrialConfig
from tuner.space import SearchSpace
from tuner.study.events import SAMPLED


def adopt(
    study: optuna.Study, space: SearchSpace, fixed: Mapping[str, TrialConfig], configs: Mapping[int, TrialConfig]
) -> None:
    """Write the trials of these configurations into the study, unless it knows them.

    Args:
        fixed: configurations that every study starts with, by origin.
        configs: by the number of the trial.
    """
    for number, config in sorted(configs.items()):
        attributes = {"origin": _origin(config, fixed), "config": config.model_dump_json()}
        known = study.get_trials(deepcopy=False)
        if number < len(known):
            _complete(study, known[number], attributes)
            continue
        for _ in range(len(known), number):
            # Begun, and lost before its first checkpoint: its number is used up.
            study.add_trial(create_trial(state=TrialState.FAIL))
        params = space.params_of(config)
        # Inside the space the sampler learns from it, as it would have.
        asked = FixedTrial(params or {})
        if params is not None:
            space.sample(asked)
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=asked.params,
                distributions=asked.distributions,
                user_attrs=attributes,
            )
        )


def _origin(config: TrialConfig, fixed: Mapping[str, TrialConfig]) -> str:
    for origin, known in fixed.items():
        if known.model_copy(update={"seed": config.seed}) == config:
            return origin
    return SAMPLED


def _complete(study: optuna.Study, known: FrozenTrial, attributes: Mapping[str, str]) -> None:
    """A trial that was being written down when the database was copied."""
    if known.state == TrialState.RUNNING and "config" not in known.user_attrs:
        trial = optuna.trial.Trial(study, known._trial_id)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
