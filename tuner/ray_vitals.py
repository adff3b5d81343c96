"""The servers that an embedded Ray cannot lose, and waiting for the end of one.

When Ray notices such an end, it ends its driver from C++, without a word. So the kernel wakes us at once where it can.
An agent's end is followed by its raylet's, which is what counts here: agents also come and go while Ray starts and
ends.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import psutil

from tuner.leftovers import SERVERS, lives


class RayVitals:
    """The vital processes of this process's own Ray, which has started; on a cluster there are none."""

    def __init__(self) -> None:
        self._processes = _vital_processes()
        self._names: dict[int, str] = {}
        self._poll = select.poll()
        for name, process in self._processes.items() if hasattr(os, "pidfd_open") else ():
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                self._names[descriptor] = name
                self._poll.register(descriptor, select.POLLIN)

    def wait_for_end(self, seconds: float) -> str | None:
        """Name of one that has ended, after at most so many seconds; None if all run."""
        if self._names:
            for descriptor, _ in self._poll.poll(1000 * seconds):
                return self._names[descriptor]
        else:
            time.sleep(seconds)
        return next((name for name, process in self._processes.items() if not lives(process)), None)

    def close(self) -> None:
        """Give the kernel's handles back."""
        for descriptor in self._names:
            os.close(descriptor)
        self._names = {}


def _vital_processes() -> dict[str, psutil.Process]:
    from ray._private.worker import _global_node

    found: dict[str, psutil.Process] = {}
    started: Mapping[str, Iterable[Any]] = _global_node.all_processes if _global_node else {}
    for name in SERVERS:
        for server in started.get(name, ()):
            found[name] = psutil.Process(server.process.pid)
    return found
