"""A study that may still be running, for a live page: its progress, and its data to draw."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tuner.study.folder import StudyFolder
from tuner.study.progress import progress_of
from tuner.study.study import Study


@dataclass(frozen=True)
class Status:
    """The progress of a study.

    Attributes:
        version: changes when there is something new to draw.
        ended: whether it will not change any more.
        text: a line for people.
    """

    version: str
    ended: bool
    text: str


class Watched(Protocol):
    """A study in a local folder, or on a cluster. Both methods may be called from several threads.

    Attributes:
        elsewhere: the study is on a cluster; `tuner export` downloads its adapters.
    """

    elsewhere: bool

    def status(self) -> Status:
        """The progress; must be quick, since each open page asks every few seconds."""
        ...

    def study(self) -> Study:
        """The study to draw, at least as new as the last version."""
        ...


class WatchedFolder:
    """A study in a local folder.

    Raises:
        StudyError: there is no study in the folder; later also from both methods, if one of its files is damaged.
    """

    elsewhere = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: tuple[str, Study] = (self._version(), Study.open(folder))

    def status(self) -> Status:
        """The progress, from the journal, which has each epoch as soon as it ends."""
        version, study = self._read()
        ended = study.front is not None
        outcome = (
            "the search has ended"
            if ended
            else progress_of(study.record.plan(study.folder.path), study.history).describe()
        )
        return Status(version, ended, f"{outcome}, last change at {self._changed()}")

    def study(self) -> Study:
        """The study on disk."""
        return self._read()[1]

    def _read(self) -> tuple[str, Study]:
        version = self._version()
        if version != self._seen[0]:
            # Read after the version: changes in between then make a new version.
            self._seen = (version, Study.open(self.folder))
        return self._seen

    def _times(self) -> list[int]:
        folder = StudyFolder(self.folder)
        files = [folder.record, folder.journal, folder.front]
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]

    def _version(self) -> str:
        return "-".join(map(str, self._times()))

    def _changed(self) -> str:
        return time.strftime("%H:%M:%S", time.localtime(max(self._times()) / 1e9))
