"""A study in a storage: its files are copied there while it runs, and a new head resumes from them.

The run folder belongs to the driver. A background thread copies what has changed; lanes upload checkpoints themselves
(`lanes/files.py`). What a lost head had not copied yet is restored from the checkpoints: each has its history, and next
to it is its trial's configuration.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tuner.config import TrialConfig
from tuner.errors import StorageError, StudyError
from tuner.search.durable.head_lease import HeadLease
from tuner.storage import Storage
from tuner.study.config import sessions_of
from tuner.study.folder import (
    CHECKPOINTS,
    DATABASE_FILE,
    FRONT_FILE,
    JOURNAL_FILE,
    RECORD_FILE,
    REPORT_FILE,
    TRIALS_FILE,
)

MIRROR_SECONDS = 5.0
CONFIG_FILE = re.compile(r"t(\d+)\.json")
# The next turn tries again anyway, and a failed search should not wait for minutes before it reports its error.
SHORT_PATIENCE = 5.0

logger = logging.getLogger(__name__)


class Mirror:
    """Copies the files of a study that have changed since the last time.

    Args:
        lease: of the head that runs the study, checked before each upload.
    """

    # The journal after the database: if the database has the end of a trial, the journal then has its reason.
    FILES = (RECORD_FILE, DATABASE_FILE, JOURNAL_FILE, TRIALS_FILE, FRONT_FILE, REPORT_FILE)

    def __init__(self, run_dir: Path, storage: Storage, lease: HeadLease | None = None) -> None:
        self.run_dir, self.storage, self.lease = run_dir, storage, lease
        self._copied: dict[str, tuple[int, int]] = {}

    def copy(self, patience: float | None = None) -> None:
        """Upload every file that has changed.

        Raises:
            StorageError: the storage fails for longer than `patience` (None: its own), or access is denied.
            StudyError: another head has taken the study over.
            sqlite3.Error: the database is busy for longer than SQLite waits.
        """
        storage = self.storage if patience is None else self.storage.patient(patience)
        for name in self.FILES:
            path = self.run_dir / name
            if not path.exists():
                continue
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._copied.get(name) == state:
                continue
            if self.lease is not None:
                self.lease.check(patience)
            if name == DATABASE_FILE:
                with tempfile.TemporaryDirectory() as folder:
                    storage.upload(snapshot(path, Path(folder) / name), name)
            else:
                storage.upload(path, name)
            self._copied[name] = state


def snapshot(database: Path, target: Path) -> Path:
    """A consistent copy of an SQLite file that is being written."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    return target


@contextmanager
def mirrored(run_dir: Path, storage: Storage | None, lease: HeadLease | None = None) -> Iterator[None]:
    """Copy a study to its storage every few seconds, and completely at the end; without a storage do nothing.

    Raises:
        StorageError: the storage cannot be written at the start or at the end.
        StudyError: another head has taken the study over; its files are not changed.
    """
    if storage is None:
        yield
        return
    mirror, ended = Mirror(run_dir, storage, lease), threading.Event()
    mirror.copy()
    thread = threading.Thread(target=_follow, args=(mirror, ended), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _join(thread, ended)
        # The user must see the error that ended the search, not one of the copy.
        with suppress(StorageError, StudyError, sqlite3.Error):
            mirror.copy(SHORT_PATIENCE)
        raise
    _join(thread, ended)
    try:
        mirror.copy()
    except StorageError as error:
        raise StorageError(f"{error}; until then the result is only in {run_dir}") from None


def _follow(mirror: Mirror, ended: threading.Event) -> None:
    behind = False
    while not ended.wait(MIRROR_SECONDS):
        try:
            mirror.copy(SHORT_PATIENCE)
            behind = False
        except StudyError:
            # The lease's own thread or the last copy reports it.
            return
        except (StorageError, sqlite3.Error) as error:
            if not behind:
                logger.warning("the study's copy in the storage is not up to date: %s", error)
            behind = True


def _join(thread: threading.Thread, ended: threading.Event) -> None:
    ended.set()
    thread.join()


def fetch_study(run_dir: Path, storage: Storage) -> None:
    """Download a study's files, unless the local ones are as new: the copy with more sessions is newer.

    Raises:
        StorageError: the storage is unreachable, or access is denied.
    """
    content = storage.read(RECORD_FILE)
    theirs = sessions_of(content, f"{storage}/{RECORD_FILE}") if content is not None else 0
    record = run_dir / RECORD_FILE
    ours = sessions_of(record.read_bytes(), str(record)) if record.is_file() else 0
    if theirs <= ours:
        return
    # The record comes last: without it the folder is not a study, and everything is downloaded again.
    (run_dir / RECORD_FILE).unlink(missing_ok=True)
    names = set(storage.names())
    for name in (*(name for name in Mirror.FILES if name != RECORD_FILE), RECORD_FILE):
        (run_dir / name).unlink(missing_ok=True)
        if name in names:
            storage.download(name, run_dir / name)


def checkpointed(storage: Storage, known: Collection[int] = ()) -> Mapping[int, TrialConfig]:
    """Configurations of the trials that have a checkpoint, by number; raises as `Storage.upload`.

    Args:
        known: numbers of trials whose configuration need not be read.
    """
    files = storage.at(CHECKPOINTS)
    configs: dict[int, TrialConfig] = {}
    for name in files.names():
        match = CONFIG_FILE.fullmatch(name)
        if match and int(match[1]) not in known and (content := files.read(name)) is not None:
            configs[int(match[1])] = TrialConfig.model_validate_json(content)
    return configs
