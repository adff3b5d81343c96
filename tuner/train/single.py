"""Train one configuration from the `trial.yaml` of a front's point, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tuner.config import Frozen, RunSettings, TrialConfig, read_yaml
from tuner.data.cache import prefix_root
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder, load_encoder
from tuner.errors import TrialFailed
from tuner.train.export import export_adapter, make_card
from tuner.train.pack import Pack, PackContext
from tuner.train.precision import dtype_of, measured_precision
from tuner.train.results import Metrics

Progress = Callable[[int, int], None]
logger = logging.getLogger(__name__)


class TrialFile(Frozen):
    """The content of `trial.yaml`."""

    trial: TrialConfig
    settings: RunSettings


def read_trial(path: Path) -> tuple[TrialConfig, RunSettings]:
    """Read a front point's YAML.

    Raises:
        ConfigError: the file is missing, is not YAML, or has other fields.
    """
    content = TrialFile.parse(read_yaml(path), str(path))
    return content.trial, content.settings


def train_single(
    config: TrialConfig,
    settings: RunSettings,
    folder: Path,
    progress: Progress,
    warn: Callable[[str], None] = logger.warning,
) -> Metrics:
    """Train, export to `folder`, and return the validation metrics of the last epoch.

    Args:
        warn: gets a sentence about LoRA modules that the embedding does not depend on, if the settings allow them.

    Raises:
        PlacementError: there are such modules, and the settings refuse them.
        TrialFailed: the loss became NaN or infinite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = measured_precision(device) if settings.precision == "auto" else settings.precision
    encoder = load_encoder(inspect_encoder(settings.encoder), dtype_of(precision), str(device))
    pack = Pack(PackContext(encoder, Store.open(Path(settings.store)), settings, prefix_root=prefix_root()))
    member = pack.attach(folder.name, config)
    if member.warning:
        warn(member.warning)
    for epoch in range(settings.epochs):
        step_progress = partial(_over_epochs, progress, epoch, settings.epochs)
        row = pack.train_epoch([member.trial], step_progress)[member.trial]
        if isinstance(row, TrialFailed):
            raise row
    metrics = pack.validate(member.trial).metrics()
    export_adapter(member, make_card(member, pack.store, settings, precision), settings, folder)
    return metrics


def _over_epochs(progress: Progress, epoch: int, epochs: int, step: int, steps: int) -> None:
    progress(epoch * steps + step, epochs * steps)
