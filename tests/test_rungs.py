"""Which epochs are rungs."""

from __future__ import annotations

import pytest

from tuner.study.rungs import is_due, rung_epochs


@pytest.mark.parametrize(
    ("epochs", "first", "factor", "rungs"),
    [
        (20, 1, 3, (1, 3, 9)),
        (9, 1, 3, (1, 3)),
        (10, 1, 3, (1, 3, 9)),
        (8, 2, 2, (2, 4)),
        (1, 1, 3, ()),
        (2, 1, 2, (1,)),
    ],
)
def test_rungs_grow_by_a_factor_and_end_before_the_last_epoch(
    epochs: int, first: int, factor: int, rungs: tuple[int, ...]
) -> None:
    assert rung_epochs(epochs, first, factor) == rungs


@pytest.mark.parametrize(("first", "factor"), [(0, 3), (1, 1)])
def test_rungs_that_never_grow_are_refused(first: int, factor: int) -> None:
    with pytest.raises(ValueError, match="at least 1 and 2"):
        rung_epochs(9, first, factor)


def test_a_decision_is_due_at_a_rung_and_never_after_the_last_epoch() -> None:
    assert [epoch for epoch in range(6) if is_due(epoch, (1, 3, 5), epochs=5)] == [1, 3]
