"""Tune's events, written to the journal and shown in the view."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from tuner.records import Journal
from tuner.redact import printable, redact
from tuner.report.live import View
from tuner.report.progress import EpochRow

# Rewriting the table costs a few milliseconds; more often than this nobody looks.
TABLE_SECONDS = 5.0


class Recorder(tune.Callback):
    """Journal and live view of one search.

    Args:
        parameters: exact trainable parameters of a configuration, known before it trains.
        settled: called at each epoch, until it says that it has what it needs of a first one.
    """

    def __init__(
        self,
        journal: Journal,
        view: View,
        metric: str,
        parameters: Callable[[dict[str, Any]], int],
        settled: Callable[[], bool],
    ) -> None:
        self.journal, self.view, self.metric = journal, view, metric
        self.parameters, self.settled = parameters, settled
        self.fatal: str | None = None
        self._warned: set[str] = set()
        self._settled = False
        self._written = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for `Tuner.restore`, which nobody calls: the study's database is the state."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the configuration."""
        config = trial.config
        self.journal.trial(config["trial"], config["origin"], config["config"])
        self._show_start(config["trial"], config["origin"], config["config"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note an epoch, unless a resumed trial is only telling its past again."""
        if result.get("failed") or result.get("fatal"):
            return
        self._settled = self._settled or self.settled()
        row = {key: value for key, value in result.items() if key in ROW_KEYS or key.startswith(ROW_PREFIXES)}
        if not self.journal.epoch(trial.config["trial"], row):
            return
        if result.get("warning") and trial.config["trial"] not in self._warned:
            self._warned.add(trial.config["trial"])
            self.view.message(f"{trial.config['trial']}: {result['warning']}")
        self._show_epoch(trial.config["trial"], trial.config["epochs"], row)
        if time.monotonic() - self._written > TABLE_SECONDS:
            self.journal.write_parquet()
            self._written = time.monotonic()

    def _show_epoch(self, trial: str, epochs: int, row: dict[str, Any]) -> None:
        self.view.epoch(
            EpochRow(
                trial=trial,
                epoch=row["epoch"],
                epochs=epochs,
                loss=row["loss"],
                recall=row[self.metric],
                metric=self.metric,
                seconds=row["train_seconds"] + row["validation_seconds"],
                parameters=row["trainable_parameters"],
            )
        )

    def _show_start(self, trial: str, origin: str, config: dict[str, Any]) -> None:
        self.view.trial_started(trial, origin, summary(config), self.parameters(config))

    def replay(self, epochs: int) -> None:
        """Tell the view of a resumed study what the journal knows."""
        for event in self.journal.events():
            if event["event"] == "trial":
                self._show_start(event["trial"], event["origin"], event["config"])
            elif event["event"] == "epoch":
                self._show_epoch(event["trial"], epochs, event["row"])
            else:
                self.view.trial_finished(event["trial"], event["state"], event["reason"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note how it ended: complete, failed with its reason, or stopped by the scheduler."""
        result = trial.last_result or {}
        if result.get("fatal"):
            self.fatal = result["fatal"]
        elif result.get("failed"):
            self._end(trial, "failed", result["failed"])
        else:
            self._end(trial, "complete" if result.get("final") else "stopped", None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's own actor died more often than Tune starts it again."""
        error = trial.get_error()
        self._end(trial, "failed", f"trial actor: {type(error).__name__}" if error else "trial actor died")

    def _end(self, trial: Any, state: str, reason: str | None) -> None:
        name = trial.config["trial"]
        # Words of libraries, which may quote addresses and files; from here they go into every record and view.
        reason = printable(redact(reason)) if reason else None
        self.journal.end(name, state, reason)
        self.view.trial_finished(name, state, reason)


ROW_KEYS = frozenset(
    {
        "epoch",
        "loss",
        "train_seconds",
        "validation_seconds",
        "clips_per_second",
        "logit_scale",
        "lora_parameters",
        "trainable_parameters",
    }
)
ROW_PREFIXES = ("recall@", "audio_to_text_", "text_to_audio_")


def summary(config: dict[str, Any]) -> str:
    """A configuration in a few words: `r=16 alpha=32 dropout=0.1 q_proj,v_proj from block 0 lr=1.0e-03`."""
    lora = config["lora"]
    if lora is None:
        return "projection only"
    return (
        f"r={lora['rank']} alpha={lora['alpha_ratio'] * lora['rank']:g} dropout={lora['dropout']:g} "
        f"{','.join(lora['targets'])} from block {lora['first_layer']} lr={config['optim']['lora_lr']:.1e}"
    )
