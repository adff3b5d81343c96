"""Lanes that come and go while a search runs: report what it waits for, and release idle machines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from tuner.lanes.capacity import count_cpus, count_gpus, count_places, node_group, present_nodes
from tuner.lanes.fleet import Fleet, FleetSize
from tuner.study.events import Message, View
from tuner.study.wording import counted

LOOK_SECONDS = 1.0
# A lane with a place needs some seconds for its imports; if it is not up after this time, others occupy its place.
START_SECONDS = 60.0
# Time between two questions to the autoscaler about failed launches.
ASK_SECONDS = 15.0


class LaneWatch(tune.Callback):
    """Checks the lanes of a search from time to time, in the driver's own thread.

    Args:
        workers: of each lane.

    Attributes:
        remaining: set once known: number of trials that still have to start or end.
        front: set once known: number of trials to confirm if the search ended now.
    """

    def __init__(self, lanes: Fleet, size: FleetSize, workers: int, view: View) -> None:
        self.lanes, self.size, self.workers, self.view = lanes, size, workers, view
        self.remaining: Callable[[], int] | None = None
        self.front: Callable[[], int] = lambda: 1
        self._started = time.monotonic()
        self._next_look = self._next_question = 0.0
        self._up = 0
        self._waiting = False
        self._needed = lanes.lanes
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        """Empty: Tune pickles its callbacks for `Tuner.restore`, which is never called; the database is the state."""
        return {}

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: object) -> None:
        """Called by Tune several times a second, also if nothing has happened."""
        self.look()

    def look(self) -> None:
        """Report what has changed, at most once a second."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        muster = self.lanes.muster()
        for note in muster.notes:
            self._tell_once(note)
        if self._up < self.lanes.lanes:
            self._tell_waiting(len(muster.up), now)
        self._let_go()

    def _tell_waiting(self, up: int, now: float) -> None:
        if up > self._up and self._waiting:
            self._report(f"{up} of {self.lanes.lanes} lanes are up")
        self._up = max(up, self._up)
        if self._up == self.lanes.lanes:
            return
        if not self._waiting and (self._lacks_room() or now - self._started > START_SECONDS):
            self._waiting = True
            self._report(self._waiting_for())
        if self._waiting and self.size.capacity.possible and now >= self._next_question:
            self._next_question = now + ASK_SECONDS
            for failure in failed_launches():
                self._tell_once(failure)

    def _lacks_room(self) -> bool:
        """Whether the nodes that were up at the start cannot hold all lanes, even if they were free."""
        places = count_places(self.size.capacity.present, self.size.threads, self.size.use_gpu)
        return places < self.lanes.lanes * self.workers

    def _waiting_for(self) -> str:
        unit, count = ("GPU", count_gpus) if self.size.use_gpu else ("CPU", count_cpus)
        present = count(map(node_group, present_nodes().values()))
        available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        free = int(available.get(unit, 0))
        text = f"waiting for a {unit}: {self._up} of {self.lanes.lanes} lanes are up; the cluster has "
        text += counted(present, unit)
        if present:
            text += f", {free} of them free"
        possible = self.size.capacity.possible
        return text if possible is None else f"{text}, the autoscaler may add {max(0, count(possible) - present)}"

    def _let_go(self) -> None:
        """End lanes that have no trial left to train or to confirm, so that an autoscaler can remove their machines."""
        if self.remaining is None or self.lanes.lanes == 1:
            return
        needed = math.ceil(self.remaining() / self.lanes.capacity)
        if needed < self._needed and (needed := max(needed, self.front())) < self._needed:
            self._needed = needed
            self.lanes.need(needed)

    def _report(self, text: str) -> None:
        self.view.show(Message(text=text))

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._report(text)


def failed_launches() -> list[str]:
    """Machines that the autoscaler could not start, with the provider's reason; autoscaler v1 does not report them."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    # A search must not end because the reason for its waiting is unknown.
    with suppress(ray.exceptions.RayError):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return [
            f"the autoscaler could not start {launch.ray_node_type_name}: {' '.join((launch.details or '').split())}"
            for launch in status.failed_launches
        ]
    return []
