"""Ray Searcher over an Optuna study with any number of objectives.

Ray's own OptunaSearch reports every early-stopped trial to Optuna as COMPLETE, leaves trials RUNNING forever after a
NaN, and cannot resume a multi-objective study. Here the study in its database is the only state: each trial has its
origin and configuration as user attributes. So a search that was killed at any moment resumes from the database alone,
and needs no snapshot of the driver.

The sampler reads all trials several times for each suggestion, and running ones are read from the database each time.
With 64 of them it took 170 ms in SQLite and takes 23 in memory. So it reads a copy in memory, and each trial is written
to the database at once. The copy has its own numbers: `_in_memory` maps the study's numbers, which name trials
everywhere else, to those of the copy.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from typing import cast

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from tuner.config import TrialConfig
from tuner.space import SearchSpace
from tuner.study.events import SAMPLED, EpochDone, trial_id
from tuner.study.objectives import Objective

# Random points before TPE models anything; few, since a study of LoRA configurations has tens of trials, not thousands.
STARTUP_TRIALS = 6
# How often a configuration that the study has is drawn again: by the sampler, then at random. A space in which so many
# random draws find nothing new is used up.
SAMPLER_DRAWS, RANDOM_DRAWS = 4, 200

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

    Attributes:
        has_place: set when known: whether a new trial may begin now. Tune's own limit would count paused trials.
        exhausted: a sentence, once the space has no configuration that the study has not.
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
    ) -> None:
        # No metric: a failed trial's result has none, and Tune would end the whole search.
        super().__init__()
        self.study, self.space, self.objectives, self.known = study, space, objectives, known
        self.trials, self.extra, self.seed = trials, dict(extra), seed
        self.has_place: Callable[[], bool] = lambda: True
        self._numbers: dict[str, int] = {}
        self._lost: list[FrozenTrial] = []  # trials whose actor died, to be suggested again
        self._losses: Counter[int] = Counter()
        self._interrupted = self._take_over()
        self._model = _copy_in_memory(study)
        self._in_memory = {trial.number: place for place, trial in enumerate(study.get_trials(deepcopy=False))}
        self._drawn: FrozenTrial | None = None
        self.exhausted: str | None = None
        self._configurations = {_identity(_config_of(trial)) for trial in self._written_down()}
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
        if not again and not self._drawn and (self.exhausted or self._started() >= self.trials):
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
        config = _config_of(trial)
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
        return [trial for trial in self._model.get_trials(deepcopy=False) if "config" in trial.user_attrs]

    def _start(self) -> FrozenTrial | None:
        # Draw only once: if the database cannot be written, the next call writes this trial.
        self._drawn = self._drawn or self._draw()
        if self._drawn is None:
            space = self.space.name
            self.exhausted = (
                f"space {space} has no further configuration; the search ends after {self._started()} trials"
            )
            return None
        self.study.add_trial(self._drawn)
        drawn, self._drawn = self._drawn, None
        # No other driver writes to this study, so the database's next number is the count of trials so far.
        written = copy(drawn)
        written.number = len(self._in_memory)
        self._in_memory[written.number] = drawn.number
        return written

    def _draw(self) -> FrozenTrial | None:
        """A trial that is RUNNING in memory and not yet in the database; None if the space has no new one."""
        if self._fixed:
            origin, config = self._fixed.pop(0)
            trial = self._ask_for(config)
        else:
            drawn = self._draw_new()
            if drawn is None:
                return None
            origin, (trial, config) = SAMPLED, drawn
        self._configurations.add(_identity(config))
        config = config.model_copy(update={"seed": self.seed})
        trial.set_user_attr("origin", origin)
        trial.set_user_attr("config", config.model_dump_json())
        return self._model.get_trials(deepcopy=False)[trial.number]

    def _ask_for(self, config: TrialConfig) -> optuna.Trial:
        """Inside the space the sampler learns from a fixed configuration; outside it is only measured."""
        study, params = self._model, self.space.params_of(config)
        study.sampler = make_sampler(self.seed, len(self._in_memory))
        if params is not None:
            study.enqueue_trial(params)
        trial = study.ask()
        if params is not None:
            self.space.sample(trial)
        return trial

    def _draw_new(self) -> tuple[optuna.Trial, TrialConfig] | None:
        """Draw until the study does not have it: all trials share seed and batches, so a repeat would be bit for bit
        the trial that is there."""
        study = self._model
        for attempt in range(SAMPLER_DRAWS + RANDOM_DRAWS):
            study.sampler = make_sampler(self.seed, len(self._in_memory), attempt)
            trial = study.ask()
            config = self.space.sample(trial)
            if _identity(config) not in self._configurations:
                return trial, config
            # Failed trials teach the sampler nothing.
            study.tell(trial.number, state=TrialState.FAIL)
        return None

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
        lost = copy(self._model.get_trials(deepcopy=False)[self._in_memory[number]])
        lost.number = number
        self._lost.append(lost)
        return True

    def _values(self, number: int, result: Mapping[str, object]) -> list[float]:
        """One value per objective: measured in this epoch, or known from the configuration."""
        trial = self._model.get_trials(deepcopy=False)[self._in_memory[number]]
        known = self.known(_config_of(trial))
        epoch = EpochDone.from_row(trial_id(number), result)
        return [known[o.name] if o.kind == "known" else epoch.metric(o.name) for o in self.objectives]

    def _tell(self, number: int, values: list[float] | None, state: TrialState) -> None:
        """Write the end to the database first, then to the copy in memory."""
        self.study.tell(number, values, state=state)
        self._model.tell(self._in_memory[number], values, state=state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study's database is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study's database is the state."""


def _copy_in_memory(study: optuna.Study) -> optuna.Study:
    """The same trials in memory, for the sampler, which reads them several times for each suggestion."""
    model = optuna.create_study(directions=study.directions)
    model.add_trials(study.get_trials(deepcopy=False))
    return model


def _config_of(trial: FrozenTrial) -> TrialConfig:
    return TrialConfig.model_validate_json(trial.user_attrs["config"])


def _identity(config: TrialConfig) -> str:
    """Equal for configurations that train the same adapter from the same seed."""
    lora = config.lora and config.lora.model_copy(update={"targets": tuple(sorted(config.lora.targets))})
    return config.model_copy(update={"seed": 0, "lora": lora}).model_dump_json()


def make_sampler(seed: int, number: int, attempt: int = 0) -> optuna.samplers.BaseSampler:
    """Multivariate, grouped TPE (Bergstra et al. 2011; multi-objective: Ozaki et al. 2022, doi:10.1613/jair.1.13188).

    Its random numbers depend only on the study's seed and the trial's number: a resumed study draws the same as an
    uninterrupted one, and never the same startup points twice.

    Args:
        attempt: how often this trial has been drawn already; later attempts are random.
    """
    seed = (seed * 1_000_003 + number + attempt * 15_485_863) % 2**32
    if attempt >= SAMPLER_DRAWS:
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Both options have been "experimental" since Optuna 2.2 and 2.8.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed, n_startup_trials=STARTUP_TRIALS)
