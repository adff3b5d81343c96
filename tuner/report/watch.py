"""A study that may still be running, as a live page sees it: how far it is, and what there is to draw."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tuner.records import FRONT_FILE, JOURNAL_FILE, STUDY_FILE
from tuner.report.progress import EpochRow, Progress, StudyHeader, describe_points, describe_time
from tuner.report.run import Run, finite, read_journal


@dataclass(frozen=True)
class Status:
    """Where a study is.

    Attributes:
        version: another one means that there is something new to draw.
        ended: nothing new will come.
        text: a line for people.
    """

    version: str
    ended: bool
    text: str


class Watched(Protocol):
    """Told apart by where the study is: in a folder here, or on a cluster. Both calls may come from several threads."""

    def status(self) -> Status:
        """Quick; asked every few seconds by each open page."""
        ...

    def run(self) -> Run:
        """What to draw, at least as new as the last version told."""
        ...


class WatchedFolder:
    """A study in a folder that this machine sees.

    Raises:
        StudyError: there is no study in the folder; later also from both calls, when one of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: tuple[str, Run] = (self._version(), read_journal(folder))

    def status(self) -> Status:
        """From the journal, which has each epoch as it ends."""
        version, run = self._read()
        ended = run.front is not None
        outcome = "the search has ended" if ended else describe_progress(progress_of(run))
        return Status(version, ended, f"{outcome}, last change at {self._changed()}")

    def run(self) -> Run:
        """The study as it is on disk."""
        return self._read()[1]

    def _read(self) -> tuple[str, Run]:
        version = self._version()
        if version != self._seen[0]:
            # Read after the version was taken: what is written meanwhile makes another one.
            self._seen = (version, read_journal(self.folder))
        return self._seen

    def _times(self) -> list[int]:
        files = [self.folder / name for name in (STUDY_FILE, JOURNAL_FILE, FRONT_FILE)]
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]

    def _version(self) -> str:
        return "-".join(map(str, self._times()))

    def _changed(self) -> str:
        return time.strftime("%H:%M:%S", time.localtime(max(self._times()) / 1e9))


def progress_of(run: Run) -> Progress:
    """Trials and epochs of a study that was read from its files."""
    settings, study = run.study["settings"], run.study
    header = StudyHeader(
        study=run.name,
        space=study["space"]["name"],
        metric=run.metric,
        trials=int(study.get("trials") or len(run.trials)),
        epochs=int(settings["epochs"]),
        dashboard_url=None,
        run_dir=str(run.folder),
        direction=run.direction,
    )
    progress = Progress(header)
    for trial in run.trials:
        progress.started(trial.trial, trial.origin, "", trial.parameters or 0)
    for row in run.rows:
        if row.get("epoch"):
            progress.epoch(
                EpochRow(
                    trial=row["trial"],
                    epoch=row["epoch"],
                    epochs=header.epochs,
                    loss=finite(row.get("loss")) or 0.0,
                    recall=finite(row.get(run.metric)) or 0.0,
                    metric=run.metric,
                    seconds=(row.get("train_seconds") or 0.0) + (row.get("validation_seconds") or 0.0),
                    parameters=row.get("trainable_parameters") or 0,
                )
            )
    for trial in run.trials:
        if trial.state != "running":
            progress.finished(trial.trial, trial.state, trial.reason)
    return progress


def describe_progress(progress: Progress) -> str:
    """`5 of 7 trials ended, 14 of 21 epochs, front 3 points, about 2 min left`."""
    ended = sum(trial.state != "running" for trial in progress.trials.values())
    epochs = f"{progress.epochs_settled} of {progress.epochs_total} epochs"
    if progress.epochs_settled >= progress.epochs_total:
        outlook = "the front is being confirmed on the test gallery"
    else:
        outlook = f"{describe_points(len(progress.front()))}, {describe_time(progress.seconds_left())}"
    return f"{ended} of {progress.header.trials} trials ended, {epochs}, {outlook}"
