"""Which search reports the best front for the training that it spends? `python -m benchmarks.search_quality` replays
recorded curves (`benchmarks.record`).

Each replay is a study over a table of configurations: its trials' epochs are those of the table, and samplers, stopping
rule and judgement are the project's own. A sampler that draws from the whole space gets the configuration of the table
that is nearest to its draw.

A recorded table has one value of each configuration, which is noisy, and a search must not be judged by the noise that
misled it. So each replay halves the validation queries at random: the search sees recall on one half, and its front is
judged by recall on the other. Without a table, curves are made whose truth is known (`benchmarks/curves.py`).

Hypervolumes are above the projection alone and below the largest cost of the table, as a share of what the front of
all configurations has.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import typer

from benchmarks import run
from benchmarks.curves import METRIC, SPACE, Curve, halve, load, make_curves
from benchmarks.table import show
from tuner.config import TrialConfig
from tuner.search.judgement import judge
from tuner.search.observations import Observation, observe
from tuner.search.sampling.encoding import Encoding
from tuner.search.sampling.proposer import Proposer
from tuner.search.sampling.samplers import Past, Sampler, make_sampler, trial_of
from tuner.search.stopping import NeverStop, StopHopeless, StoppingRule
from tuner.study.config import SamplerName
from tuner.study.events import BASELINE, RECOMMENDED
from tuner.study.history import Trial
from tuner.study.objectives import TRAINABLE_PARAMETERS, choose_objectives
from tuner.study.pareto import front, hypervolume
from tuner.study.rungs import Decision, is_due

OBJECTIVES = choose_objectives([METRIC, TRAINABLE_PARAMETERS])


@dataclass(frozen=True)
class Method:
    """A search. `paired` off: the rule does not see ranks; `judged` off: the front is that of the measured values."""

    name: str
    sampler: SamplerName
    stops: bool = False
    paired: bool = True
    judged: bool = False


METHODS = (
    Method("random", "random"),
    Method("TPE", "tpe"),
    Method("NSGA-II", "nsga2"),
    Method("Gaussian process", "gp"),
    Method("Gaussian process, judged", "gp", judged=True),
    Method("random, stops, judged", "random", stops=True, judged=True),
    Method("TPE, stops, judged", "tpe", stops=True, judged=True),
    Method("this search, unpaired", "gp", stops=True, paired=False, judged=True),
    Method("this search, raw front", "gp", stops=True),
    Method("this search", "gp", stops=True, judged=True),
)


@dataclass(frozen=True)
class Replayed:
    """A study so far: training epochs spent, hours on its lanes, trials begun; true hypervolume of the reported front
    and of everything tried."""

    epochs: int
    hours: float
    trials: int
    reported: float
    tried: float


@dataclass
class _Study:
    """One replay."""

    curves: Sequence[Curve]
    method: Method
    seed: int
    lanes: int
    level: float
    trials: dict[str, Trial] = field(default_factory=dict)
    curve_of: dict[str, Curve] = field(default_factory=dict)
    spent: int = 0
    clock: float = 0.0

    def __post_init__(self) -> None:
        self.length = len(self.curves[0].epochs)
        self.rule: StoppingRule = (
            StopHopeless(OBJECTIVES, self.length, SPACE if self.method.judged else None, self.level)
            if self.method.stops
            else NeverStop()
        )
        self.encoding = Encoding(SPACE, OBJECTIVES)
        self.left = {id(curve): curve for curve in self.curves}
        self.costs = {curve.config.model_dump_json(): {TRAINABLE_PARAMETERS: curve.cost} for curve in self.curves}
        pool = [curve.config for curve in self.curves]
        self.proposer = Proposer(SPACE, OBJECTIVES, self._known, self.seed, pool)
        self.sampler: Sampler | None = None
        if self.method.sampler != "gp":
            self.sampler = make_sampler(self.method.sampler, SPACE, OBJECTIVES, self._known, self.seed)

    def _known(self, config: TrialConfig) -> Mapping[str, float]:
        return self.costs.get(config.model_dump_json(), {TRAINABLE_PARAMETERS: math.nan})

    def replay(self, budget: int) -> list[Replayed]:
        """Train until so many epochs are spent; a state after each end of a trial."""
        states: list[Replayed] = []
        lanes = [(0.0, lane) for lane in range(self.lanes)]
        busy: dict[int, str] = {}
        while lanes and self.spent < budget:
            self.clock, lane = heapq.heappop(lanes)
            name = busy.pop(lane, None) or self._begin()
            if name is None:
                continue
            seconds, ended = self._epoch(name)
            if ended:
                states.append(self._state())
            else:
                busy[lane] = name
            heapq.heappush(lanes, (self.clock + seconds, lane))
        return states

    def _begin(self) -> str | None:
        if not self.left:
            return None
        curve = self._draw()
        del self.left[id(curve)]
        name = f"t{len(self.trials):04d}"
        known = {TRAINABLE_PARAMETERS: curve.cost}
        self.trials[name], self.curve_of[name] = Trial(name, curve.origin, curve.config, known), curve
        return name

    def _draw(self) -> Curve:
        for origin in (BASELINE, RECOMMENDED):
            fixed = next((curve for curve in self.left.values() if curve.origin == origin), None)
            if fixed is not None:
                return fixed
        if self.sampler is None:
            found = self.proposer.propose(self._observations(), len(self.trials), self._is_left)
            return next(curve for curve in self.left.values() if curve.config == found)
        drawn = self.sampler.draw(len(self.trials), Past(_directions(), self._frozen, self._observations), _any)
        assert drawn is not None
        return self._nearest(drawn[1])

    def _is_left(self, config: TrialConfig) -> bool:
        return any(curve.config == config for curve in self.left.values())

    def _nearest(self, config: TrialConfig) -> Curve:
        nothing = {TRAINABLE_PARAMETERS: 1.0}
        place = self.encoding.features(config, nothing)

        def distance(curve: Curve) -> float:
            return float(np.linalg.norm(self.encoding.features(curve.config, nothing) - place))

        return min(self.left.values(), key=distance)

    def _observations(self) -> list[Observation]:
        return list(observe(list(self.trials.values()), [METRIC]).values())

    def _frozen(self) -> list[optuna.trial.FrozenTrial]:
        """Trials as Optuna gets them; stopped ones with their predicted values."""
        found = []
        for trial, seen in zip(self.trials.values(), self._observations(), strict=True):
            frozen = trial_of(SPACE, trial.config, _directions())
            if trial.state != "running" and seen.values is not None:
                frozen.state, frozen.datetime_complete = optuna.trial.TrialState.COMPLETE, frozen.datetime_start
                frozen.values = [seen.values[0], trial.value(TRAINABLE_PARAMETERS)]
            found.append(frozen)
        return found

    def _epoch(self, name: str) -> tuple[float, bool]:
        """Train one epoch: its seconds, and whether the trial has ended."""
        trial, curve = self.trials[name], self.curve_of[name]
        epoch = curve.epochs[len(trial.epochs)]
        trial.epochs[epoch.epoch] = epoch if self.method.paired else epoch.model_copy(update={"ranks": None})
        self.spent += 1
        if epoch.epoch == self.length:
            trial.state = "complete"
        elif is_due(epoch.epoch, self.rule.rungs, self.length):
            verdict = self.rule.decide(trial, [other for other in self.trials.values() if other is not trial])
            if verdict.decision is Decision.STOP:
                trial.state = "stopped"
        return epoch.seconds, trial.state != "running"

    def _state(self) -> Replayed:
        trials = list(self.trials.values())
        complete = [trial for trial in trials if trial.state == "complete"]
        beliefs = judge(trials, SPACE, OBJECTIVES) if self.method.judged else {}
        if beliefs:
            reported = [trial for trial in complete if beliefs[trial.trial].on_front]
        else:
            rows = front([trial.values(OBJECTIVES) for trial in complete], OBJECTIVES)
            reported = [complete[row] for row in rows]
        whole = volume(self.curves, self.curves)
        parts = ([self.curve_of[trial.trial] for trial in chosen] for chosen in (reported, complete))
        shares = [volume(part, self.curves) / whole for part in parts]
        return Replayed(self.spent, self.clock / 3600, len(trials), *shares)


def volume(chosen: Sequence[Curve], every: Sequence[Curve]) -> float:
    """True hypervolume above the projection alone and below the largest cost."""
    base = next(curve.worth for curve in every if curve.origin == BASELINE)
    scale = OBJECTIVES[1].corner / max(curve.cost for curve in every)
    return hypervolume([[max(0.0, curve.worth - base), curve.cost * scale] for curve in chosen], OBJECTIVES)


def _directions() -> tuple[optuna.study.StudyDirection, ...]:
    return (optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE)


def _any(config: TrialConfig) -> bool:
    return True


def at(states: Sequence[Replayed], epochs: int) -> Replayed:
    """The state when so many epochs were spent."""
    before = [state for state in states if state.epochs <= epochs]
    return before[-1] if before else Replayed(0, 0.0, 0, 0.0, 0.0)


def main(
    table: Annotated[Path | None, typer.Option(help="recorded curves; default: made ones")] = None,
    seeds: int = 30,
    configurations: Annotated[int, typer.Option(help="of made curves")] = 100,
    most: Annotated[int, typer.Option(help="trials' worth of epochs to spend")] = 40,
    lanes: Annotated[int, typer.Option(help="trials that train at once")] = 1,
    level: Annotated[float, typer.Option(help="of the stopping rule")] = 0.05,
    only: Annotated[str, typer.Option(help="methods whose name contains this")] = "",
) -> None:
    """Replay every method and print what it reports for how many epochs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    recorded = load(table) if table is not None else None
    tables = [halve(recorded, seed) if recorded else make_curves(configurations, seed) for seed in range(seeds)]
    length = len(tables[0][0].epochs)
    budgets = [length * trials for trials in (8, 12, 20, 40, 80) if trials <= min(most, len(tables[0]))]
    rows = []
    for method in (each for each in METHODS if only in each.name):
        replays = [
            _Study(curves, method, seed, lanes, level).replay(budgets[-1] + 1) for seed, curves in enumerate(tables)
        ]
        cells = []
        for budget in budgets:
            states = [at(replay, budget) for replay in replays]
            reported, tried = ([getattr(state, name) for state in states] for name in ("reported", "tried"))
            error = float(np.std(reported)) / math.sqrt(len(states))
            trials = np.mean([state.trials for state in states])
            cells.append(f"{np.mean(reported):.3f} +- {error:.3f} ({np.mean(tried):.3f}) {trials:.0f}")
        rows.append([method.name, *cells])
        typer.echo(f"{method.name}: {cells}", err=True)
    columns = ["search", *(f"{budget} epochs" for budget in budgets)]
    title = (
        f"True hypervolume of the reported front (of all that was tried) and trials begun; {len(tables[0])} "
        f"{'recorded' if recorded else 'made'} configurations of {length} epochs, {seeds} seeds, {lanes} lanes"
    )
    show(title, columns, rows)


if __name__ == "__main__":
    run(main)
