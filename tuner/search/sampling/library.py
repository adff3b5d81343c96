"""Optuna's samplers, made for one draw at a time."""

from __future__ import annotations

import warnings
from typing import Literal

import optuna

# Random points before TPE models anything; few, since a study of LoRA configurations has tens of trials, not thousands.
STARTUP_TRIALS = 6
OptunaKind = Literal["tpe", "nsga2", "random"]


def optuna_sampler(kind: OptunaKind, seed: int, number: int, attempt: int = 0) -> optuna.samplers.BaseSampler:
    """A sampler whose random numbers depend on the study's seed and the trial's number alone: a resumed study draws the
    same as an uninterrupted one, and never the same startup points twice.

    `tpe` is multivariate and grouped (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022,
    doi:10.1613/jair.1.13188); `nsga2` is Deb et al. 2002.

    Args:
        attempt: how often this trial has been drawn already.
    """
    seed = (seed * 1_000_003 + number + attempt * 15_485_863) % 2**32
    match kind:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    with warnings.catch_warnings():
        # Both options have been "experimental" since Optuna 2.2 and 2.8.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed, n_startup_trials=STARTUP_TRIALS)
