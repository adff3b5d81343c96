"""Whether the cluster is still there: Ray ends a driver whose cluster has gone after a minute, without a word.

Until then its calls wait in C++, where no exception reaches them; so a thread says what has happened and ends the
process. Nothing is lost by that: the study on disk is whole at every moment.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import ray

# Longer than a restart of Ray's control service with its state kept, shorter than Ray's own minute.
LOST_SECONDS = 30.0
# A cluster that is there answers sooner.
ANSWER_SECONDS = 10.0
PING_SECONDS = 1.0


class Lifeline:
    """Watches the node that this driver is connected to, from `start` to `close`.

    Args:
        lost: called when the cluster has not known the node for `LOST_SECONDS`, on a thread; it should end the process.
            None: nothing is watched.
    """

    def __init__(self, lost: Callable[[], None] | None) -> None:
        self.lost = lost
        self._closed, self._started = threading.Event(), False
        self._heard = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of a block in which Ray is up; an error that leaves it may be the cluster's doing."""
        self.start()
        try:
            yield
        except Exception:
            self.end_if_broken()
            raise
        finally:
            self.close()

    def start(self) -> None:
        """Begin to watch; Ray must be up."""
        if self.lost is None:
            return
        self._started = True
        node = ray.get_runtime_context().get_node_id()
        self._heard = time.monotonic()
        for watch, arguments in ((self._ping, (node,)), (self._wait, ())):
            threading.Thread(target=watch, args=arguments, daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def end_if_broken(self) -> None:
        """End the process if the cluster is silent now: an error that came before that was noticed is its doing."""
        asked = time.monotonic()
        while self._started and self._heard < asked:
            if time.monotonic() - asked > ANSWER_SECONDS:
                self._end()
                return
            time.sleep(PING_SECONDS / 10)

    def _end(self) -> None:
        if self.lost is not None:
            self.lost()

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
                self._end()
                return
