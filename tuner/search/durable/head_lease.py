"""One live head a study that is kept in a storage: whoever searches it says so there, and goes on saying so.

`driver_lock` keeps two drivers of one machine apart; two machines share nothing but the storage. So a head keeps a
lease there, `driver.json`: who it is, and a count that it raises every few seconds. Another one that finds it watches
the count by its own clock, since those of two machines differ. A count that moves is a search that lives, and the other
one refuses; one that stands still is a head that is gone, and the study is taken over. A head that was away for so long
(asleep, cut off) then finds a lease that is not its own, and ends.

Through pyarrow, object stores have no compare-and-swap, so the lease alone does not exclude two heads that start in the
same second. Each reads it once more a moment after it has written it: the later writer stays, the other one refuses.
Where even that overlaps, at most some seconds' copies are mixed: the next renewal reads before it writes.
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
# Six renewals: a head whose machine is busy, or whose storage stutters, is not dead.
WATCH_SECONDS = 30.0
# For whoever has read just before we wrote to write as well.
SETTLE_SECONDS = 1.0
# The next renewal tries again anyway; and an end should not wait for a storage that is away.
RENEW_PATIENCE = 1.0


@dataclass(frozen=True)
class Head:
    """A driver, as others know it.

    Attributes:
        machine: where a pid means the same process: this boot of a kernel, and the name space of its pids; "" where
            that cannot be told.
        driver: random; no other driver has it, wherever and whenever it runs.
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
        """The head that has written this lease; None where it cannot be read."""
        try:
            values = json.loads(content)
            return cls(str(values["host"]), str(values["machine"]), int(values["pid"]), str(values["driver"]))
        except (ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        """For people."""
        return f"{self.host} (pid {self.pid})"

    def gone(self) -> bool:
        """Whether it is known to have ended: it ran here, and no process has its pid. Of another machine's, nothing."""
        if not self.machine or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            # Somebody else's, which is there.
            return False
        return False


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Containers of one machine have pids of their own each, and perhaps one host name.
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


class HeadLease:
    """The lease of one head on one study, from `claim` to `release`.

    Args:
        storage: the study's folder in it.
        say: told, in one line, what is being waited for.
        head: whose; by default this process.

    Attributes:
        sessions: how many drivers have worked on the study, this one counted; None before that is known.
    """

    def __init__(self, study: str, storage: Storage, say: Callable[[str], None], head: Head | None = None) -> None:
        self.study, self.storage, self.say = study, storage, say
        self.head = head or Head.here()
        self.sessions: int | None = None
        self._renewals = 0

    def claim(self) -> None:
        """Take the study, after a while if there is a lease of which nobody knows whether its head still lives.

        Raises:
            StudyError: another head is searching it; nothing has been written.
            StorageError: the storage is away or full, or access is denied.
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
        """Make sure that no other head has taken the study over; to be asked before anything is put there.

        Args:
            patience: seconds for which a fault of the storage is tried again; None: the storage's own.

        Raises:
            StudyError: one has, since this head could not renew its lease for long.
            StorageError: as `claim`; it says nothing of the lease.
        """
        storage = self.storage if patience is None else self.storage.patient(patience)
        content = storage.read(LEASE_FILE)
        other = None if content is None or self._is_own(content) else Head.parse(content)
        if other is not None:
            raise StudyError(
                f"study {self.study}: while this search was away, {other} has taken the study over; it goes on there, "
                "so this one ends"
            )
        # Removed by hand, or by another head that has taken it over and has ended since: that one has counted itself.
        if content is None and self.sessions is not None and sessions_in(storage) > self.sessions:
            raise StudyError(
                f"study {self.study}: while this search was away, another machine has gone on with the study, so this "
                f"one ends; `tuner search --resume {self.study}` begins with what that one has left"
            )

    def renew(self) -> None:
        """Show that this head lives; raises as `check`."""
        self.check(RENEW_PATIENCE)
        self._write(self.storage.patient(RENEW_PATIENCE))

    def release(self) -> None:
        """Remove the lease if it is still this head's. What cannot be removed now is found to be dead later."""
        storage = self.storage.patient(RENEW_PATIENCE)
        with suppress(StorageError):
            content = storage.read(LEASE_FILE)
            if content is not None and self._is_own(content):
                storage.remove(LEASE_FILE)

    def _watch(self, content: bytes) -> None:
        """Return once the head that has written this is gone.

        Raises:
            StudyError: it lives.
        """
        whom = Head.parse(content) or "another machine"
        self.say(f"study {self.study}: waiting up to {WATCH_SECONDS:.0f} s to see whether its search on {whom} lives")
        # Counted in answers: as long as the storage is away, the other head cannot renew its lease either.
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
            f"study {self.study}: {whom} is searching it in {self.storage}; wait for it, or end it first (`tuner stop "
            f"{self.study}` where it is a job of a cluster, else Ctrl-C there)"
        )


def sessions_in(storage: Storage) -> int:
    """How many drivers have worked on the study that is kept here; 0 where there is none, or its record is damaged.

    Raises:
        StorageError: the storage is away, or access is denied.
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
    """Keep heads on other machines off a study; None, and nothing is done, where it is in no storage.

    Args:
        storage: where studies are kept, each in a folder of its name.
        say: told what is being waited for.
        superseded: called on a thread with a sentence when another head has taken the study over; should end the
            process, of which nothing more may reach the storage.

    Raises:
        StudyError: another head is searching it.
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
            # Away for everybody, or for this head alone: then another one may take over, and the next turns tell.
            continue
        except StudyError as error:
            superseded(str(error))
            return
