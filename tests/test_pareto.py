"""The front and the hypervolume against brute force, hand-made cases and their defining properties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tuner.pareto import Direction, dominates, hypervolume, pareto_front

RECALL_AND_PARAMETERS: list[Direction] = ["maximize", "minimize"]


def brute_force_front(values: np.ndarray, directions: list[Direction]) -> list[int]:
    """O(N^2) by the definition: not dominated, and not the repeat of an earlier row."""
    return [
        i
        for i, row in enumerate(values)
        if not any(dominates(other, row, directions) for other in values)
        and not any((values[j] == row).all() for j in range(i))
    ]


def monte_carlo_hypervolume(values: np.ndarray, corner: np.ndarray, draws: int, seed: int) -> float:
    """Share of the unit square, costs to minimise, dominated by any row: the definition, sampled."""
    points = np.random.default_rng(seed).uniform(0, corner, size=(draws, 2))
    below: np.ndarray = values[None, :, :] <= points[:, None, :]
    covered = np.any(np.all(below, axis=2), axis=1)
    return float(covered.mean() * corner.prod())


def test_dominance_respects_each_direction() -> None:
    assert dominates([0.5, 100], [0.4, 200], RECALL_AND_PARAMETERS)
    assert dominates([0.5, 100], [0.5, 200], RECALL_AND_PARAMETERS)
    assert not dominates([0.5, 100], [0.5, 100], RECALL_AND_PARAMETERS)
    assert not dominates([0.5, 300], [0.4, 200], RECALL_AND_PARAMETERS)
    assert not dominates([np.nan, 1], [0.1, 2], RECALL_AND_PARAMETERS)


def test_front_of_a_known_case() -> None:
    values = [[0.40, 100], [0.45, 200], [0.44, 300], [0.50, 400], [0.45, 200], [0.50, 500]]
    assert pareto_front(values, RECALL_AND_PARAMETERS).tolist() == [0, 1, 3]


@pytest.mark.parametrize("directions", list(itertools.product(["maximize", "minimize"], repeat=3)))
@pytest.mark.parametrize("levels", [3, 6, 1000])
def test_front_equals_brute_force(directions: tuple[Direction, ...], levels: int) -> None:
    """Few levels make ties and duplicates common; many make them rare."""
    for objectives in (1, 2, 3):
        chosen = list(directions[:objectives])
        values = np.random.default_rng(levels).integers(0, levels, size=(60, objectives)).astype(float)
        assert pareto_front(values, chosen).tolist() == brute_force_front(values, chosen)


def test_front_ignores_rows_without_a_result() -> None:
    values = [[np.nan, 1.0], [0.3, 2.0], [0.9, np.nan]]
    assert pareto_front(values, RECALL_AND_PARAMETERS).tolist() == [1]
    assert pareto_front([], RECALL_AND_PARAMETERS).tolist() == []
    assert pareto_front([[np.nan]], ["maximize"]).tolist() == []


def test_front_of_equal_rows_keeps_the_first() -> None:
    assert pareto_front([[1.0, 1.0]] * 3, RECALL_AND_PARAMETERS).tolist() == [0]


def test_front_does_not_change_its_input() -> None:
    values = np.array([[0.4, 100.0], [0.5, 50.0]])
    before = values.copy()
    pareto_front(values, RECALL_AND_PARAMETERS)
    np.testing.assert_array_equal(values, before)


def test_hypervolume_of_known_cases() -> None:
    # Staircase (1, 3), (2, 2), (3, 1) below (4, 4): strips of 3 x 1, 2 x 1 and 1 x 1.
    stairs = [[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]]
    assert hypervolume(stairs, [4.0, 4.0], ["minimize", "minimize"]) == 6.0
    assert hypervolume([[0.5, 10.0]], [0.0, 30.0], RECALL_AND_PARAMETERS) == 10.0
    assert hypervolume([[0.2], [0.7], [0.4]], [0.1], ["maximize"]) == pytest.approx(0.6)
    assert hypervolume([[3.0]], [5.0], ["minimize"]) == 2.0


def test_hypervolume_without_a_point_inside_the_reference_is_zero() -> None:
    assert hypervolume([], [0.0, 1.0], RECALL_AND_PARAMETERS) == 0.0
    assert hypervolume([[0.0, 0.5], [0.5, 1.0], [np.nan, 0.0]], [0.0, 1.0], RECALL_AND_PARAMETERS) == 0.0


def test_hypervolume_agrees_with_sampling() -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).uniform(0, 1.1, size=(12, 2))
        corner = np.array([1.0, 1.0])
        sampled = monte_carlo_hypervolume(values, corner, draws=20_000, seed=seed + 100)
        # Standard error is at most 0.5 / sqrt(20,000) = 0.0035: four of them.
        assert hypervolume(values, corner, ["minimize", "minimize"]) == pytest.approx(sampled, abs=0.014)


def test_hypervolume_never_shrinks_when_a_point_is_added() -> None:
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.uniform(0, 1, 50), rng.uniform(0, 1e6, 50)])
    volumes = [hypervolume(values[:n], [0.0, 1e6], RECALL_AND_PARAMETERS) for n in range(51)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(volumes))
    front = pareto_front(values, RECALL_AND_PARAMETERS)
    assert hypervolume(values[front], [0.0, 1e6], RECALL_AND_PARAMETERS) == pytest.approx(volumes[-1], rel=1e-12)
    assert volumes[-1] > 0


def test_wrong_shapes_and_directions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\) do not match 1"):
        pareto_front([[1.0, 2.0]], ["maximize"])
    with pytest.raises(ValueError, match="'maximize' or 'minimize'"):
        pareto_front([[1.0]], ["up"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one or two objectives"):
        hypervolume([[1.0] * 3], [0.0] * 3, ["maximize"] * 3)
