"""What the sampler draws next depends neither on the order of reports nor on the moment at which a driver is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from test_searcher import Bench, result_of, run

from tuner.search.sampling.library import STARTUP_TRIALS
from tuner.search.searcher import FINISHED, StudySearcher
from tuner.study.config import SamplerName

# Enough of them that the sampler models what it was told.
BEFORE, AT_ONCE, AFTER = STARTUP_TRIALS + 1, 3, 2
ORDERS = ((0, 1, 2), (2, 1, 0), (1, 2, 0))
TRIALS = BEFORE + AT_ONCE + AFTER
SAMPLERS: tuple[SamplerName, ...] = ("gp", "tpe")
MOMENTS = ("drawn, not written", "written, not trained", "trained, not told", "told to the database alone")


class Study(Bench):
    """In memory, which outlives the searchers here: nothing is tested of the file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.storage = optuna.storages.InMemoryStorage()

    def study(self) -> optuna.Study:
        directions = [objective.direction for objective in self.objectives]
        return optuna.create_study(storage=self.storage, study_name="s", directions=directions, load_if_exists=True)


class Killed(Exception):
    """Stands for the end of the process."""


def side_by_side(searcher: StudySearcher, order: tuple[int, ...]) -> list[dict[str, Any]]:
    """Three trials are suggested at once and report in this order; returns all that is suggested."""
    told = run(searcher, most=BEFORE)
    running = [searcher.suggest(f"at once {place}") for place in range(AT_ONCE)]
    for place in order:
        searcher.on_trial_complete(f"at once {place}", result_of(running[place]))
    return [*told, *running, *run(searcher)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_reports_in_any_order_lead_to_the_same_suggestions(tmp_path: Path, sampler: SamplerName) -> None:
    found = []
    for order in ORDERS:
        found.append(side_by_side(Study(tmp_path).searcher(TRIALS, 3, sampler), order))
    assert len(found[0]) == TRIALS
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_study_that_lacked_one_report_goes_on_in_the_same_way(tmp_path: Path, sampler: SamplerName) -> None:
    """The last of three reports was under way when the driver was killed: its trial is trained once more, first."""
    expected = side_by_side(Study(tmp_path).searcher(TRIALS, 3, sampler), (0, 1, 2))
    killed = Study(tmp_path)
    first = killed.searcher(TRIALS, 3, sampler)
    before = run(first, most=BEFORE)
    running = [first.suggest(f"at once {place}") for place in range(AT_ONCE)]
    for place in (2, 0):
        first.on_trial_complete(f"at once {place}", result_of(running[place]))
    after = run(killed.searcher(TRIALS, 3, sampler))
    assert after[0] == running[1]
    assert [*before, *running, *after[1:]] == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(Study(tmp_path_factory.mktemp("whole")).searcher(TRIALS, 5, "gp"))


@pytest.mark.parametrize("trial", [1, STARTUP_TRIALS + 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_killed_between_ask_write_and_tell_changes_no_suggestion(
    tmp_path: Path, whole: list[dict[str, Any]], moment: str, trial: int
) -> None:
    bench = Study(tmp_path)
    driver = bench.searcher(TRIALS, 5, "gp")
    run(driver, most=trial)
    kill_at(driver, moment)
    told = run(bench.searcher(TRIALS, 5, "gp"))
    numbers = [suggestion["trial"] for suggestion in told]
    first = trial + (moment == "told to the database alone")
    assert numbers == [f"t{number:04d}" for number in range(first, TRIALS)]
    assert told == whole[first:]
    assert bench.searcher(TRIALS, 5, "gp").suggest("more") == FINISHED


def kill_at(driver: StudySearcher, moment: str) -> None:
    """One more trial, until the moment."""

    def kill(*_: object, **__: object) -> None:
        raise Killed

    study, write = driver.study, driver.study.tell
    if moment == "drawn, not written":
        study.add_trial = kill  # type: ignore[method-assign]
        with pytest.raises(Killed):
            driver.suggest("killed")
        return
    suggestion = driver.suggest("killed")
    if moment == "written, not trained":
        return

    def write_and_kill(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise Killed

    study.tell = kill if moment == "trained, not told" else write_and_kill  # type: ignore[assignment,method-assign]
    with pytest.raises(Killed):
        driver.on_trial_complete("killed", result_of(suggestion))
