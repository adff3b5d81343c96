"""Trials that have checkpoints in the storage, but are missing in the study's database.

If a head is lost, the last seconds of its database are lost, too. Trials that started in that time are written into the
study again under their old numbers, as still running. The searcher suggests them first, and a lane resumes them from
their checkpoints, which report all of their epochs again; a finished trial only reports.
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
    """Add trials with these configurations to the study, unless it has them.

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
            # It was lost before its first checkpoint; its number is not used again.
            study.add_trial(create_trial(state=TrialState.FAIL))
        params = space.params_of(config)
        # If it is in the space, the sampler learns from it, as from any trial.
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
    """Complete a trial that was only partly in the database when it was copied."""
    if known.state == TrialState.RUNNING and "config" not in known.user_attrs:
        trial = optuna.trial.Trial(study, known._trial_id)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
