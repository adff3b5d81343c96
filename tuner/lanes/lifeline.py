"""Whether Ray is still there: it ends a driver whose cluster has gone after a minute, without a word.

Until then its calls wait in C++, where no exception reaches them; so a thread says what has happened and ends the
process. Nothing is lost by that: the study on disk is whole at every moment.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import ray

from tuner.ray_vitals import RayVitals

# Longer than a restart of Ray's control service with its state kept, shorter than Ray's own minute.
LOST_SECONDS = 30.0
# A cluster that is there answers sooner.
ANSWER_SECONDS = 10.0
PING_SECONDS = 1.0
LOOK_SECONDS = 0.1
GONE = "the Ray cluster has gone"
ENDED = "Ray has ended, because its {} was killed or crashed"


class Lifeline:
    """Watches the node that this driver is connected to, and the processes of a Ray of its own, from `start` to
    `close`.

    Args:
        lost: called with the reason, on a thread, when a vital process of our own Ray has ended, or the cluster has not
            known the node for `LOST_SECONDS`; it should end the process. None: nothing is watched.
    """

    def __init__(self, lost: Callable[[str], None] | None) -> None:
        self.lost = lost
        self._closed, self._started = threading.Event(), False
        self._answers = 0
        self._ending = threading.Lock()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of a block in which Ray is up; an error that leaves it may be Ray's doing."""
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
        for watch, arguments in ((self._ping, (node,)), (self._wait, ())):
            threading.Thread(target=watch, args=arguments, daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def end_if_broken(self) -> None:
        """End the process if Ray is not there now: an error that came before that was noticed is its doing."""
        if not self._started:
            return
        if reason := self._why_gone(ANSWER_SECONDS, until_answer=True):
            self._end(reason)

    def _end(self, reason: str) -> None:
        with self._ending:  # Whoever comes second waits for the end.
            if self.lost is not None:
                self.lost(reason)

    def _ping(self, node: str) -> None:
        # A thread of its own: the question itself waits when nobody is there to answer.
        while not self._closed.wait(PING_SECONDS):
            with contextlib.suppress(Exception):
                nodes = ray.nodes()  # type: ignore[no-untyped-call]
                if any(known["NodeID"] == node and known["Alive"] for known in nodes):
                    self._answers += 1

    def _wait(self) -> None:
        if reason := self._why_gone(LOST_SECONDS):
            self._end(reason)

    def _why_gone(self, most_silent: float, until_answer: bool = False) -> str | None:
        """Wait until Ray has gone, and return the reason; None once closed or, if wanted, at the next answer.

        A process that is stopped (a suspended terminal, a debugger) hears nothing, and its clock goes on. So the time
        between two looks counts only up to the time in which an answer was due anyway.
        """
        with contextlib.closing(RayVitals()) as vitals:
            return self._first_reason(vitals, most_silent, until_answer)

    def _first_reason(self, vitals: RayVitals, most_silent: float, until_answer: bool) -> str | None:
        heard, silent, looked = self._answers, 0.0, time.monotonic()
        while not self._closed.is_set():
            # Others may notice the end of a process a moment before it can be asked for: look first.
            if ended := vitals.wait_for_end(LOOK_SECONDS):
                return ENDED.format(ended)
            now = time.monotonic()
            silent, looked = silent + min(now - looked, PING_SECONDS), now
            if self._answers > heard:
                if until_answer:
                    return None
                heard, silent = self._answers, 0.0
            if silent > most_silent:
                return GONE
        return None
