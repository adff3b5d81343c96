"""What is believed of complete trials: luck is doubted, agreement is believed, and probabilities mean what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuner.config import LoraSpec, OptimSpec, TrialConfig
from tuner.search.judgement import ENOUGH, _probabilities, judge
from tuner.space import load_space
from tuner.study.events import EpochDone, State
from tuner.study.history import Trial
from tuner.study.objectives import TRAINABLE_PARAMETERS, choose_objectives
from tuner.study.pareto import front

BOTH = choose_objectives(["recall@10", TRAINABLE_PARAMETERS])
SPACE = load_space("attention_only")
NOISE = 0.01


def trial(number: int, rank: int, recall: float, lr: float = 2e-3, state: State = "complete", seed: int = 0) -> Trial:
    lora = LoraSpec(rank=rank, dropout=0.1, targets=("q_proj", "v_proj"))
    config = TrialConfig(lora=lora, optim=OptimSpec(lora_lr=lr), seed=seed)
    made = Trial(f"t{number:04d}", "sampled", config, {TRAINABLE_PARAMETERS: 1e5 + 3000.0 * rank}, state=state)
    made.epochs[1] = EpochDone(trial=made.trial, epoch=1, metrics={"recall@10": recall})
    return made


def truth(rank: int, lr: float = 2e-3) -> float:
    return 0.40 + 0.03 * math.log2(rank) / 6 - 0.02 * math.log(lr / 2e-3) ** 2


def study(seed: int, count: int = 25) -> tuple[list[Trial], list[float]]:
    """Trials with noise, and their true values."""
    random = np.random.default_rng(seed)
    ranks = np.exp(random.uniform(math.log(2), math.log(64), count)).round().astype(int).tolist()
    rates = np.exp(random.uniform(math.log(5e-4), math.log(5e-3), count)).tolist()
    true = [truth(rank, lr) for rank, lr in zip(ranks, rates, strict=True)]
    drawn = zip(ranks, rates, true, strict=True)
    return [trial(n, rank, value + random.normal(0, NOISE), lr) for n, (rank, lr, value) in enumerate(drawn)], true


def test_too_few_trials_are_not_judged() -> None:
    assert judge(study(0, ENOUGH - 1)[0], SPACE, BOTH) == {}
    assert len(judge(study(0, ENOUGH)[0], SPACE, BOTH)) == ENOUGH


def test_a_lucky_value_is_doubted() -> None:
    """Some trials of one kind have 0.40, give or take noise; one of them was measured with 0.44."""
    random = np.random.default_rng(1)
    trials = [trial(n, 8, 0.40 + random.normal(0, NOISE), lr=1e-3 * (1 + n / 10)) for n in range(ENOUGH)]
    lucky = trial(ENOUGH, 8, 0.44, lr=1.55e-3)
    belief = judge([*trials, lucky], SPACE, BOTH)[lucky.trial]
    assert 0.40 < belief.expected["recall@10"] < 0.425


def test_what_is_repeated_is_averaged_and_surer() -> None:
    base, _ = study(2, ENOUGH)
    once = judge([*base, trial(ENOUGH, 16, 0.45)], SPACE, BOTH)[f"t{ENOUGH:04d}"]
    often = judge([*base, *(trial(ENOUGH + n, 16, 0.45, seed=n) for n in range(6))], SPACE, BOTH)[f"t{ENOUGH:04d}"]
    assert abs(often.expected["recall@10"] - 0.45) < abs(once.expected["recall@10"] - 0.45)
    assert often.deviation["recall@10"] < once.deviation["recall@10"]


def test_expected_values_are_closer_to_the_truth_than_measured_ones() -> None:
    raw, believed = [], []
    for seed in range(8):
        trials, true = study(seed)
        beliefs = judge(trials, SPACE, BOTH)
        raw += [each.value("recall@10") - value for each, value in zip(trials, true, strict=True)]
        believed += [beliefs[t.trial].expected["recall@10"] - value for t, value in zip(trials, true, strict=True)]
    assert np.std(believed) < 0.8 * np.std(raw)


def test_probabilities_are_calibrated() -> None:
    """Of trials that are on the front with probability p, a share of about p truly is."""
    pairs = []
    for seed in range(12):
        trials, true = study(seed)
        beliefs = judge(trials, SPACE, BOTH)
        rows = [[value, each.value(TRAINABLE_PARAMETERS)] for each, value in zip(trials, true, strict=True)]
        pairs += [(beliefs[each.trial].probability, n in front(rows, BOTH)) for n, each in enumerate(trials)]
    for low, high in ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0)):
        chosen = [(p, hit) for p, hit in pairs if low <= p <= high]
        expected, share = np.mean([p for p, _ in chosen]), np.mean([hit for _, hit in chosen])
        assert share == pytest.approx(expected, abs=0.25), (low, high, len(chosen))


def test_the_front_is_that_of_the_expected_values() -> None:
    trials, _ = study(3)
    beliefs = judge(trials, SPACE, BOTH)
    rows = [[beliefs[t.trial].expected["recall@10"], t.value(TRAINABLE_PARAMETERS)] for t in trials]
    assert {t.trial for n, t in enumerate(trials) if n in front(rows, BOTH)} == {
        name for name, belief in beliefs.items() if belief.on_front
    }
    assert judge(trials, SPACE, BOTH) == beliefs, "the same every time"


def test_probabilities_of_one_metric_are_those_of_the_fronts() -> None:
    """The fast way against a front for each sample, with two trials of one cost."""
    random = np.random.default_rng(0)
    samples, costs = random.random((50, 9, 1)), np.array([[1.0], [2], [2], [3], [5], [4], [4], [4], [9]])
    counts = np.zeros(9)
    for sample in samples:
        counts[front(np.column_stack([sample, costs]), BOTH)] += 1
    np.testing.assert_array_equal(_probabilities(samples, costs, BOTH), counts / 50)


def test_failed_and_stopped_trials_are_not_judged() -> None:
    trials, _ = study(4, ENOUGH + 2)
    trials[0].state, trials[1].state = "failed", "stopped"
    assert set(judge(trials, SPACE, BOTH)) == {each.trial for each in trials[2:]}
