"""The stopping rule by plain numbers: who is stopped, by whom, and what is never stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.config import LoraSpec, TrialConfig
from tuner.search.curves import ENOUGH, Gains
from tuner.search.stopping import NeverStop, StopHopeless
from tuner.study.events import EpochDone, State
from tuner.study.history import Trial
from tuner.study.objectives import TRAINABLE_PARAMETERS, choose_objectives
from tuner.study.ranks import QueryRanks
from tuner.study.rungs import Decision

BOTH = choose_objectives(["recall@10", TRAINABLE_PARAMETERS])
RULE = StopHopeless(BOTH, epochs=3)


def trial(
    number: int, cost: float, curve: Sequence[float], state: State = "complete", ranks: str | None = None
) -> Trial:
    """A trial with this cost and recall after each epoch."""
    config = TrialConfig(lora=LoraSpec(rank=number + 1, targets=("q_proj",)))
    made = Trial(f"t{number:04d}", "sampled", config, {TRAINABLE_PARAMETERS: cost}, state=state)
    for epoch, recall in enumerate(curve, start=1):
        made.epochs[epoch] = EpochDone(trial=made.trial, epoch=epoch, metrics={"recall@10": recall}, ranks=ranks)
    return made


# Each gains 0.10 after its first epoch, give or take 0.01.
KNOWN = [
    trial(0, 1000, [0.30, 0.36, 0.40]),
    trial(1, 2000, [0.34, 0.40, 0.45]),
    trial(2, 3000, [0.33, 0.38, 0.42]),
    trial(3, 4000, [0.35, 0.41, 0.45]),
]


def decide(cost: float, *curve: float, others: Sequence[Trial] = KNOWN) -> Decision:
    return RULE.decide(trial(9, cost, curve, "running"), others).decision


def test_rungs_are_before_the_last_epoch() -> None:
    assert RULE.rungs == (1, 2) and StopHopeless(BOTH, 9).rungs == (1, 2, 4, 8) and StopHopeless(BOTH, 1).rungs == ()


def test_what_a_cheaper_trial_will_beat_is_stopped_with_its_reason() -> None:
    verdict = RULE.decide(trial(9, 2500, [0.20], "running"), KNOWN)
    assert verdict.decision is Decision.STOP
    assert verdict.reason == (
        "after epoch 1 with recall@10 0.200: t0001 costs no more and has 0.450; the chance to be on the front was 0.0%"
    )


@pytest.mark.parametrize(("cost", "recall"), [(2500, 0.35), (2500, 0.34), (1500, 0.30), (500, 0.01), (999, 0.0)])
def test_what_may_be_better_than_all_that_is_cheaper_goes_on(cost: float, recall: float) -> None:
    """Alone at its cost, a trial is never stopped by expensive ones, however good they are."""
    assert decide(cost, recall) is Decision.GO_ON


def test_equal_cost_counts_as_cheaper() -> None:
    assert decide(1000, 0.1) is Decision.STOP and decide(999, 0.1) is Decision.GO_ON


def test_nothing_is_stopped_before_gains_are_known() -> None:
    few = KNOWN[: ENOUGH - 1]
    assert decide(5000, 0.0, others=few) is Decision.GO_ON
    running = [trial(each, 1000, [0.4, 0.5], "running") for each in range(5)]
    assert decide(5000, 0.0, others=running) is Decision.GO_ON, "trials that are not complete beat nobody"


def test_uncertain_gains_let_a_trial_go_on() -> None:
    """The same recall, behind by 0.08 at the end: hopeless where all gain alike, not where gains differ."""
    wild = [trial(n, 1000, [0.40 - gain, 0.40]) for n, gain in enumerate((0.0, 0.1, 0.2, 0.05))]
    assert decide(5000, 0.27) is Decision.STOP
    assert decide(5000, 0.27, others=wild) is Decision.GO_ON


def test_pairs_decide_where_two_separate_means_would_not() -> None:
    """Trials that find the same queries differ for sure; those that find others may differ by chance."""
    ranks = np.array([1] * 55 + [99] * 45)
    better = QueryRanks.of(ranks, ranks).to_text()
    same = QueryRanks.of(np.where(np.arange(100) < 45, 1, 99), np.where(np.arange(100) < 45, 1, 99)).to_text()
    other = QueryRanks.of(np.where(np.arange(100) >= 55, 1, 99), np.where(np.arange(100) >= 55, 1, 99)).to_text()
    known = [trial(n, 1000, [0.549, 0.55], ranks=better) for n in range(4)]

    def chance(found: str) -> Decision:
        return RULE.decide(trial(9, 2000, [0.45], "running", ranks=found), known).decision

    assert (chance(same), chance(other)) == (Decision.STOP, Decision.GO_ON)


def test_a_doubtful_trial_pauses() -> None:
    rule = StopHopeless(BOTH, epochs=3, doubt=0.5)
    stand = trial(9, 2500, [0.343], "running")
    assert rule.decide(stand, KNOWN).decision is Decision.PAUSE
    assert rule.decide(trial(9, 2500, [0.2], "running"), KNOWN).decision is Decision.STOP


def test_with_recall_alone_every_complete_trial_is_a_rival() -> None:
    rule = StopHopeless(BOTH[:1], epochs=3)
    assert rule.decide(trial(9, 1, [0.1], "running"), KNOWN).decision is Decision.STOP


def test_a_trial_is_kept_for_its_best_metric() -> None:
    objectives = choose_objectives(["recall@10", "recall@1", TRAINABLE_PARAMETERS])
    rule = StopHopeless(objectives, epochs=3)

    def both(made: Trial, other: float) -> Trial:
        made.epochs = {
            number: epoch.model_copy(update={"metrics": {**epoch.metrics, "recall@1": other}})
            for number, epoch in made.epochs.items()
        }
        return made

    known = [both(trial(n, 1000, [0.35, 0.45]), 0.1) for n in range(4)]
    assert rule.decide(both(trial(9, 2000, [0.2], "running"), 0.3), known).decision is Decision.GO_ON
    assert rule.decide(both(trial(9, 2000, [0.2], "running"), 0.0), known).decision is Decision.STOP


def test_a_metric_that_is_not_finite_predicts_nothing() -> None:
    assert decide(5000, float("nan")) is Decision.GO_ON
    assert decide(5000, 0.1, others=[trial(n, 1000, [0.3, float("nan")]) for n in range(5)]) is Decision.GO_ON


def test_never_stop_has_no_rung() -> None:
    assert NeverStop().rungs == () and NeverStop().decide(KNOWN[0], KNOWN).decision is Decision.GO_ON


curves = st.lists(st.floats(0, 1), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 5), curves), max_size=8), st.integers(1, 5), curves, st.data())
def test_decisions_do_not_depend_on_the_order_of_reports(
    known: list[tuple[int, list[float]]], cost: int, curve: list[float], data: st.DataObject
) -> None:
    others = [trial(n, c, values, "complete" if len(values) == 3 else "running") for n, (c, values) in enumerate(known)]
    shuffled = data.draw(st.permutations(others))
    stand = trial(99, cost, curve, "running")
    assert RULE.decide(stand, others) == RULE.decide(stand, shuffled)
    dearer = [other for other in others if other.value(TRAINABLE_PARAMETERS) > cost]
    if len(dearer) == len(others):
        assert RULE.decide(stand, others).decision is Decision.GO_ON


def test_a_gain_is_that_of_trials_of_its_kind_if_there_are_enough() -> None:
    """The projection alone gains otherwise than LoRA does."""
    plain = [trial(10 + n, 500, [0.2, 0.4]) for n in range(ENOUGH)]
    for each in plain:
        each.config = TrialConfig()
    few = Gains([*plain[:1], *KNOWN], "recall@10").after(1, has_lora=False)
    many = Gains([*plain, *KNOWN], "recall@10").after(1, has_lora=False)
    assert few is not None and few.mean == pytest.approx(np.mean([0.2, 0.10, 0.11, 0.09, 0.10]))
    assert many is not None and many.mean == pytest.approx(0.2)
    final = Gains(KNOWN, "recall@10").predicted(trial(9, 1, [0.3], "stopped"))
    assert final is not None and final == pytest.approx((0.4, 0.0369), abs=0.001)
