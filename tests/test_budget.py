"""A search that ends in a given time, by a clock that the test moves."""

from __future__ import annotations

from datetime import UTC, datetime

from tuner.config import LoraSpec, TrialConfig
from tuner.search.budget import VALIDATIONS_PER_POINT, Budget, ends_at
from tuner.study.config import StudyConfig
from tuner.study.events import BASELINE, EpochDone, StudyStarted, TrialStarted
from tuner.study.history import History
from tuner.study.progress import Progress

LORA = TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj",)))


def history(*seconds: float) -> History:
    """The projection alone, which is far faster, and a trial with epochs of these seconds, 10 of them validation."""
    known = History()
    known.apply(TrialStarted(trial="t0000", origin=BASELINE, config=TrialConfig()))
    known.apply(EpochDone(trial="t0000", epoch=1, train_seconds=0.1, validation_seconds=0.1))
    known.apply(TrialStarted(trial="t0001", origin="sampled", config=LORA))
    for number, each in enumerate(seconds, start=1):
        known.apply(EpochDone(trial="t0001", epoch=number, train_seconds=each - 10, validation_seconds=10))
    return known


def test_a_trial_begins_while_it_would_end_in_time() -> None:
    now = [0.0]
    budget = Budget(1, clock=lambda: now[0])
    # Three epochs of 100 s and the confirmation of four points, two at a time.
    needed = 3 * 100 + 2 * VALIDATIONS_PER_POINT * 10
    for passed, allowed in ((0, True), (3600 - needed, True), (3600 - needed + 1, False)):
        now[0] = passed
        assert budget.allows(history(100, 90, 200), epochs=3, points=4, places=2) == allowed, passed
    now[0] = 3600 - needed
    assert not budget.allows(history(100, 90, 200), epochs=3, points=5, places=2), "a third round of confirmation"
    assert budget.sentence == "no further trial would end within 1 hours, so the search ends here"


def test_nothing_is_known_before_an_epoch_with_lora() -> None:
    assert Budget(0.01).allows(history(), epochs=9, points=9, places=1)


def test_views_show_when_it_ends() -> None:
    until = ends_at(1.5, datetime(2026, 1, 1, 12, tzinfo=UTC))
    assert until == datetime(2026, 1, 1, 13, 30, tzinfo=UTC)
    plan = StudyStarted(
        study="s", space="full", objectives=("recall@10",), trials=1000, epochs=3, run_dir="runs/s", until=until
    )
    progress = Progress()
    progress.apply(StudyStarted.model_validate_json(plan.to_json()))
    assert progress.outlook() == f"ends by {until.astimezone():%H:%M}"
    assert "ends by" in progress.describe()
    assert StudyConfig.model_fields["trials"].default < 1000
