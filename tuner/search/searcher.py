"""Ray Searcher over an Optuna study with any number of objectives.

Ray's own OptunaSearch reports every early-stopped trial to Optuna as COMPLETE, leaves trials RUNNING forever after a
NaN, and cannot resume a multi-objective study. Here the study in its database is the only state: each trial has its
origin and configuration as user attributes. So a search that was killed at any moment resumes from the database alone,
and needs no snapshot of the driver.

Reading all trials from SQLite for each suggestion took 170 ms with 64 running ones, so they are kept here, and each
change is written to the database first. A stopped trial is PRUNED in the database, which holds what was measured;
samplers are given the value that it would probably have reached.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from datetime import datetime
from typing import cast

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from tuner.config import TrialConfig
from tuner.search.lessons import Lessons, config_of
from tuner.search.sampling.samplers import Past, make_sampler, trial_of
from tuner.space import SearchSpace
from tuner.study.config import SamplerName
from tuner.study.events import SAMPLED, EpochDone, trial_id
from tuner.study.history import History
from tuner.study.objectives import TRAINABLE_PARAMETERS, Objective

# A trial fails if its own actor dies this often, each time more often than Tune starts it again.
LOSSES_PER_TRIAL = 3
# Tune's value for the end of a search, which its annotation of `suggest` does not allow.
FINISHED = cast(dict[str, object], Searcher.FINISHED)
# And for "ask again later".
NOT_NOW = cast(dict[str, object], None)
# The configuration that Tune gets for a trial, and the result that it returns after an epoch.
Values = dict[str, object]


class StudySearcher(Searcher):
    """Suggests interrupted trials first, then the fixed configurations, then what the sampler draws.

    Args:
        study: Optuna study; one direction per objective.
        space: where sampled configurations come from.
        objectives: of the study, in the order of its directions.
        known: costs of a configuration by name, which are known before it trains.
        fixed: configurations that every study starts with, by origin.
        trials: total number of trials of the study, counting finished ones.
        extra: keys added to every configuration that Tune gives to a trial.
        seed: of the sampler and of every trial's initialisation.
        sampler: what draws.
        max_parameters: configurations with more trainable parameters are not drawn.
        history: the study's journal, whose epochs tell what a stopped trial would have reached; None: the database
            alone, which has final values.

    Attributes:
        has_place: set when known: whether a new trial may begin now. Tune's own limit would count paused trials.
        out_of_time: set when known: why no new trial may begin any more, or None.
        exhausted: a sentence, once no new trial begins because the space is used up or the time is.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        objectives: tuple[Objective, ...],
        known: Callable[[TrialConfig], dict[str, float]],
        fixed: Mapping[str, TrialConfig],
        trials: int,
        extra: Mapping[str, object],
        seed: int,
        sampler: SamplerName = "tpe",
        max_parameters: int | None = None,
        history: History | None = None,
    ) -> None:
        # No metric: a failed trial's result has none, and Tune would end the whole search.
        super().__init__()
        self.study, self.space, self.objectives, self.known = study, space, objectives, known
        self.trials, self.extra, self.seed = trials, dict(extra), seed
        self.max_parameters, self._lessons = max_parameters, Lessons(objectives, known, history)
        self.has_place: Callable[[], bool] = lambda: True
        self.out_of_time: Callable[[], str | None] = lambda: None
        self._sampler = make_sampler(sampler, space, objectives, known, seed)
        self._numbers: dict[str, int] = {}
        self._lost: list[FrozenTrial] = []  # trials whose actor died, to be suggested again
        self._losses: Counter[int] = Counter()
        self._interrupted = self._take_over()
        self._trials = list(study.get_trials(deepcopy=False))  # by number
        self._drawn: FrozenTrial | None = None
        self.exhausted: str | None = None
        self._configurations = {_identity(config_of(trial)) for trial in self._written_down()}
        done = {trial.user_attrs["origin"] for trial in self._written_down()}
        self._fixed = [(origin, config) for origin, config in fixed.items() if origin not in done]

    def _take_over(self) -> list[FrozenTrial]:
        """Trials that a killed driver left RUNNING; those without a configuration are set to FAIL."""
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            # The driver was killed between enqueue and ask: the fixed configuration is enqueued again later.
            self.study.tell(self.study.ask().number, state=TrialState.FAIL)
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if "config" not in trial.user_attrs:
                self.study.tell(trial.number, state=TrialState.FAIL)
        return [trial for trial in running if "config" in trial.user_attrs]

    def __getstate__(self) -> dict[str, object]:
        """Empty: Tune pickles its searcher for `Tuner.restore`, which is never called; the database is the state."""
        return {}

    @property
    def remaining(self) -> int:
        """Number of trials that run, or still have to start or resume."""
        trials = self._written_down()
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        return running if self.exhausted else running + max(0, self.trials - len(trials))

    @property
    def lost(self) -> int:
        """How many trials wait to be suggested again because their actor died."""
        return len(self._lost)

    def is_lost(self, trial: str) -> bool:
        """Whether this trial's actor died and the trial will be suggested again."""
        return any(trial_id(lost.number) == trial for lost in self._lost)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tune's limit is not needed: `has_place` is."""
        return True

    def suggest(self, tune_id: str) -> Values:
        """The next configuration for Tune, FINISHED, or NOT_NOW while there is no place."""
        again = self._lost or self._interrupted
        if not again and not self._drawn:
            self.exhausted = self.exhausted or (None if self._fixed else self.out_of_time())
            if self.exhausted or self._started() >= self.trials:
                return FINISHED
        if not self.has_place():
            return NOT_NOW
        trial = again.pop(0) if again else self._start()
        if trial is None:
            return FINISHED
        self._numbers[tune_id] = trial.number
        return self.suggestion(trial)

    def suggestion(self, trial: FrozenTrial) -> Values:
        """The configuration that Tune gets for a trial of the study."""
        config = config_of(trial)
        return {
            "trial": trial_id(trial.number),
            "origin": trial.user_attrs["origin"],
            "config": config.model_dump(mode="json"),
            "known": self.known(config),
            **self.extra,
        }

    def _started(self) -> int:
        return len(self._written_down())

    def _written_down(self) -> list[FrozenTrial]:
        """Trials that have a configuration, in any state."""
        return [trial for trial in self._trials if "config" in trial.user_attrs]

    def _start(self) -> FrozenTrial | None:
        # Draw only once: if the database cannot be written, the next call writes this trial.
        self._drawn = self._drawn or self._draw()
        if self._drawn is None:
            limit = f" with at most {self.max_parameters:,} trainable parameters" if self.max_parameters else ""
            self.exhausted = (
                f"space {self.space.name} has no further configuration{limit}; the search ends after "
                f"{self._started()} trials"
            )
            return None
        self.study.add_trial(self._drawn)
        written, self._drawn = copy(self._drawn), None
        # No other driver writes to this study, so the database's next number is the count of trials so far.
        written.number = len(self._trials)
        self._trials.append(written)
        return written

    def _draw(self) -> FrozenTrial | None:
        """A trial that is RUNNING and not yet in the database; None if the space has no new one."""
        number = len(self._trials)
        if self._fixed:
            origin, config = self._fixed.pop(0)
            trial = trial_of(self.space, config, self.study.directions)
        else:
            drawn = self._sampler.draw(number, self._past(), self._allowed)
            if drawn is None:
                return None
            origin, (trial, config) = SAMPLED, drawn
        self._configurations.add(_identity(config))
        config = config.model_copy(update={"seed": self.seed})
        trial.user_attrs = {"origin": origin, "config": config.model_dump_json()}
        return trial

    def _past(self) -> Past:
        trials, lessons = self._written_down(), self._lessons
        return Past(
            tuple(self.study.directions),
            lambda: lessons.as_sampled(trials),
            lambda: list(lessons.observations(trials).values()),
        )

    def _allowed(self, config: TrialConfig) -> bool:
        """Whether a configuration may be drawn."""
        if self.max_parameters is not None and self.known(config)[TRAINABLE_PARAMETERS] > self.max_parameters:
            return False
        return _identity(config) not in self._configurations

    def on_trial_result(self, trial_id: str, result: Mapping[str, object]) -> None:
        """Do nothing: the recorder keeps epochs, and Optuna allows no intermediate values with several objectives."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, object] | None = None, error: bool = False) -> None:
        """Set the trial's state: COMPLETE only if it ran all its epochs, PRUNED if it was stopped, else FAIL.

        If the whole search failed, the trial stays RUNNING, so that `--resume` trains it. If only its own actor died,
        it stays RUNNING, too, and is suggested again: nothing was wrong with the trial.
        """
        number = self._numbers.get(trial_id)
        if number is None or (result and result.get("fatal")):
            return
        if not (error and self._comes_again(number)):
            self._tell(number, *self._outcome(number, result, error))
        del self._numbers[trial_id]

    def _outcome(
        self, number: int, result: Mapping[str, object] | None, error: bool
    ) -> tuple[list[float] | None, TrialState]:
        if result is None and not error:
            # Tune gives no result of a trial that it stops while it is paused.
            return None, TrialState.PRUNED
        if error or not result or result.get("failed") or "epoch" not in result:
            return None, TrialState.FAIL
        values = self._values(number, result)
        if not all(map(math.isfinite, values)):
            return None, TrialState.FAIL
        return (values, TrialState.COMPLETE) if result.get("final") else (None, TrialState.PRUNED)

    def _comes_again(self, number: int) -> bool:
        """Have a trial whose actor died suggested again, unless that happens too often."""
        self._losses[number] += 1
        if self._losses[number] >= LOSSES_PER_TRIAL:
            return False
        self._lost.append(self._trials[number])
        return True

    def _values(self, number: int, result: Mapping[str, object]) -> list[float]:
        """One value per objective: measured in this epoch, or known from the configuration."""
        known = self.known(config_of(self._trials[number]))
        epoch = EpochDone.from_row(trial_id(number), result)
        return [known[o.name] if o.kind == "known" else epoch.metric(o.name) for o in self.objectives]

    def _tell(self, number: int, values: list[float] | None, state: TrialState) -> None:
        """Write the end to the database first."""
        self.study.tell(number, values, state=state)
        ended = copy(self._trials[number])
        ended.state, ended.datetime_complete = state, datetime.now()
        if values is not None:
            ended.values = values
        self._trials[number] = ended

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study's database is the state."""


def _identity(config: TrialConfig) -> str:
    """Equal for configurations that train the same adapter from the same seed."""
    lora = config.lora and config.lora.model_copy(update={"targets": tuple(sorted(config.lora.targets))})
    return config.model_copy(update={"seed": 0, "lora": lora}).model_dump_json()
