"""Whole searches in which trials are stopped and paused at rungs, through real Tune and an embedded Ray.

One lane, one adapter at a time, three epochs, a rung after each but the last. The projection alone (t0000) and the
recommendation (t0001) come first; what is sampled then does not depend on how they ended.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny
from optuna.trial import TrialState
from searches import STUDY, Ended, Runs, epochs_of

pytestmark = pytest.mark.timeout(900)

TRIALS, EPOCHS = 5, 3
HERE = str(Path(__file__).parent)
# t0001 stops after its first epoch. t0002 pauses there until t0003 has trained to its end, and after its second epoch
# until t0004 has trained one.
RULE = f"""
import sys
sys.path.insert(0, {HERE!r})
import functools
from scripted_rule import Scripted
from tuner.search import driver
from tuner.study.rungs import Decision
rule = Scripted(
    (1, 2),
    {{("t0001", 1): Decision.STOP, ("t0002", 1): Decision.PAUSE, ("t0002", 2): Decision.PAUSE}},
    {{("t0002", 1): ("t0003", {EPOCHS}), ("t0002", 2): ("t0004", 1)}},
)
driver.run_search = functools.partial(driver.run_search, stopping=rule)
"""
# Kills the actor of the trial that has just ended, before Tune gives it to the next one.
KILLED_CLIENTS = """
import psutil
from tuner.search.searcher import StudySearcher
told = StudySearcher.on_trial_complete
killed = []
def tell_and_kill(self, trial_id, result=None, error=False):
    told(self, trial_id, result, error)
    if not error and len(killed) < 2:
        for process in psutil.Process().children(recursive=True):
            if " ".join(process.cmdline()).startswith(("ray::TrialClient", "ray::tuner-trial-client")):
                process.kill()
                killed.append(process.pid)
StudySearcher.on_trial_complete = tell_and_kill
"""


def epochs_of_trial(runs: Runs, trial: str) -> list[dict[str, Any]]:
    return [event for event in runs.journal() if event["event"] == "epoch_done" and event["trial"] == trial]


def ends_of(runs: Runs) -> list[tuple[str, str]]:
    return [(event["trial"], event["state"]) for event in runs.journal() if event["event"] == "trial_ended"]


def checkpoint(runs: Runs, trial: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(runs.study / "checkpoints" / f"{trial}.pt", weights_only=True)
    return state


# Trials that train to their end, though the actors between them are killed


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("whole"), tiny, before=KILLED_CLIENTS)
    runs.finish(*runs.new("--trials", TRIALS, "--epochs", EPOCHS))
    return runs


def test_an_actor_that_is_killed_between_two_trials_costs_none_of_them(whole: Runs) -> None:
    """Tune reports the death as that of the trial which the actor was to become."""
    assert [trial.state for trial in whole.trials()] == [TrialState.COMPLETE] * TRIALS
    names = [f"t{number:04d}" for number in range(TRIALS)]
    assert sorted(ends_of(whole)) == [(name, "complete") for name in names]
    assert Counter(epochs_of(whole.journal())) == {(name, epoch): 1 for name in names for epoch in (1, 2, 3)}


# Trials that are stopped and paused; Ray's raylet is killed while one is paused


@dataclass
class Decided:
    runs: Runs
    at_kill: list[dict[str, Any]]  # the journal when the raylet had been killed
    ended: Ended


@pytest.fixture(scope="module")
def decided(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Decided:
    runs = Runs(tmp_path_factory.mktemp("decided"), tiny, before=RULE)
    with runs.driver(*runs.new("--trials", TRIALS, "--epochs", EPOCHS)) as driver:
        driver.until(lambda epochs: ("t0002", 2) in epochs)
        (raylet,) = (process for process in driver.descendants() if process.name() == "raylet")
        raylet.kill()
        ended = driver.wait()
    at_kill = runs.journal()
    runs.finish("--resume", STUDY)
    return Decided(runs, at_kill, ended)


def test_a_killed_raylet_is_one_sentence_that_says_how_to_go_on(decided: Decided) -> None:
    """By the driver, or by its child where Ray's C++ has ended the driver first."""
    reasons = {2: "Ray has ended, because its raylet was killed or crashed", 1: "the search was ended from outside"}
    (said,) = [line for line in decided.ended.err.splitlines() if line.startswith("tuner: ")]
    again = f"`tuner search --resume {STUDY} --runs runs`"
    assert said == f"tuner: {reasons[decided.ended.code]}; nothing is lost, resume with {again}"
    assert "Traceback" not in decided.ended.err


def test_a_stopped_trial_has_trained_to_its_rung_and_no_step_further(decided: Decided) -> None:
    state = checkpoint(decided.runs, "t0001")
    assert (state["epoch"], state["within_epoch"]["steps"]) == (1, 0)
    assert [row["epoch"] for row in epochs_of_trial(decided.runs, "t0001")] == [1]


def test_a_stopped_trial_is_pruned_in_the_database_and_stopped_in_the_journal(decided: Decided) -> None:
    states = [trial.state for trial in decided.runs.trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, *[TrialState.COMPLETE] * (TRIALS - 2)]
    ends = [("t0000", "complete"), ("t0001", "stopped"), *((f"t{n:04d}", "complete") for n in range(2, TRIALS))]
    assert sorted(ends_of(decided.runs)) == ends
    assert decided.runs.states() == dict(ends)


def test_another_trial_trains_while_one_is_paused(decided: Decided) -> None:
    """The only lane has one place: t0002 leaves it after its first epoch, and has it again before a new trial."""
    order = [(trial, epoch) for trial, epoch in epochs_of(decided.at_kill) if trial in ("t0002", "t0003", "t0004")]
    assert order[:5] == [("t0002", 1), ("t0003", 1), ("t0003", 2), ("t0003", 3), ("t0002", 2)]


def test_a_trial_that_was_paused_when_the_raylet_was_killed_is_resumed(decided: Decided) -> None:
    assert ("t0002", 3) not in epochs_of(decided.at_kill)
    names = [f"t{number:04d}" for number in range(TRIALS)]
    expected = {(name, epoch): 1 for name in names for epoch in ((1,) if name == "t0001" else (1, 2, 3))}
    assert Counter(epochs_of(decided.runs.journal())) == expected


def test_a_paused_trial_ends_bit_for_bit_as_if_nothing_had_happened(decided: Decided, whole: Runs) -> None:
    """It was paused twice, and its search ended in between."""
    for trial in ("t0002", "t0003", "t0004"):
        told, expected = epochs_of_trial(decided.runs, trial), epochs_of_trial(whole, trial)
        assert [without_times(row) for row in told] == [without_times(row) for row in expected]
        ours, theirs = checkpoint(decided.runs, trial), checkpoint(whole, trial)
        for part in ("lora", "head", "loss"):
            assert torch_equal(ours[part], theirs[part]), (trial, part)


def without_times(row: dict[str, Any]) -> str:
    kept = {key: value for key, value in row.items() if "seconds" not in key and "per_second" not in key}
    return json.dumps(kept, sort_keys=True)


def torch_equal(ours: Any, theirs: Any) -> bool:
    """Whether two lists or mappings of tensors are equal to the last bit."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else ((ours[key], theirs[key]) for key in theirs)
    return all(torch.equal(one, other) for one, other in pairs)
