"""`--logger`: a search seen through TensorBoard's files, MLflow's database and W&B's offline runs, read back."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Tiny
from searches import PATIENCE, STUDY, read_journal
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from tuner import cli
from tuner.errors import ConfigError
from tuner.search.loggers import LoggedTrial, ReadableTrials, make_loggers

TRIALS = ("t0000", "t0001")
EPOCHS = 2
# W&B starts a process for each trial, which takes a while on a busy machine.
pytestmark = pytest.mark.timeout(600)
BLOCK, FULL, LAST = 32 * 1024, 1, 4  # of LevelDB's log format


@dataclass
class Logged:
    """The folder of a study that was searched with all three loggers, and what it noted itself."""

    run_dir: Path

    def rows(self, trial: str) -> list[dict[str, Any]]:
        events = read_journal(self.run_dir)
        epochs = (event for event in events if event["event"] == "epoch_done" and event["trial"] == trial)
        return [{**event, **event["metrics"]} for event in epochs]


@pytest.fixture(scope="module")
def logged(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("loggers")
    given = ["--data", tiny.store_folder, "--batch-size", 12, "--precision", "fp32", "--study", STUDY, "--runs", "runs"]
    options = [*given, "--trials", len(TRIALS), "--epochs", EPOCHS, "--pack", 2]
    for name in ("tensorboard", "mlflow", "wandb"):
        options += ["--logger", name]
    done = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "search", *map(str, options)],
        cwd=folder,
        env=os.environ | {"TUNER_CACHE": str(folder / "cache"), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,  # each logger takes its time, and W&B a process a trial
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Logged(folder / "runs" / STUDY)


def test_tensorboard_has_a_curve_for_each_metric(logged: Logged) -> None:
    for trial in TRIALS:
        (file,) = (logged.run_dir / "tensorboard" / trial).glob("events.out.tfevents.*")
        curves: dict[str, list[tuple[int, float]]] = {}
        for event in tensorboard_events(file):
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curves.setdefault(value.tag, []).append((event.step, value.simple_value))
        rows = logged.rows(trial)
        for metric, key in (
            ("loss", "loss"),
            ("recall_at_10", "recall@10"),
            ("text_to_audio_R_at_1", "text_to_audio_R@1"),
        ):
            expected: list[Any] = [(row["epoch"], pytest.approx(row[key])) for row in rows]
            assert curves[f"ray/tune/{metric}"][:EPOCHS] == expected


def test_tensorboard_has_the_hyperparameters(logged: Logged) -> None:
    (file,) = (logged.run_dir / "tensorboard/t0001").glob("events.out.tfevents.*")
    text = b"".join(event.SerializeToString() for event in tensorboard_events(file))
    for name in (b"lora.rank", b"lora.targets", b"optim.lora_lr", b"origin"):
        assert name in text
    for plumbing in (b"coordinator", b"trial_id", b"hostname"):
        assert plumbing not in text


def tensorboard_events(file: Path) -> Iterator[Event]:
    """Records of a TFRecord file: length, its checksum, data, its checksum."""
    data, place = file.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 12 + length + 4


@pytest.mark.filterwarnings("ignore:.*noload.*")  # mlflow's own mapping, with sqlalchemy 2.1
def test_mlflow_has_a_run_for_each_trial(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{logged.run_dir / 'mlflow/mlflow.db'}")
    experiment = client.get_experiment_by_name(STUDY)
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == set(TRIALS)
    for trial, run in runs.items():
        rows = logged.rows(trial)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["recall_at_10"] == rows[-1]["recall@10"]
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(row["epoch"], row["loss"]) for row in rows]
    assert runs["t0000"].data.params["origin"] == "projection_only"
    assert runs["t0001"].data.params["lora.rank"] == "16"
    assert "coordinator" not in runs["t0001"].data.params


def test_wandb_has_an_offline_run_for_each_trial(logged: Logged) -> None:
    for trial in TRIALS:
        (file,) = (logged.run_dir / "wandb" / trial).glob("wandb/offline-run-*/run-*.wandb")
        records = list(wandb_records(file))
        (run,) = (record.run for record in records if record.HasField("run"))
        assert (run.display_name, run.run_id, run.run_group, run.project) == (trial, f"{STUDY}-{trial}", STUDY, "tuner")
        history = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        told = [(step["epoch"], step["loss"], step["recall_at_10"]) for step in history]
        assert told == [(row["epoch"], row["loss"], row["recall@10"]) for row in logged.rows(trial)]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lora.rank"] == 16
    assert "coordinator" not in config


def wandb_records(file: Path) -> Iterator[Record]:
    """Records of LevelDB's log format behind a head of 7 bytes: pieces of blocks with checksum, length and kind."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(whole)
            whole = b""


def test_the_study_is_as_without_loggers(logged: Logged) -> None:
    """Tune's own folder has none of their files, and the front is there."""
    assert [path for path in (logged.run_dir / "tune").rglob("*") if "tfevents" in path.name] == []
    assert json.loads((logged.run_dir / "front.json").read_text())["points"]


# What they are told


@dataclass
class Told:
    """A logger callback of Ray's that writes down what it is told."""

    calls: list[tuple[Any, ...]]

    def setup(self) -> None:
        """Nothing to connect to."""

    def log_trial_start(self, trial: LoggedTrial) -> None:
        self.calls.append(("start", str(trial), trial.config))

    def log_trial_result(self, iteration: int, trial: LoggedTrial, result: dict[str, Any]) -> None:
        self.calls.append(("result", str(trial), result))

    def log_trial_end(self, trial: LoggedTrial, failed: bool = False) -> None:
        self.calls.append(("end", str(trial), failed))

    def on_experiment_end(self, trials: list[LoggedTrial]) -> None:
        self.calls.append(("experiment", [str(trial) for trial in trials]))


def trial(name: str, **last_result: Any) -> Any:
    config = {"trial": name, "origin": "sampled", "coordinator": "c", "epochs": 2, "config": {"seed": 7}}
    return SimpleNamespace(config=config, last_result=last_result)


def test_a_failure_is_a_failed_run(tmp_path: Path) -> None:
    """Our trials fail with a result, not with an exception as Tune's do."""
    told = Told([])
    callback = ReadableTrials(told, STUDY, tmp_path)
    good, bad, lost = trial("t0000", final=True), trial("t0001", failed="loss became nan"), trial("t0002")
    for item in (good, bad, lost):
        callback.on_trial_start(1, [], item)
    callback.on_trial_result(
        1, [], good, {"epoch": 1, "recall@10": 0.5, "hostname": "h", "config": {}, "trial": "t0000"}
    )
    callback.on_trial_result(1, [], bad, {"failed": "loss became nan", "trial": "t0001", "final": False})
    callback.on_trial_complete(1, [], good)
    callback.on_trial_complete(1, [], bad)
    callback.on_trial_error(1, [], lost)
    callback.on_experiment_end([])
    assert [call for call in told.calls if call[0] == "result"] == [
        ("result", "t0000", {"epoch": 1, "recall_at_10": 0.5, "training_iteration": 1})
    ]
    assert [call for call in told.calls if call[0] == "end"] == [
        ("end", "t0000", False),
        ("end", "t0001", True),
        ("end", "t0002", True),
    ]
    assert told.calls[0][2]["seed"] == 7
    assert told.calls[0][2].keys() & {"coordinator", "epochs", "trial"} == set()
    assert told.calls[-1] == ("experiment", ["t0000", "t0001", "t0002"])


# Mistakes


def test_an_unknown_logger_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tuner", "search", "--logger", "comet", "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "logger comet: is not a known logger; use tensorboard, mlflow, wandb" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_package_names_the_extra(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import, real_import_module = builtins.__import__, importlib.import_module

    def refuse(wanted: str, *arguments: Any, **options: Any) -> Any:
        if wanted.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real_import(wanted, *arguments, **options)

    def refuse_module(wanted: str) -> Any:
        refuse(wanted)
        return real_import_module(wanted)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib, "import_module", refuse_module)
    said = rf"logger {name}: {package} is not installed; run `pip install 'tuner\[{name}\]'`"
    with pytest.raises(ConfigError, match=said):
        make_loggers([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_an_account_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"logger wandb: cannot be set up .*WANDB_API_KEY") as raised:
        make_loggers(["wandb"], tmp_path / "runs")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs/wandb").exists()
