"""Whether the cluster is still there: Ray ends a driver whose cluster has gone after a minute, without a word.

Until then its calls wait in C++, where no exception reaches them; so a thread says what has happened and ends the
process. Nothing is lost by that: the study on disk is whole at every moment.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import ray

# Longer than a restart of Ray's control service with its state kept, shorter than Ray's own minute.
LOST_SECONDS = 30.0
PING_SECONDS = 1.0


class Lifeline:
    """Watches the node that this driver is connected to, from `start` to `close`.

    Args:
        lost: called once, on a thread, when the cluster has not known the node for `LOST_SECONDS`; it should end the
            process.
    """

    def __init__(self, lost: Callable[[], None]) -> None:
        self.lost = lost
        self._closed = threading.Event()
        self._heard = time.monotonic()

    def start(self) -> None:
        """Begin to watch; Ray must be up."""
        node = ray.get_runtime_context().get_node_id()
        self._heard = time.monotonic()
        for watch, arguments in ((self._ping, (node,)), (self._wait, ())):
            threading.Thread(target=watch, args=arguments, daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def broken(self) -> bool:
        """Whether the cluster is silent now: an error that came before silence was noticed is its doing."""
        asked = time.monotonic()
        while time.monotonic() - asked < LOST_SECONDS / 3:
            if self._heard > asked:
                return False
            time.sleep(PING_SECONDS / 10)
        return True

    def _ping(self, node: str) -> None:
        # A thread of its own: the question itself waits when nobody is there to answer.
        while not self._closed.wait(PING_SECONDS):
            with contextlib.suppress(Exception):
                nodes = ray.nodes()  # type: ignore[no-untyped-call]
                if any(known["NodeID"] == node and known["Alive"] for known in nodes):
                    self._heard = time.monotonic()

    def _wait(self) -> None:
        while not self._closed.wait(PING_SECONDS):
            if time.monotonic() - self._heard > LOST_SECONDS:
                self.lost()
                return
