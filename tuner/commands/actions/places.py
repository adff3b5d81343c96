"""Where a study is, and how its files come from there: a folder here, a storage, or the head of a cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuner.commands.console import Progress
from tuner.commands.options import StudyOptions, study_folder
from tuner.errors import ConfigError, Field
from tuner.service.jobs.cluster import connect
from tuner.service.jobs.fetch import ClusterSource, StorageSource, StudySource
from tuner.storage import Storage
from tuner.study.folder import RECORD_FILE


@dataclass(frozen=True)
class Place:
    """Where a study is; without address and storage, in a folder of this machine."""

    study: str
    runs: Path
    address: str | None
    storage: str | None
    runs_typed: bool

    @classmethod
    def of(cls, options: StudyOptions) -> Place:
        """A study that is here is not looked for on a cluster that only the environment names.

        Raises:
            ConfigError: two places are given.
        """
        address, storage = options.address, options.storage
        here = study_folder(options.runs, options.study) / RECORD_FILE
        if address is not None and not options.address_typed and (storage or here.is_file()):
            address = None
        if address is not None and storage is not None:
            both = (Field("address"), " and ", Field("storage"))
            raise ConfigError(*both, ": give one of them; the study is the same in both")
        return cls(options.study, options.runs, address, storage, options.runs_typed)

    @property
    def name(self) -> str:
        """Of the study, whether it was given by its name or by its folder."""
        return Path(self.study).name

    @property
    def folder(self) -> Path:
        """On this machine."""
        return study_folder(self.runs, self.study)

    @property
    def here(self) -> bool:
        """Whether the study is in a folder of this machine."""
        return self.address is None and self.storage is None

    @contextmanager
    def records(self) -> Iterator[Path]:
        """A folder with what a report is drawn from."""
        if self.here:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
            self.source().records(Path(folder))
            yield Path(folder)

    def source(self, progress: Progress = lambda done, total: None) -> StudySource:
        """Where to fetch the study from, if it is not here; `progress` is given bytes."""
        if self.storage is not None:
            return StorageSource(Storage.parse(self.storage), self.study)
        return self.cluster_source(progress)

    def cluster_source(self, progress: Progress = lambda done, total: None) -> ClusterSource:
        """The same for a cluster."""
        assert self.address is not None, "the study is not on a cluster"
        on_head = self.runs / self.study if self.runs_typed else None
        return ClusterSource(connect(self.address), self.study, on_head, progress)
