"""Objectives by name, and the one front and hypervolume against brute force and their defining properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import ArrayLike

from tuner.errors import ConfigError
from tuner.study.objectives import (
    DEFAULT_OBJECTIVES,
    KNOWN,
    MEASURED,
    OBJECTIVES,
    Direction,
    Objective,
    choose_objectives,
    objective_named,
)
from tuner.study.pareto import front, hypervolume

BOTH = choose_objectives(DEFAULT_OBJECTIVES)


def plain(direction: Direction, corner: float = 0.0) -> Objective:
    return Objective(name=direction, direction=direction, scale="linear", kind="measured", corner=corner)


def dominates(a: np.ndarray, b: np.ndarray, objectives: list[Objective]) -> bool:
    """The definition: at least as good everywhere, better somewhere."""
    signs = np.array([1 if objective.direction == "maximize" else -1 for objective in objectives])
    return bool(np.all(a * signs >= b * signs) and np.any(a * signs > b * signs))


def brute_force_front(values: np.ndarray, objectives: list[Objective]) -> list[int]:
    """O(N^2) by the definition: not dominated, and not the repeat of an earlier row."""
    return [
        i
        for i, row in enumerate(values)
        if not any(dominates(other, row, objectives) for other in values)
        and not any((values[j] == row).all() for j in range(i))
    ]


def test_front_of_a_known_case() -> None:
    values = [[0.40, 100], [0.45, 200], [0.44, 300], [0.50, 400], [0.45, 200], [0.50, 500]]
    assert front(values, BOTH) == [0, 1, 3]


@pytest.mark.parametrize("directions", list(itertools.product(["maximize", "minimize"], repeat=3)))
@pytest.mark.parametrize("levels", [3, 6, 1000])
def test_front_equals_brute_force(directions: tuple[Direction, ...], levels: int) -> None:
    """Few levels make ties and repeats common; many make them rare."""
    for count in (1, 2, 3):
        objectives = [plain(direction) for direction in directions[:count]]
        values = np.random.default_rng(levels).integers(0, levels, size=(60, count)).astype(float)
        assert front(values, objectives) == brute_force_front(values, objectives)


def test_front_ignores_rows_without_a_result() -> None:
    assert front([[math.nan, 1.0], [0.3, 2.0], [0.9, math.nan]], BOTH) == [1]
    assert front([], BOTH) == []
    assert front([[math.nan]], BOTH[:1]) == []


@pytest.mark.parametrize("values", [[[1.0]], [1.0, 2.0], [[[1.0, 2.0]]]])
def test_values_of_another_shape_are_refused(values: ArrayLike) -> None:
    for function in (front, hypervolume):
        with pytest.raises(ValueError, match="objectives"):
            function(values, BOTH)
    with pytest.raises(ValueError, match="no objectives"):
        front([[1.0]], [])


def test_hypervolume_counts_costs_in_decades_below_the_corner() -> None:
    """A recall of 0.5 at 10^6 parameters has three decades to 10^9; a second point adds its own strip."""
    assert hypervolume([[0.5, 1e6]], BOTH) == pytest.approx(0.5 * 3)
    assert hypervolume([[0.5, 1e6], [0.4, 1e5]], BOTH) == pytest.approx(0.5 * 3 + 0.4 * 1)
    assert hypervolume([[0.5, 1e6], [0.3, 1e7]], BOTH) == pytest.approx(0.5 * 3), "dominated points add nothing"
    assert hypervolume([[0.5, 1e10]], BOTH) == 0, "beyond the corner"
    assert hypervolume([[math.nan, 1e6]], BOTH) == hypervolume([], BOTH) == 0


def test_hypervolume_of_one_objective_is_the_best_value() -> None:
    assert hypervolume([[0.4], [0.7], [0.1]], BOTH[:1]) == pytest.approx(0.7)


def test_hypervolume_of_three_objectives_equals_sampling() -> None:
    """Share of the unit cube that any row dominates: the definition, sampled; 0.01 is five standard errors."""
    objectives = [plain("maximize"), plain("minimize", 1.0), plain("maximize")]
    values = np.random.default_rng(0).random((8, 3))
    draws = np.random.default_rng(1).random((60_000, 3))
    covered = (
        (values[:, None, 0] >= draws[:, 0]) & (values[:, None, 1] <= draws[:, 1]) & (values[:, None, 2] >= draws[:, 2])
    ).any(axis=0)
    assert hypervolume(values, objectives) == pytest.approx(float(covered.mean()), abs=0.01)


def test_a_zero_cost_has_a_place_on_the_scale() -> None:
    """The projection alone has no LoRA parameters."""
    recall, lora = choose_objectives(["recall@10", "lora_parameters"])
    assert front([[0.4, 0], [0.3, 1000]], (recall, lora)) == [0]
    assert hypervolume([[0.4, 0]], (recall, lora)) == pytest.approx(0.4 * 9)


# Names


def test_metrics_come_before_costs_in_the_order_given() -> None:
    names = ["trainable_parameters", "audio_to_text_R@5", "training_flops", "recall@10"]
    chosen = [objective.name for objective in choose_objectives(names)]
    assert chosen == ["audio_to_text_R@5", "recall@10", "trainable_parameters", "training_flops"]


def test_every_objective_knows_its_kind() -> None:
    for name in MEASURED:
        assert (OBJECTIVES[name].direction, OBJECTIVES[name].scale) == ("maximize", "linear")
    for name in KNOWN:
        assert (OBJECTIVES[name].direction, OBJECTIVES[name].scale) == ("minimize", "log")
    assert set(KNOWN) == {
        "trainable_parameters",
        "lora_parameters",
        "adapter_bytes",
        "training_flops",
        "inference_flops",
    }


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["recal@10"], r"objective recal@10: is not a known metric or cost; did you mean recall@10\?"),
        (["loss"], "objective loss: is not a known metric or cost; give one of recall@1, "),
        (["recall@10", "recall@10"], "objective recall@10: is given twice"),
        (["trainable_parameters"], "there are only costs; add a metric to maximise"),
        (["x" * 1_000_000], r"objective x{100}\.\.\.: is not a known"),
    ],
)
def test_wrong_objectives_are_one_sentence(names: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        choose_objectives(names)


def test_an_objective_is_the_one_of_its_name() -> None:
    assert objective_named("recall@10") is OBJECTIVES["recall@10"]


def test_files_name_an_objective_without_its_corner() -> None:
    """It is fixed in the code: another one in a file would change nothing."""
    assert objective_named("recall@10").to_values() == {
        "name": "recall@10",
        "direction": "maximize",
        "scale": "linear",
        "kind": "measured",
    }
