"""The trials of a study, built from its events in any order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tuner.config import LoraSpec, TrialConfig
from tuner.study.events import EpochDone, Event, State, TrialEnded, TrialEvent, TrialStarted, trial_number
from tuner.study.objectives import LORA_PARAMETERS, TRAINABLE_PARAMETERS, Objective
from tuner.study.pareto import front

Cell = float | int | bool | str | None


@dataclass
class Trial:
    """One trial so far; `epochs` by number, from 1."""

    trial: str
    origin: str
    config: TrialConfig
    known: dict[str, float] = field(default_factory=dict)
    epochs: dict[int, EpochDone] = field(default_factory=dict)
    state: State = "running"
    reason: str | None = None

    @property
    def last(self) -> EpochDone | None:
        """The latest epoch."""
        return self.epochs[max(self.epochs)] if self.epochs else None

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(epoch.seconds for epoch in self.epochs.values())

    @property
    def parameters(self) -> int | None:
        """Trainable parameters."""
        return self._count(TRAINABLE_PARAMETERS)

    @property
    def lora_parameters(self) -> int | None:
        """Trainable parameters of the adapter alone."""
        return self._count(LORA_PARAMETERS)

    def value(self, name: str) -> float:
        """A cost, or a metric after the latest epoch; NaN if there is none."""
        if name in self.known:
            return self.known[name]
        return self.last.metric(name) if self.last else math.nan

    def values(self, objectives: Sequence[Objective]) -> list[float]:
        """One value per objective."""
        return [self.value(objective.name) for objective in objectives]

    def settings(self) -> dict[str, Cell]:
        """The configuration by dotted path."""
        return flat_config(self.config)

    def _count(self, name: str) -> int | None:
        value = self.known.get(name)
        return None if value is None else int(value)


class History:
    """Trials by name, kept up to date by `apply`.

    Events may be repeated, missing or out of order: an epoch or an end that comes before its trial's start is kept.
    """

    def __init__(self) -> None:
        self._trials: dict[str, Trial] = {}
        self._early: dict[str, list[EpochDone | TrialEnded]] = {}
        # Views ask for the front at every event, but it changes only with complete trials.
        self._front: tuple[tuple[str, ...], list[Trial]] | None = None

    @property
    def trials(self) -> list[Trial]:
        """All trials that have started, by number."""
        return sorted(self._trials.values(), key=lambda trial: trial_number(trial.trial))

    @property
    def unstarted(self) -> int:
        """Number of events of trials whose start is not known."""
        return sum(map(len, self._early.values()))

    def get(self, trial: str) -> Trial | None:
        """The trial of this name, if it has started."""
        return self._trials.get(trial)

    def apply(self, event: Event) -> None:
        """Add one event; events that are not of a trial change nothing."""
        if isinstance(event, TrialStarted):
            self._start(event)
        elif isinstance(event, EpochDone | TrialEnded):
            self._go_on(event)

    def front(self, objectives: Sequence[Objective]) -> list[Trial]:
        """The complete trials that no other complete trial dominates, by number."""
        asked = tuple(objective.name for objective in objectives)
        if self._front is None or self._front[0] != asked:
            complete = [trial for trial in self.trials if trial.state == "complete"]
            rows = front([trial.values(objectives) for trial in complete], objectives)
            self._front = (asked, [complete[row] for row in rows])
        return list(self._front[1])

    def events(self) -> Iterator[TrialEvent]:
        """Events that give the same history, trial by trial."""
        for trial in self.trials:
            yield TrialStarted(trial=trial.trial, origin=trial.origin, config=trial.config, known=trial.known)
            yield from (trial.epochs[number] for number in sorted(trial.epochs))
            if trial.state != "running":
                yield TrialEnded(trial=trial.trial, state=trial.state, reason=trial.reason)

    def _go_on(self, event: EpochDone | TrialEnded) -> None:
        trial = self._trials.get(event.trial)
        if trial is None:
            self._early.setdefault(event.trial, []).append(event)
            return
        before = trial.state
        if isinstance(event, EpochDone):
            trial.epochs[event.epoch] = event
        else:
            trial.state, trial.reason = event.state, event.reason
        if "complete" in (before, trial.state):
            self._front = None

    def _start(self, event: TrialStarted) -> None:
        self._front = None
        known = self._trials.get(event.trial)
        if known is not None and known.config == event.config:
            # It starts again from its checkpoint, after its worker or its driver died.
            known.state, known.reason = "running", None
            known.known = {**known.known, **event.known}
            return
        self._trials[event.trial] = Trial(event.trial, event.origin, event.config, dict(event.known))
        for early in self._early.pop(event.trial, ()):
            self.apply(early)


def flat_config(config: TrialConfig) -> dict[str, Cell]:
    """A configuration as columns with dotted names; `lora.*` is None for the projection alone."""
    flat: dict[str, Cell] = {f"lora.{name}": None for name in LoraSpec.model_fields}
    for group, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            flat |= {f"{group}.{name}": value for name, value in values.items()}
        elif group != "lora":
            flat[group] = values
    if config.lora:
        flat["lora.targets"] = ",".join(config.lora.targets)
    return flat
