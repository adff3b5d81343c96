"""A study's records and adapters from where it ran: out of a cluster through its Jobs API, or out of a storage.

From a cluster they come as lines that a small job on the head prints (`tuner send`). That needs what a submitted search
needs and nothing else: no ssh, no shared folder, no port but the dashboard's.
"""

from __future__ import annotations

import shlex
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tuner.errors import ConfigError, StorageError, StudyError
from tuner.redact import printable
from tuner.report.handover import choose_points, files_of
from tuner.service.jobs.bundle import RECORDS, BundleReader
from tuner.service.jobs.cluster import Cluster
from tuner.service.jobs.follow import follow_lines
from tuner.storage import Storage
from tuner.study.study import Study

OnBytes = Callable[[int, int], None]
JOB_PREFIX = "tuner-send-"
CLEAR_SECONDS = 10.0


class StudySource(Protocol):
    """Where a study is."""

    def records(self, folder: Path) -> None:
        """Put the files that a report is drawn from into an empty folder."""
        ...

    def points(self, folder: Path, trials: Sequence[str], best: bool) -> None:
        """Put these files, and the adapters that `choose_points` chooses, into an empty folder."""
        ...


class ClusterSource:
    """A study on a cluster.

    Args:
        run_dir: the study's folder on the head; None: what its search printed, as long as the cluster remembers it.
        on_bytes: called with the bytes received and announced so far.

    Raises:
        ConfigError: no such study on this cluster.
        StudyError: its search has not begun; or what came is damaged, or not of a study. Nothing is kept then.
    """

    def __init__(
        self,
        cluster: Cluster,
        study: str,
        run_dir: Path | None = None,
        on_bytes: OnBytes | None = None,
    ) -> None:
        self.cluster, self.study, self.on_bytes = cluster, study, on_bytes
        self._run_dir = run_dir

    def records(self, folder: Path) -> None:
        """What a report is drawn from; of a running search, as it is now."""
        self._fetch(folder)

    def points(self, folder: Path, trials: Sequence[str], best: bool) -> None:
        """Records and adapters, chosen on the head."""
        named = [option for trial in trials for option in ("--trial", trial)]
        self._fetch(folder, "--adapters", *named, *(["--best"] if best else []))

    def _fetch(self, folder: Path, *options: str) -> None:
        reader, said = BundleReader(folder, self.on_bytes), deque[str](maxlen=1)

        def take(line: str) -> None:
            if line.startswith("tuner: "):
                said.append(printable(line.removeprefix("tuner: ")))
            reader.line(line)
            if reader.whole:
                # The job may need seconds more to end.
                raise _Whole

        client = self.cluster.client
        submission_id = self.cluster.start(
            entrypoint=shlex.join(["tuner", "send", str(self._find()), *options]),
            submission_id=f"{JOB_PREFIX}{uuid.uuid4().hex[:12]}",
            # Not `study`: it is no search, and `tuner studies` lists searches.
            metadata={"sends": self.study},
        )
        try:
            follow_lines(client, submission_id, take)
        except _Whole:
            return
        finally:
            reader.close()
            with suppress(OSError, RuntimeError):
                if not reader.whole:
                    client.stop_job(submission_id)
                self._clear()
        raise StudyError(said[0] if said else f"study {self.study}: the head sent nothing; is `tuner` installed there?")

    def _find(self) -> Path:
        if self._run_dir is None:
            # Says which studies there are if this is none.
            self.cluster.find(self.study)
            self._run_dir = self.cluster.run_dir(self.study)
        if self._run_dir is None:
            raise StudyError(f"study {self.study}: its search has not begun yet; try again in a minute")
        return self._run_dir

    def _clear(self) -> None:
        """Take earlier jobs of this kind off the cluster's list, which is for searches.

        Not at once: Ray still looks after a job for seconds after its end, and lists one that it misses as failed.
        """
        before = 1000 * (time.time() - CLEAR_SECONDS)  # as Ray tells it
        for job in self.cluster.client.list_jobs():
            own = str(job.submission_id).startswith(JOB_PREFIX)
            if own and job.status.is_terminal() and (job.end_time or 0) < before:
                self.cluster.client.delete_job(str(job.submission_id))


class StorageSource:
    """A study that was run with `--storage`.

    Raises:
        ConfigError: no such study there; names those that there are.
        StorageError: the storage is away or access is denied.
    """

    def __init__(self, storage: Storage, study: str) -> None:
        self.storage, self.study, self.files = storage, study, storage.at(study)

    def records(self, folder: Path) -> None:
        """What a report is drawn from; of a running search, as it was mirrored last."""
        if not self.files.exists(RECORDS[0]):
            suffix = f"/{RECORDS[0]}"
            there = [name.removesuffix(suffix) for name in self.storage.names() if name.endswith(suffix)]
            raise ConfigError(f"study {self.study}: not in {self.storage}, which has {', '.join(there) or 'none'}")
        for name in RECORDS:
            if self.files.exists(name):
                self.files.download(name, folder / name)

    def points(self, folder: Path, trials: Sequence[str], best: bool) -> None:
        """Records and adapters, chosen here."""
        self.records(folder)
        for point in choose_points(Study.open(folder), trials, best):
            for name in files_of(point):
                try:
                    self.files.download(name, folder / name)
                except StorageError as error:
                    raise StorageError(
                        f"{error}; `tuner search --resume {self.study}` exports the front again"
                    ) from None


class _Whole(Exception):
    """All has come; what follows is of no interest."""
