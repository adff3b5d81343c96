"""`--logger`: trials in TensorBoard, MLflow or Weights & Biases, through Ray's own Tune callbacks.

Those callbacks write Tune's trials: a configuration with internal keys, results with Tune's clock and host, files in
Tune's folder. `ReadableTrials` gives them the trial as a user knows it: `t0007`, its hyperparameters by their dotted
names, the metrics of its epochs, and a folder next to the study's other files.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from sqlalchemy.engine import URL

from tuner.config import TrialConfig
from tuner.errors import ConfigError
from tuner.study.events import EpochDone
from tuner.study.history import flat_config
from tuner.study.journal import epoch_row

WANDB_START_SECONDS = 600.0


@dataclass(eq=False)
class LoggedTrial:
    """The part of `ray.tune.experiment.Trial` that Ray's logger callbacks use."""

    name: str
    trial_id: str  # W&B uses it as a run's id, which must be unique in its project
    config: dict[str, object]
    experiment_dir_name: str
    local_path: str
    checkpoint: None = field(default=None, init=False)

    @property
    def evaluated_params(self) -> dict[str, object]:
        """The hyperparameters that TensorBoard shows."""
        return self.config

    def init_local_path(self) -> None:
        """Make the trial's folder."""
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.name


class TrialLogger(Protocol):
    """The methods of `ray.tune.logger.LoggerCallback` that are used, with `LoggedTrial` instead of Tune's trials."""

    def setup(self) -> None: ...

    def log_trial_start(self, trial: LoggedTrial) -> None: ...

    def log_trial_result(self, iteration: int, trial: LoggedTrial, result: dict[str, object]) -> None: ...

    def log_trial_end(self, trial: LoggedTrial, failed: bool = False) -> None: ...

    def on_experiment_end(self, trials: list[LoggedTrial]) -> None: ...


class ReadableTrials(tune.Callback):
    """Passes trials to one of Ray's logger callbacks, as `LoggedTrial`.

    Args:
        logger: a `ray.tune.logger.LoggerCallback` that is set up.
        folder: each trial's files go into a folder below it.
    """

    def __init__(self, logger: TrialLogger, study: str, folder: Path) -> None:
        self.logger, self.study, self.folder = logger, study, folder
        self._trials: dict[str, LoggedTrial] = {}

    def __getstate__(self) -> dict[str, object]:
        """Empty: Tune pickles its callbacks for `Tuner.restore`, which is never called; connections do not pickle."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Begin a run; a trial that starts again after its actor died continues its run."""
        self.logger.log_trial_start(self._logged(trial))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Mapping[str, object], **info: object
    ) -> None:
        """Log an epoch with its metrics; the result of a failed trial has none."""
        if "epoch" in result:
            event = EpochDone.from_row(trial.config["trial"], result)
            row = {**epoch_row(event), **trial.config.get("known", {})}
            # MLflow refuses the @ of recall@10; the callbacks use the iteration as the step of a curve.
            named = {key.replace("@", "_at_"): value for key, value in row.items() if value is not None}
            named["training_iteration"] = event.epoch
            self.logger.log_trial_result(iteration, self._logged(trial), named)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """End the run; our trials fail with a result, not with an exception."""
        result = trial.last_result or {}
        self._end(trial, failed=bool(result.get("failed") or result.get("fatal")))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """End the run of a trial whose actor died."""
        self._end(trial, failed=True)

    def on_experiment_end(self, trials: list[TuneTrial], **info: object) -> None:
        """Let uploads finish."""
        self.logger.on_experiment_end(list(self._trials.values()))

    def _end(self, trial: TuneTrial, failed: bool) -> None:
        self.logger.log_trial_end(self._logged(trial), failed=failed)

    def _logged(self, trial: TuneTrial) -> LoggedTrial:
        name = trial.config["trial"]
        if name not in self._trials:
            config = flat_config(TrialConfig.model_validate(trial.config["config"]))
            known = {key: value for key, value in config.items() if value is not None}
            self._trials[name] = LoggedTrial(
                name,
                f"{self.study}-{name}",
                {"origin": trial.config["origin"], **known},
                self.study,
                str(self.folder / name),
            )
            # W&B's process starts in this folder.
            self._trials[name].init_local_path()
        return self._trials[name]


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a name that no logger has.

    Raises:
        ConfigError: there is no such logger; lists the known ones.
    """
    for name in names:
        if name not in MAKERS:
            raise ConfigError(f"logger {name}: is not a known logger; use {', '.join(MAKERS)}")


def make_loggers(names: Sequence[str], run_dir: Path) -> list[ReadableTrials]:
    """The callbacks of these loggers, each once and set up.

    Raises:
        ConfigError: there is no such logger, its package is not installed, or it cannot be set up.
    """
    check_loggers(names)
    return [_make(name, run_dir) for name in dict.fromkeys(names)]


def _make(name: str, run_dir: Path) -> ReadableTrials:
    folder = run_dir.resolve() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        logger = MAKERS[name](run_dir.name, folder)
        logger.setup()
    except ModuleNotFoundError as error:
        _remove_if_empty(folder)
        raise ConfigError(f"logger {name}: {error.name} is not installed; run `pip install 'tuner[{name}]'`") from None
    except (OSError, RuntimeError, ValueError) as error:
        _remove_if_empty(folder)
        raise ConfigError(f"logger {name}: cannot be set up ({' '.join(str(error).split())})") from None
    return ReadableTrials(logger, run_dir.name, folder)


def _remove_if_empty(folder: Path) -> None:
    """Leave nothing behind if a study cannot start."""
    with suppress(OSError):
        folder.rmdir()


def _tensorboard(study: str, folder: Path) -> TrialLogger:
    from ray.tune.logger import TBXLoggerCallback

    return cast(TrialLogger, TBXLoggerCallback())  # type: ignore[no-untyped-call]


def _mlflow(study: str, folder: Path) -> TrialLogger:
    importlib.import_module("mlflow")  # if it is missing, Ray's error does not name the package
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    # Otherwise it logs that it creates tables, and reports its use to its makers.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A folder's name may have characters that are special in a URL.
    own = URL.create("sqlite", database=str(folder / "mlflow.db")).render_as_string()
    place = os.environ.get("MLFLOW_TRACKING_URI", own)
    return cast(TrialLogger, MLflowLoggerCallback(tracking_uri=place, experiment_name=study))


def _wandb(study: str, folder: Path) -> TrialLogger:
    importlib.import_module("wandb")
    from ray.air.integrations.wandb import WandbLoggerCallback

    # A run that takes longer to start is lost without a message, and on a busy head a hundred may start at once.
    settings = {"init_timeout": WANDB_START_SECONDS}
    project = os.environ.get("WANDB_PROJECT", "tuner")
    make = partial(WandbLoggerCallback, project=project, group=study, settings=settings)
    # A worker of a cluster does not see this process's environment.
    mode = os.environ.get("WANDB_MODE")
    return cast(TrialLogger, make() if mode is None else make(mode=mode))


MAKERS: dict[str, Callable[[str, Path], TrialLogger]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
