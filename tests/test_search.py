"""Whole searches on the tiny store with a real embedded Ray, also killed, interrupted and extended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna_dashboard
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Tiny
from optuna.trial import TrialState
from searches import STUDY, Ended, Runs, epochs_of

from tuner import cli
from tuner.config import TrialConfig
from tuner.encoders.registry import inspect_encoder
from tuner.leftovers import lives
from tuner.lora.placement import resolve_placement, trainable_parameters
from tuner.study.events import EpochDone
from tuner.study.objectives import choose_objectives
from tuner.study.pareto import front
from tuner.train.export import read_card

# Several searches share a fixture, and each starts a Ray of its own.
pytestmark = pytest.mark.timeout(600)

TRIALS = 4
LONG = 20  # epochs of a trial that is to be caught in the middle


def settings_of(runs: Runs) -> list[dict[str, Any]]:
    """The configurations of a study in the order of its trials."""
    return [json.loads(trial.user_attrs["config"]) for trial in runs.trials()]


def test_more_lanes_than_the_machine_has_leave_no_study(tiny: Tiny, tmp_path: Path) -> None:
    """Known only once Ray is up; the same command must work with a number that fits."""
    runs = Runs(tmp_path, tiny)
    with runs.driver(*runs.new("--trials", 1, "--lanes", 9999)) as driver:
        ended = driver.wait()
    assert ended.code == 2
    assert "--lanes 9999 with --workers 1 need as many CPUs" in ended.err
    assert not runs.study.exists()


# A search that nobody disturbs


@dataclass
class Search:
    runs: Runs
    ended: Ended


@pytest.fixture(scope="module")
def search(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Search:
    runs = Runs(tmp_path_factory.mktemp("search"), tiny)
    return Search(runs, runs.finish(*runs.new("--trials", TRIALS, "--epochs", 2, "--json")))


def test_the_driver_imports_no_torch(search: Search) -> None:
    assert json.loads(search.ended.err.splitlines()[-1]) == {"imported": []}


def test_standard_output_is_for_programs(search: Search) -> None:
    """With `--json`, every line is an event; nothing of Ray's or Optuna's gets in between, nor on standard error."""
    events = [json.loads(line) for line in search.ended.out.splitlines()]
    kinds = Counter(event["event"] for event in events)
    assert kinds["epoch_done"] == 2 * TRIALS
    assert "arning" not in search.ended.err
    assert "on the front; report: " in search.ended.err


def test_the_study_opens_in_optuna_and_its_dashboard(search: Search) -> None:
    trials = search.runs.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * TRIALS
    app = optuna_dashboard.wsgi(f"sqlite:///{search.runs.study / 'study.db'}")
    request: dict[str, Any] = {"PATH_INFO": "/api/studies"}
    setup_testing_defaults(request)
    status: list[str] = []
    body = b"".join(app(request, lambda line, *_: status.append(line)))
    assert status[0].startswith("200")
    assert STUDY in body.decode()


def test_the_table_has_a_row_for_each_trial_and_epoch(search: Search) -> None:
    rows = pq.read_table(search.runs.study / "trials.parquet").to_pylist()
    assert [(row["number"], row["epoch"]) for row in rows] == [(n, e) for n in range(TRIALS) for e in (1, 2)]
    assert {row["state"] for row in rows} == {"complete"}
    assert [row["origin"] for row in rows[::2]] == ["projection_only", "recommended", "sampled", "sampled"]
    for row, trial in zip(rows[1::2], search.runs.trials(), strict=True):
        assert [row["recall@1"], row["trainable_parameters"]] == trial.values
        assert row["train_seconds"] > 0


def test_the_front_says_everything(search: Search) -> None:
    front = search.runs.front()
    assert (front["study"], front["baseline"]) == (STUDY, "t0000")
    goals = [("recall@1", "maximize"), ("trainable_parameters", "minimize")]
    assert [(goal["name"], goal["direction"]) for goal in front["objectives"]] == goals
    spec = inspect_encoder(search.runs.tiny.encoder)
    for point in front["points"]:
        config = TrialConfig.model_validate(point["config"])
        placement = resolve_placement(spec, config.lora) if config.lora else None
        assert point["target_modules"] == (list(placement.modules) if placement else [])
        assert point["lora_parameters"] == (placement.lora_parameters if placement else 0)
        assert point["trainable_parameters"] == trainable_parameters(spec, config, 8)
        for split in ("validation", "test"):
            for side in ("audio_to_text", "text_to_audio"):
                assert point[split][side].keys() == {"R@1", "R@5", "R@10", "mAP@10", "median_rank", "N"}
        assert point["test"]["audio_to_text"]["N"] == 12
        low, high = point["test"]["intervals"]["recall@1"]
        assert 0 <= low <= point["test"]["recall@1"] <= high <= 1
        paired = point["test_vs_baseline"]["recall@1"]
        assert paired["difference"] == pytest.approx(point["test"]["recall@1"] - front["points"][0]["test"]["recall@1"])
        assert (search.runs.study / point["adapter"] / "card.json").is_file()


def test_the_front_is_the_front_of_the_study(search: Search) -> None:
    """And holds the projection alone and the recommendation, on it or not."""
    values = [trial.values for trial in search.runs.trials()]
    objectives = choose_objectives(["recall@1", "trainable_parameters"])
    best = {f"t{number:04d}" for number in front(values, objectives)}
    points = {point["trial"]: point for point in search.runs.front()["points"]}
    assert {trial for trial, point in points.items() if point["on_front"]} == best
    assert points.keys() == best | {"t0000", "t0001"}
    assert [points[trial]["origin"] for trial in ("t0000", "t0001")] == ["projection_only", "recommended"]
    assert points["t0000"]["config"]["lora"] is None
    assert points["t0001"]["config"]["lora"]["rank"] == 16


def test_evaluating_an_exported_adapter_gives_the_front_exactly(
    search: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = search.runs.front()["points"]
    assert points
    for point in points:
        for split in ("test", "validation"):
            values = evaluated(search.runs, point, split, monkeypatch, capsys)
            if split == "validation":
                del values["intervals"]
            assert values == point[split]


def evaluated(
    runs: Runs, point: dict[str, Any], split: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """What `tuner evaluate` says of an exported adapter."""
    given = ["evaluate", runs.study / point["adapter"], "--data", runs.tiny.store_folder, "--split", split, "--json"]
    monkeypatch.setattr(sys, "argv", ["tuner", *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert values.pop("data") == str(runs.tiny.store_folder)
    assert (values.pop("clips"), values.pop("captions")) == (12, 7)
    del values["adapter"], values["split"]
    return values


def test_the_validation_of_a_point_is_what_the_lane_measured(search: Search) -> None:
    """The export lost nothing: the reloaded adapter has the recall that the trial was chosen for."""
    told = {trial.number: trial.values[0] for trial in search.runs.trials()}
    for point in search.runs.front()["points"]:
        assert point["validation"]["recall@1"] == told[int(point["trial"][1:])]


def test_the_report_is_there(search: Search) -> None:
    page = (search.runs.study / "report.html").read_text()
    assert STUDY in page
    assert "t0001" in page


def test_a_finished_study_leaves_no_temporary_files(search: Search) -> None:
    left = [path for path in search.runs.study.rglob("*") if path.suffix in (".tmp", ".partial")]
    assert left == []


# A search over the parts of a model


def test_placement_is_searched_like_anything_else(
    tiny_qwen: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lane trains the tower, the language model and both side by side; each front point is loaded on its path."""
    space = {
        "name": "parts",
        "description": "Which part of a model to adapt.",
        "fixed": {"lora.rank": 4, "lora.targets": ["q_proj", "v_proj", "fc2"], "optim.lora_lr": 1e-2},
        # The tower is what every study's recommendation adapts.
        "dimensions": {"lora.placement": {"choice": ["language_model", "both"]}},
    }
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(space))
    runs = Runs(tmp_path, tiny_qwen)
    # Recall alone decides, so that the best trial is a point whatever it costs.
    ended = runs.finish(
        *["--data", tiny_qwen.store_folder, "--batch-size", 12, "--precision", "fp32", "--objective", "recall@1"],
        *["--study", STUDY, "--space", "parts.yaml", "--trials", 4, "--epochs", 4, "--pack", 3],
    )
    assert "space parts adapts the language model (language_model, both): taking --path full_forward" in ended.err
    assert json.loads((runs.study / "study.json").read_text())["encoder"]["path"] == "full_forward"
    rows = pq.read_table(runs.study / "trials.parquet").to_pylist()
    placed = {row["trial"]: row["lora.placement"] for row in rows}
    assert set(placed.values()) == {None, "tower", "language_model", "both"}
    assert set(runs.states().values()) == {"complete"}
    spec = inspect_encoder(tiny_qwen.encoder.model_copy(update={"path": "full_forward"}))
    points = runs.front()["points"]
    assert {placed[point["trial"]] for point in points} & {"language_model", "both"}
    for point in points:
        config = TrialConfig.model_validate(point["config"])
        assert point["trainable_parameters"] == trainable_parameters(spec, config, 8)
        beyond = placed[point["trial"]] in ("language_model", "both")
        card = read_card(runs.study / point["adapter"])
        assert card.encoder.path == ("full_forward" if beyond else "audio_tower")
        assert evaluated(runs, point, "test", monkeypatch, capsys) == point["test"]


# A search whose driver is stopped, and whose worker and driver are killed

LOST_SECONDS = 3.0
# A Ray that does not answer for this long has gone.
IMPATIENT = f"""
from tuner.lanes import lifeline
lifeline.LOST_SECONDS = {LOST_SECONDS}
"""


@dataclass
class Killed:
    runs: Runs
    at_worker: list[tuple[str, int]]  # (trial, epoch) pairs in the journal when the worker was killed
    at_driver: list[dict[str, Any]]  # the journal when the driver was killed
    done: list[int]  # trials that the study had as complete then
    went_on: bool  # whether the search trained on after the worker's death
    left: list[psutil.Process]  # what Ray had started for the driver


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """The driver is stopped for a while and then continued, kill -9 of the lane's worker during t0001, kill -9 of the
    driver during t0002, then `--resume`."""
    runs = Runs(tmp_path_factory.mktemp("killed"), tiny, before=IMPATIENT)
    with runs.driver(*runs.new("--trials", TRIALS, "--epochs", LONG)) as driver:
        driver.until(lambda epochs: ("t0000", 1) in epochs)
        driver.process.send_signal(signal.SIGSTOP)
        time.sleep(2 * LOST_SECONDS)
        driver.process.send_signal(signal.SIGCONT)
        at_worker = driver.until(lambda epochs: ("t0001", 3) in epochs)
        driver.lane_worker().kill()
        epochs = driver.until(lambda epochs: ("t0002", 3) in epochs)
        left = driver.descendants()
        driver.process.kill()
        driver.process.communicate()
    at_driver = runs.journal()
    done = [trial.number for trial in runs.trials() if trial.state == TrialState.COMPLETE]
    runs.finish("--resume", STUDY)
    return Killed(runs, at_worker, at_driver, done, len(epochs) > len(at_worker), left)


def test_a_dead_worker_stops_nothing(killed: Killed) -> None:
    assert ("t0001", LONG) not in killed.at_worker, "the worker was killed in the middle of a trial"
    assert killed.went_on
    assert killed.runs.states() == {f"t{n:04d}": "complete" for n in range(TRIALS)}


def test_the_next_search_ends_what_a_killed_driver_has_left(killed: Killed) -> None:
    """Ray's agents would stay for two minutes."""
    assert {process.pid for process in killed.left}
    assert not any(lives(process) for process in killed.left)


def test_a_resumed_study_ends_like_one_that_was_never_killed(killed: Killed, search: Search) -> None:
    """The same configurations, each once, under the same numbers."""
    assert settings_of(killed.runs) == settings_of(search.runs)
    assert [trial.state for trial in killed.runs.trials()] == [TrialState.COMPLETE] * TRIALS
    assert {point["trial"] for point in killed.runs.front()["points"]} >= {"t0000", "t0001"}


def test_finished_trials_are_neither_lost_nor_repeated(killed: Killed) -> None:
    assert killed.done == [0, 1]
    before = [event for event in killed.at_driver if event["trial"] in ("t0000", "t0001")]
    after = [event for event in killed.runs.journal() if event["trial"] in ("t0000", "t0001")]
    assert after == before


def test_each_epoch_is_in_the_journal_once(killed: Killed) -> None:
    counted = Counter(epochs_of(killed.runs.journal()))
    assert counted == {(f"t{n:04d}", epoch): 1 for n in range(TRIALS) for epoch in range(1, LONG + 1)}


@pytest.mark.parametrize("trial", ["t0001", "t0002"])
def test_interrupted_trials_go_on_from_their_last_epoch(killed: Killed, trial: str) -> None:
    """What the checkpoint remembers of each epoch, its training time included, is what was told when it was first
    trained. A trial that had started over would have other times."""
    told = {
        event["epoch"]: event
        for event in killed.at_driver
        if event["event"] == "epoch_done" and event["trial"] == trial
    }
    state = torch.load(killed.runs.study / "checkpoints" / f"{trial}.pt", weights_only=True)
    assert len(state["history"]) == LONG
    assert len(told) >= 3
    for epoch, event in told.items():
        assert EpochDone.from_row(trial, state["history"][epoch - 1]) == EpochDone.model_validate(event)


# A search with two workers a lane, interrupted, then extended


@dataclass
class Interrupted:
    runs: Runs
    ended: Ended
    epochs: list[tuple[str, int]]


@pytest.fixture(scope="module")
def interrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Ctrl-C during t0001 of two trials; resumed for four, of which the sampled ones cannot learn."""
    runs = Runs(tmp_path_factory.mktemp("interrupted"), tiny)
    space = {
        "name": "absurd",
        "description": "Learning rates that end in NaN.",
        "target_sets": {"attention": ["q_proj", "v_proj"]},
        "fixed": {"optim.lora_lr": 1e30},
        "dimensions": {"lora.rank": {"int": [2, 8]}, "lora.targets": {"choice": ["attention", "q_proj"]}},
    }
    (runs.folder / "absurd.yaml").write_text(yaml.safe_dump(space))
    options = runs.new("--space", "absurd.yaml", "--trials", 2, "--epochs", LONG, "--workers", 2)
    with runs.driver(*options) as driver:
        driver.until(lambda epochs: ("t0001", 2) in epochs)
        os.killpg(driver.process.pid, signal.SIGINT)
        ended = driver.wait()
    epochs = epochs_of(runs.journal())
    runs.finish("--resume", STUDY, "--trials", 4, "--workers", 2)
    return Interrupted(runs, ended, epochs)


def test_an_interrupt_says_how_to_go_on(interrupted: Interrupted) -> None:
    assert interrupted.ended.code == 130
    said = [line for line in interrupted.ended.err.splitlines() if line.startswith("tuner: ")]
    assert len(said) == 1
    assert f"`tuner search --resume {STUDY} --runs runs`" in said[0]
    assert "Traceback" not in interrupted.ended.err
    assert ("t0001", LONG) not in interrupted.epochs, "it was interrupted in the middle of a trial"


def test_an_interrupted_search_goes_on_and_can_be_extended(interrupted: Interrupted) -> None:
    states = [trial.state for trial in interrupted.runs.trials()]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    counted = Counter(epochs_of(interrupted.runs.journal()))
    assert counted == {(f"t{n:04d}", epoch): 1 for n in range(2) for epoch in range(1, LONG + 1)}
    assert set(interrupted.epochs) <= counted.keys()
    record = json.loads((interrupted.runs.study / "study.json").read_text())
    assert record["trials"] == 4


def test_a_nan_ends_its_trial_with_a_reason_and_nothing_else(interrupted: Interrupted) -> None:
    rows = pq.read_table(interrupted.runs.study / "trials.parquet").to_pylist()
    failed = {row["trial"]: row["reason"] for row in rows if row["state"] == "failed"}
    assert failed.keys() == {"t0002", "t0003"}
    assert all("loss became nan" in reason for reason in failed.values())
    assert {point["trial"] for point in interrupted.runs.front()["points"]} == {"t0000", "t0001"}


def test_a_lane_of_two_workers_exports_what_it_trained(interrupted: Interrupted) -> None:
    """Rank 0's files hold the pack that both ranks trained: they measure what the lane measured."""
    told = {trial.number: trial.values for trial in interrupted.runs.trials() if trial.values}
    for point in interrupted.runs.front()["points"]:
        card = read_card(interrupted.runs.study / point["adapter"])
        assert [point["validation"]["recall@1"], card.trainable_parameters] == told[int(point["trial"][1:])]
