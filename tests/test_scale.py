"""The simulation of large clusters: its clock, what it takes from the recording, and that its sums are a search's."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from benchmarks import scale
from benchmarks.overheads import coordinator_rate, run_without_training
from benchmarks.recorded import NEIGHBOURS, Overheads, RecordedSearch
from benchmarks.scale import front_volume, shares
from benchmarks.simulation import Outcome, Plan, simulate
from benchmarks.virtual_time import VirtualLoop, run_virtually
from tuner.config import TrialConfig
from tuner.lanes.fleet import connected
from tuner.search.request import fixed_configurations
from tuner.study.folder import StudyFolder
from tuner.study.journal import read_history

HOUR = 3600.0
FREE = Overheads(*(0.0,) * 7)


@pytest.fixture(scope="module")
def record() -> RecordedSearch:
    return RecordedSearch.load()


def no_time() -> float:
    """The clock of a driver that thinks in no time."""
    return 0.0


def simulated(record: RecordedSearch, folder: Path, plan: Plan, overheads: Overheads = FREE) -> Outcome:
    folder.mkdir()
    return simulate(plan, replace(record, overheads=overheads), folder, no_time)


# The clock


def test_virtual_hours_pass_in_order_and_in_no_time() -> None:
    loop, seen = VirtualLoop(), list[tuple[str, float]]()

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, loop.time()))

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), HOUR / 2)
        await asyncio.gather(sleeper("long", 5 * HOUR), sleeper("short", HOUR))

    started = time.monotonic()
    run_virtually(main(), loop)
    assert time.monotonic() - started < HOUR / 60
    assert [name for name, _ in seen] == ["short", "long"]
    assert [seconds for _, seconds in seen] == pytest.approx([1.5 * HOUR, 5.5 * HOUR])


def test_waiting_for_ever_is_an_error() -> None:
    """With a real clock such a mistake hangs."""

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run_virtually(main(), VirtualLoop())


# The recording


def test_the_recording_counts_parameters_as_the_search_did(record: RecordedSearch) -> None:
    """The encoder is rebuilt from the file; what the real lanes reported is the reference."""
    for trial in record.trials:
        assert {row["trainable_parameters"] for row in trial.rows} == {record.parameters(trial.config)}


def test_a_recorded_configuration_learns_what_it_learned(record: RecordedSearch) -> None:
    for trial in record.trials:
        rows, pace = record.train(trial.config.model_copy(update={"seed": 9}))
        assert [row["recall@10"] for row in rows] == [row["recall@10"] for row in trial.rows]
        assert pace == pytest.approx(trial.seconds / record.mean_seconds)


def test_another_configuration_learns_what_its_neighbours_learned(record: RecordedSearch) -> None:
    """Beside a recorded one it learns almost the same; anywhere, no more and no less than those around it."""
    trial = next(trial for trial in record.trials if trial.config.lora and record.space.params_of(trial.config))
    beside = trial.config.model_copy(
        update={"optim": trial.config.optim.model_copy(update={"lora_lr": trial.config.optim.lora_lr * 1.0001})}
    )
    rows, _ = record.train(beside)
    assert rows[-1]["recall@10"] == pytest.approx(trial.rows[-1]["recall@10"], abs=1e-3)
    params = record.space.params_of(trial.config)
    assert params is not None
    far = record.space.build({**params, "lora.rank": 2, "optim.head_lr": 2e-2, "optim.lora_lr": 5e-3})
    weighed = record._nearest(far)
    assert len(weighed) == NEIGHBOURS
    assert sum(weight for weight, _ in weighed) == pytest.approx(1)
    recalls = [neighbour.rows[-1]["recall@10"] for _, neighbour in weighed]
    assert min(recalls) <= record.train(far)[0][-1]["recall@10"] <= max(recalls)
    assert record.train(far)[0][-1]["trainable_parameters"] == record.parameters(far)


def test_a_configuration_outside_the_space_is_refused(record: RecordedSearch) -> None:
    lora = fixed_configurations()["recommended"].lora
    assert lora is not None
    with pytest.raises(ValueError, match="outside the space"):
        record.train(TrialConfig(lora=lora.model_copy(update={"rank": 3000})))


def test_a_recording_is_read_as_it_was_written(record: RecordedSearch, tmp_path: Path) -> None:
    record.save(tmp_path / "again.json")
    assert RecordedSearch.load(tmp_path / "again.json") == record


# The simulation


def test_one_gpu_takes_the_sum_of_its_trials(record: RecordedSearch, tmp_path: Path) -> None:
    """Without overheads and with one lane there is a closed form."""
    plan = Plan(gpus=1, trials=9, epoch_seconds=60, first_node=100, last_node=100)
    overheads = replace(FREE, lane_start=20, confirm_epochs=0.5)
    outcome = simulated(record, tmp_path / "one", plan, overheads)
    configs = [TrialConfig.model_validate_json(trial.user_attrs["config"]) for trial in study(tmp_path / "one")]
    work = sum(record.epochs * 60 * record.train(config)[1] for config in configs)
    assert outcome.trials_end == pytest.approx(100 + 20 + work)
    assert outcome.end == pytest.approx(outcome.trials_end + 0.5 * 60 * outcome.confirmed)
    parts = shares(plan, outcome)
    assert parts["work"] == pytest.approx(work / outcome.end)
    assert parts["nodes"] == pytest.approx(100 / outcome.end)
    assert parts["driver"] == pytest.approx(0, abs=1e-9)


def test_lanes_stay_to_share_the_front(record: RecordedSearch, tmp_path: Path) -> None:
    plan = Plan(gpus=4, trials=16, epoch_seconds=60, first_node=100, last_node=100)
    outcome = simulated(record, tmp_path / "four", plan, replace(FREE, confirm_epochs=0.5))
    stayed = [lane for lane in outcome.lanes if lane.left >= outcome.trials_end]
    assert len(stayed) == min(plan.gpus, outcome.confirmed)
    rounds = math.ceil(outcome.confirmed / len(stayed))
    assert outcome.end - outcome.trials_end == pytest.approx(rounds * 0.5 * 60)


def study(folder: Path, name: str = "s") -> list[FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{StudyFolder(folder).database}").trials


@pytest.fixture(scope="module")
def eight(record: RecordedSearch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Outcome, Path]:
    folder = tmp_path_factory.mktemp("scale") / "eight"
    folder.mkdir()
    plan = Plan(gpus=8, trials=40, epoch_seconds=10)
    overheads = Overheads(15.0, 2.0, 0.02, 0.005, 0.1, 0.002, 0.3)
    return plan, simulate(plan, replace(record, overheads=overheads), folder, time.perf_counter), folder


def test_a_simulated_search_is_a_whole_study(eight: tuple[Plan, Outcome, Path], record: RecordedSearch) -> None:
    """Database, journal and table are written by the search's own code, and every trial was trained once."""
    plan, outcome, folder = eight
    trials = study(folder)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * plan.trials
    history, fault = read_history(StudyFolder(folder))
    assert fault is None
    assert [(t.state, len(t.epochs)) for t in history.trials] == [("complete", record.epochs)] * plan.trials
    assert [t.value("trainable_parameters") for t in history.trials] == [trial.values[1] for trial in trials]
    assert sorted(outcome.values) == sorted((trial.values[0], trial.values[1]) for trial in trials)
    work = sum(
        record.epochs * plan.epoch_seconds * record.train(TrialConfig.model_validate_json(t.user_attrs["config"]))[1]
        for t in trials
    )
    assert sum(lane.worked for lane in outcome.lanes) == pytest.approx(work)
    assert all(lane.worked > 0 for lane in outcome.lanes), "every lane had its trials"
    lefts = sorted(lane.left for lane in outcome.lanes)
    assert lefts[0] < outcome.trials_end < lefts[-1] <= outcome.end, "lanes without a trial end, one stays to confirm"


def test_the_shares_are_all_of_the_time(eight: tuple[Plan, Outcome, Path]) -> None:
    plan, outcome, _ = eight
    parts = shares(plan, outcome)
    assert sum(parts.values()) == pytest.approx(1)
    assert all(share >= 0 for share in parts.values()), parts
    # The searcher's time may hide behind the wait for messages, which is counted first.
    assert parts["driver"] + parts["calls"] > 0
    assert set(outcome.driver) == {"ask", "tell", "record", "tune"}
    assert all(seconds > 0 for seconds in outcome.driver.values())


def test_the_tables_have_a_row_for_each_search(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(trials=8, gpus="1,2", epoch_seconds="5", first_node=1, last_node=2, seed=0, cpu_clock=True, real=None)
    printed = capsys.readouterr().out
    assert printed.count("1 x 5 s") == printed.count("2 x 5 s") == 3
    assert "recorded: `tuner search" in printed


def test_overheads_slow_a_search_down_by_what_they_are(record: RecordedSearch, tmp_path: Path) -> None:
    """On one lane nothing hides them: a change of trial and a slow driver are paid for in full."""
    plan = Plan(gpus=1, trials=6, epoch_seconds=1000, first_node=0, last_node=0)
    free = simulated(record, tmp_path / "free", plan)
    change = simulated(record, tmp_path / "change", plan, replace(FREE, change=3.0))
    driver = simulated(record, tmp_path / "driver", plan, replace(FREE, tune_epoch=2.0))
    assert change.trials_end - free.trials_end == pytest.approx(3.0 * (plan.trials - 1))
    assert shares(plan, change)["calls"] * change.end == pytest.approx(3.0 * plan.trials, rel=0.3)
    # Only the last epoch of a trial keeps its lane waiting: the others are noted while the next one trains.
    assert driver.trials_end - free.trials_end == pytest.approx(2.0 * plan.trials)


def test_the_volume_is_that_of_the_rectangles(record: RecordedSearch) -> None:
    baseline = next(trial.rows[-1]["recall@10"] for trial in record.trials if trial.config.lora is None)
    _, largest = record.space.parameter_range(record.parameters)
    values = [(baseline + 0.02, largest / 100), (baseline + 0.05, largest / 10), (baseline + 0.04, largest / 5)]
    assert front_volume(values, record) == pytest.approx(2 * 1 + 5 * 1)
    assert front_volume([(baseline, largest / 100)], record) == 0
    assert math.isclose(front_volume(values[:1], record), 2 * 2)


# Real Ray


def test_what_stands_between_trials_is_measured_through_real_ray(record: RecordedSearch, tmp_path: Path) -> None:
    with connected(None, False):
        done = run_without_training(record, tmp_path / "real", trials=6, epochs=2, lanes=2)
        rate = coordinator_rate(record, side_by_side=4, trials=12, epochs=2)
    assert done.wall > 0
    assert 0 < sum(done.own.values()) < done.thread
    assert set(done.own) == {
        "StudySearcher.suggest",
        "StudySearcher.on_trial_complete",
        "Recorder.on_trial_start",
        "Recorder.on_trial_result",
        "Recorder.on_trial_complete",
    }
    assert rate > 0
    assert [trial.state for trial in study(tmp_path / "real", "real")] == [TrialState.COMPLETE] * 6
