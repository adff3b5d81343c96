"""A stopping rule's decisions on their way to Tune, with trials that are only names and states. No Ray starts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial as TuneTrial
from scripted_rule import Scripted

from tuner.config import TrialConfig
from tuner.search.scheduler import RungScheduler
from tuner.search.stopping import GO_ON, NeverStop, StoppingRule, Verdict
from tuner.study.events import EpochDone, TrialEnded, TrialEvent, TrialStarted
from tuner.study.history import Trial
from tuner.study.rungs import Decision

EPOCHS = 3
PAUSED = {("t0000", 1): Decision.PAUSE}


class Tune:
    """Tune's controller as far as the scheduler sees it, played by the test."""

    def __init__(self, rule: StoppingRule, places: int = 1, events: Sequence[TrialEvent] = ()) -> None:
        self.scheduler = RungScheduler(rule, places, EPOCHS, events)
        self.stopped: list[str] = []

    def suggest(self, number: int) -> Any:
        """A new trial, which waits for its actor."""
        values = {"trial": f"t{number:04d}", "origin": "sampled", "known": {"trainable_parameters": 10.0 + number}}
        trial: Any = SimpleNamespace(config=values | {"config": TrialConfig().model_dump()}, status=TuneTrial.PENDING)
        self.scheduler.on_trial_add(self, trial)
        return trial

    def run(self, number: int) -> Any:
        """A new trial, which runs."""
        trial = self.suggest(number)
        trial.status = TuneTrial.RUNNING
        return trial

    def report(self, trial: Any, epoch: int, decided: bool = False) -> str:
        """An epoch of a running trial, and what Tune does after the decision."""
        row = {"epoch": epoch, "decided": decided, "recall@10": epoch / 10}
        decision = self.scheduler.on_trial_result(self, trial, row)
        if decision == "PAUSE":
            trial.status = TuneTrial.PAUSED
        elif decision == "STOP":
            self.end(trial, {"final": False})
        return decision

    def end(self, trial: Any, result: dict[str, Any]) -> None:
        self.scheduler.on_trial_complete(self, trial, result)
        trial.status = TuneTrial.TERMINATED

    def stop_trial(self, trial: Any) -> None:
        assert trial.status == TuneTrial.PAUSED
        self.scheduler.on_trial_remove(self, trial)
        trial.status = TuneTrial.TERMINATED
        self.stopped.append(trial.config["trial"])

    def choose(self) -> str | None:
        """The trial that Tune would start now."""
        trial = self.scheduler.choose_trial_to_run(self)
        if trial is None:
            return None
        if trial.status == TuneTrial.PAUSED:
            trial.status = TuneTrial.PENDING
        return str(trial.config["trial"])


@pytest.mark.parametrize(
    ("decision", "told"), [(Decision.GO_ON, "CONTINUE"), (Decision.PAUSE, "PAUSE"), (Decision.STOP, "STOP")]
)
def test_each_decision_is_handed_on(decision: Decision, told: str) -> None:
    tune = Tune(Scripted((1,), {("t0000", 1): decision}))
    assert tune.report(tune.run(0), 1) == told


def test_a_rule_is_asked_at_its_rungs_alone() -> None:
    every = {("t0000", epoch): Decision.STOP for epoch in (1, 2, EPOCHS)}
    tune = Tune(Scripted((2, EPOCHS), every))
    trial = tune.run(0)
    assert tune.report(trial, 1) == "CONTINUE"
    assert tune.report(trial, 2) == "STOP"
    last = tune.run(1)
    assert [tune.report(last, epoch) for epoch in (1, 2, EPOCHS)] == ["CONTINUE"] * 3, "nothing comes after the last"


def test_what_was_decided_in_an_earlier_session_is_not_decided_again() -> None:
    tune = Tune(Scripted((1, 2), {("t0000", 1): Decision.STOP, ("t0000", 2): Decision.STOP}))
    trial = tune.run(0)
    assert tune.report(trial, 1, decided=True) == "CONTINUE"
    assert tune.report(trial, 2) == "STOP"


def test_a_rule_knows_the_trial_its_cost_and_the_others() -> None:
    asked: list[tuple[Trial, list[Trial]]] = []

    class Asked(NeverStop):
        rungs = (1,)

        def decide(self, trial: Trial, others: Sequence[Trial]) -> Verdict:
            asked.append(copy.deepcopy((trial, list(others))))
            return GO_ON

    before: list[TrialEvent] = [
        TrialStarted(trial="t0000", origin="sampled", config=TrialConfig()),
        EpochDone(trial="t0000", epoch=1, metrics={"recall@10": 0.5}),
        TrialEnded(trial="t0000", state="complete"),
    ]
    tune = Tune(Asked(), places=3, events=before)
    tune.report(tune.run(1), 1)
    tune.end(tune.run(2), {"failed": "loss became nan", "final": False})
    tune.report(tune.run(3), 1)
    trial, others = asked[-1]
    assert (trial.trial, trial.known, trial.state) == ("t0003", {"trainable_parameters": 13.0}, "running")
    assert [epoch.metric("recall@10") for epoch in trial.epochs.values()] == [0.1]
    known = [("t0000", "complete", 1), ("t0001", "running", 1), ("t0002", "failed", 0)]
    assert [(other.trial, other.state, len(other.epochs)) for other in others] == known


def test_the_last_epoch_counts_though_tune_does_not_ask_about_it() -> None:
    tune = Tune(Scripted((1,), PAUSED, {("t0000", 1): ("t0001", EPOCHS)}))
    tune.report(tune.run(0), 1)
    other = tune.run(1)
    tune.report(other, 1)
    tune.report(other, 2)
    assert tune.choose() is None
    tune.end(other, {"epoch": EPOCHS, "final": True})
    tune.suggest(2)
    assert tune.choose() == "t0002", "the place is not free, but the next one is for t0000"
    assert not tune.scheduler.has_place()


def test_a_paused_trial_leaves_its_place_to_a_new_one() -> None:
    tune = Tune(Scripted((1,), PAUSED))
    trial = tune.run(0)
    assert not tune.scheduler.has_place()
    tune.report(trial, 1)
    assert tune.scheduler.has_place()
    tune.suggest(1)
    assert not tune.scheduler.has_place()
    assert tune.choose() == "t0001"


def test_a_paused_trial_takes_a_place_that_no_new_one_wants() -> None:
    tune = Tune(Scripted((1,), PAUSED))
    tune.report(tune.run(0), 1)
    other = tune.run(1)
    assert tune.choose() is None, "the only place is taken"
    tune.end(other, {"final": True})
    assert tune.choose() == "t0000"
    assert tune.choose() == "t0000", "Tune asks again until the trial runs"
    assert not tune.scheduler.has_place()


def test_a_promoted_trial_has_the_next_place_before_a_new_one() -> None:
    tune = Tune(Scripted((1,), PAUSED, {("t0000", 1): ("t0001", 1)}))
    tune.report(tune.run(0), 1)
    other = tune.run(1)
    tune.report(other, 1)
    assert tune.choose() is None
    tune.end(other, {"final": True})
    assert not tune.scheduler.has_place(), "kept for the promoted one, though it is free"
    assert tune.choose() == "t0000"


def test_a_paused_trial_that_the_rule_gives_up_is_stopped() -> None:
    class GivesUp(NeverStop):
        rungs = (1,)

        def decide(self, trial: Trial, others: Sequence[Trial]) -> Verdict:
            return Verdict(Decision.STOP if len(others) > 1 else Decision.PAUSE)

    tune = Tune(GivesUp(), places=2)
    paused = tune.run(0)
    tune.run(1)
    tune.report(paused, 1)
    other = tune.run(2)
    tune.report(other, 2)
    assert tune.choose() is None
    assert tune.stopped == ["t0000"]


def test_a_trial_whose_actor_died_keeps_its_epochs() -> None:
    tune = Tune(Scripted((2,), {("t0000", 2): Decision.STOP}))
    trial = tune.run(0)
    tune.report(trial, 1)
    tune.scheduler.on_trial_error(tune, trial)
    trial.status = TuneTrial.ERROR
    assert tune.scheduler.has_place()
    again = tune.run(0)
    assert tune.report(again, 1) == "CONTINUE", "its past, reported again"
    assert tune.report(again, 2) == "STOP"


def test_without_a_rule_nothing_is_held_back() -> None:
    tune = Tune(NeverStop(), places=2)
    trials = [tune.suggest(number) for number in range(2)]
    assert tune.choose() == "t0000"
    for trial in trials:
        trial.status = TuneTrial.RUNNING
        assert [tune.report(trial, epoch) for epoch in range(1, EPOCHS + 1)] == ["CONTINUE"] * EPOCHS
    assert tune.choose() is None


def test_tune_pickles_nothing_of_the_scheduler() -> None:
    tune = Tune(NeverStop())
    tune.run(0)
    assert vars(pickle.loads(pickle.dumps(tune.scheduler))) == {}


def test_a_place_is_kept_for_a_promoted_trial_before_tune_looks_at_it() -> None:
    """Tune asks the searcher for a new trial first."""
    tune = Tune(Scripted((1,), PAUSED, {("t0000", 1): ("t0001", 1)}))
    first = tune.run(0)
    assert tune.report(first, 1) == "PAUSE"
    second = tune.run(1)
    tune.report(second, 1)
    tune.end(second, {"epoch": 1, "final": True})
    assert not tune.scheduler.has_place()
    assert tune.choose() == "t0000"


def test_a_trial_that_tune_starts_again_keeps_its_place() -> None:
    """Its actor died: until it is pending again it is an error, and a new trial would know less than it should."""
    tune = Tune(NeverStop())
    trial = tune.run(0)
    for status in (TuneTrial.ERROR, TuneTrial.PENDING, TuneTrial.RUNNING):
        trial.status = status
        assert not tune.scheduler.has_place(), status
    trial.status = TuneTrial.ERROR
    tune.scheduler.on_trial_error(tune, trial)
    assert tune.scheduler.has_place(), "it was given up"
