"""One running head per study in a storage: the head keeps a lease there and renews it.

`driver_lock` separates two drivers of one machine; two machines share only the storage. So a head keeps a lease there,
`driver.json`: its identity, and a count that it raises every few seconds. Another head that finds the lease watches the
count with its own clock, because the clocks of two machines differ. If the count changes, the search is running, and
the other head refuses. If it does not change, the head is gone, and the other takes the study over. A head that was
asleep or disconnected for that long then finds a lease that is not its own, and ends.

Through pyarrow, object stores have no compare-and-swap, so the lease alone does not exclude two heads that start in the
same second. Each reads it once more a moment after writing it: the later writer stays, the other one refuses. If even
that overlaps, copies of at most a few seconds are mixed: the next renewal reads before it writes.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tuner.errors import StorageError, StudyError
from tuner.storage import Storage
from tuner.study.config import sessions_of
from tuner.study.folder import RECORD_FILE

LEASE_FILE = "driver.json"
RENEW_SECONDS = 5.0
POLL_SECONDS = 1.0
# Six renewals: a head with a busy machine or a slow storage is not dead.
WATCH_SECONDS = 30.0
# Time for a head that read just before we wrote to write its lease, too.
SETTLE_SECONDS = 1.0
# The next renewal tries again anyway, and an ending search should not wait for an unreachable storage.
RENEW_PATIENCE = 1.0


@dataclass(frozen=True)
class Head:
    """The identity of a driver.

    Attributes:
        machine: where a pid means the same process: this boot of the kernel, and its pid namespace; "" if unknown.
        driver: random; no other driver has the same.
    """

    host: str
    machine: str
    pid: int
    driver: str

    @classmethod
    def here(cls) -> Head:
        """This process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), uuid.uuid4().hex)

    @classmethod
    def parse(cls, content: bytes) -> Head | None:
        """The head that wrote this lease; None if it cannot be parsed."""
        try:
            values = json.loads(content)
            return cls(str(values["host"]), str(values["machine"]), int(values["pid"]), str(values["driver"]))
        except (ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        """For people."""
        return f"{self.host} (pid {self.pid})"

    def gone(self) -> bool:
        """Whether it has surely ended: it ran on this machine and no process has its pid. False for other machines."""
        if not self.machine or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            # The process exists and belongs to another user.
            return False
        return False


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Containers of one machine each have their own pids, and may have the same host name.
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


class HeadLease:
    """The lease of one head on one study, from `claim` to `release`.

    Args:
        storage: the study's folder in it.
        say: called with one line about what it waits for.
        head: the owner of the lease; by default this process.

    Attributes:
        sessions: number of drivers that have worked on the study, with this one; None until it is known.
    """

    def __init__(self, study: str, storage: Storage, say: Callable[[str], None], head: Head | None = None) -> None:
        self.study, self.storage, self.say = study, storage, say
        self.head = head or Head.here()
        self.sessions: int | None = None
        self._renewals = 0

    def claim(self) -> None:
        """Take the study; if another head's lease exists, first wait to see whether that head is running.

        Raises:
            StudyError: another head is running it; nothing has been written.
            StorageError: the storage is unreachable or full, or access is denied.
        """
        content = self.storage.read(LEASE_FILE)
        if content is not None and not ((other := Head.parse(content)) and other.gone()):
            self._watch(content)
        self._write(self.storage)
        time.sleep(SETTLE_SECONDS)
        content = self.storage.read(LEASE_FILE)
        if content is not None and not self._is_own(content):
            raise self._refusal(content)

    def check(self, patience: float | None = None) -> None:
        """Make sure that no other head has taken the study over; call it before every upload.

        Args:
            patience: seconds for which a fault of the storage is retried; None: the storage's own.

        Raises:
            StudyError: another head has taken it over, because this one could not renew its lease for too long.
            StorageError: as `claim`; the lease may still be this head's.
        """
        storage = self.storage if patience is None else self.storage.patient(patience)
        content = storage.read(LEASE_FILE)
        other = None if content is None or self._is_own(content) else Head.parse(content)
        if other is not None:
            raise StudyError(
                f"study {self.study}: this search was suspended or disconnected, and {other} has taken the study "
                "over; this search ends, and the study continues there"
            )
        # Removed by hand, or by another head that took it over and has ended: that head has raised `sessions`.
        if content is None and self.sessions is not None and sessions_in(storage) > self.sessions:
            raise StudyError(
                f"study {self.study}: this search was suspended or disconnected, and another machine has continued "
                f"the study; this search ends, and `tuner search --resume {self.study}` continues from there"
            )

    def renew(self) -> None:
        """Show that this head is running; raises as `check`."""
        self.check(RENEW_PATIENCE)
        self._write(self.storage.patient(RENEW_PATIENCE))

    def release(self) -> None:
        """Remove the lease if it is still this head's. If that fails, others will see that it is no longer renewed."""
        storage = self.storage.patient(RENEW_PATIENCE)
        with suppress(StorageError):
            content = storage.read(LEASE_FILE)
            if content is not None and self._is_own(content):
                storage.remove(LEASE_FILE)

    def _watch(self, content: bytes) -> None:
        """Return once the head that wrote this is gone.

        Raises:
            StudyError: it is running.
        """
        whom = Head.parse(content) or "another machine"
        self.say(f"study {self.study}: waiting up to {WATCH_SECONDS:.0f} s to see whether {whom} is still running it")
        # Counted in successful reads: while the storage is unreachable, the other head cannot renew its lease either.
        for _ in range(math.ceil(WATCH_SECONDS / POLL_SECONDS)):
            time.sleep(POLL_SECONDS)
            latest = self.storage.read(LEASE_FILE)
            if latest is None:
                return
            if latest != content:
                raise self._refusal(latest)

    def _write(self, storage: Storage) -> None:
        self._renewals += 1
        storage.write(LEASE_FILE, json.dumps({**asdict(self.head), "renewals": self._renewals}).encode())

    def _is_own(self, content: bytes) -> bool:
        head = Head.parse(content)
        return head is not None and head.driver == self.head.driver

    def _refusal(self, content: bytes) -> StudyError:
        whom = Head.parse(content) or "another machine"
        return StudyError(
            f"study {self.study}: {whom} is running it in {self.storage}; wait for it, or end it first (`tuner stop "
            f"{self.study}` if it is a job of a cluster, else Ctrl-C there)"
        )


def sessions_in(storage: Storage) -> int:
    """How many drivers have worked on the study in this storage; 0 if there is none, or its record is damaged.

    Raises:
        StorageError: the storage is unreachable, or access is denied.
    """
    content = storage.read(RECORD_FILE)
    if content is None:
        return 0
    try:
        return sessions_of(content, str(storage))
    except StudyError:
        return 0


@contextmanager
def only_head(
    study: str, storage: Storage | None, say: Callable[[str], None], superseded: Callable[[str], None]
) -> Iterator[HeadLease | None]:
    """Keep heads on other machines away from a study; without a storage it does nothing and yields None.

    Args:
        storage: holds studies, each in a folder of its name.
        say: called with one line about what it waits for.
        superseded: called on a thread with a sentence when another head has taken the study over; should end the
            process, which must not write to the storage any more.

    Raises:
        StudyError: another head is running it.
        StorageError: the storage is away or full, or access is denied.
    """
    if storage is None:
        yield None
        return
    lease, ended = HeadLease(study, storage.at(study), say), threading.Event()
    # A thread of its own: the mirror's may be busy with a long upload.
    thread = threading.Thread(target=_keep, args=(lease, ended, superseded), name="head-lease", daemon=True)
    try:
        lease.claim()
        thread.start()
        yield lease
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        lease.release()


def _keep(lease: HeadLease, ended: threading.Event, superseded: Callable[[str], None]) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            lease.renew()
        except StorageError:
            # If it fails only for this head, another one may take over; a later turn will notice.
            continue
        except StudyError as error:
            superseded(str(error))
            return
