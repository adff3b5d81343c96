"""The lanes of a study: which are up, what they reported, which of them end. Plain values, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tuner.config import Precision
from tuner.lanes.deaths import Deaths, Nodes, Verdict


@dataclass
class _Lane:
    attempt: str = ""  # of the workers that are there; empty when there are none
    nodes: Nodes = frozenset()
    alone: str | None = None
    words: str | None = None  # the last that its workers reported
    retired: bool = False
    dismissed: bool = False


class LaneRegistry:
    """Lanes by name, and the deaths of their workers.

    Args:
        precision: number format of the study; None: the first lane chooses it.

    Attributes:
        notes: what the user should know, in order.
    """

    def __init__(self, precision: Precision | None = None) -> None:
        self.precision = precision
        self.notes: list[str] = []
        self.deaths = Deaths()
        self._lanes: dict[str, _Lane] = {}
        self._needed: int | None = None

    @property
    def up(self) -> tuple[str, ...]:
        """Lanes that have started, those that have ended since included."""
        return tuple(name for name, lane in self._lanes.items() if lane.attempt)

    @property
    def given_up(self) -> bool:
        """Whether no lane is left that could train."""
        return all(lane.retired or lane.dismissed for lane in self._lanes.values())

    def register(
        self, lane: str, attempt: str, nodes: Iterable[str], alive: Iterable[str] | None, held: Sequence[str]
    ) -> Verdict | None:
        """The workers of a lane have started.

        Args:
            attempt: one name for each start of the workers.
            nodes: ids of the nodes that its workers are on.
            alive: ids of all nodes of the cluster; None where they do not come and go.
            held: trials that the lane had.

        Returns:
            What follows if workers of an earlier attempt have died; None if none have, or they left in order.
        """
        self.deaths.see_nodes(alive)
        known = self._lanes.setdefault(lane, _Lane())
        verdict = self._bury(lane, known, held) if known.attempt not in ("", attempt) else None
        known.attempt, known.nodes = attempt, frozenset(nodes)
        return verdict

    def leave(self, lane: str) -> None:
        """The lane's workers end in order."""
        if lane in self._lanes:
            self._lanes[lane].attempt = ""

    def hear(self, lane: str, words: str) -> None:
        """What the lane's worker is about to die of, as far as it knows."""
        if lane in self._lanes:
            self._lanes[lane].words = words

    def knows(self, lane: str) -> bool:
        """Whether it has registered."""
        return lane in self._lanes

    def is_retired(self, lane: str) -> bool:
        """Whether it was given up because its workers died too often."""
        return lane in self._lanes and self._lanes[lane].retired

    def suspect(self, lane: str, trials: Iterable[str]) -> str | None:
        """The one of these trials that the lane must train by itself now, because a worker may have died of it."""
        self._lanes[lane].alone = self.deaths.suspect(trials)
        return self._lanes[lane].alone

    def need(self, lanes: int) -> None:
        """From now on the study has work for so many lanes, one at least (for its front)."""
        self._needed = max(1, lanes)

    def dismiss(self, lane: str, idle: bool, front: int | None) -> bool:
        """Whether this lane ends now, so that its machine can go: it idles, and the study needs fewer lanes.

        Args:
            idle: the lane holds no trial, and none waits for it.
            front: trials of the front that are still to be measured; None before the trials have ended.
        """
        asking = self._lanes[lane]
        if not asking.dismissed and idle and self._needed is not None:
            staying = sum(bool(known.attempt) and not known.dismissed for known in self._lanes.values())
            asking.dismissed = staying > (self._needed if front is None else max(1, front))
        return asking.dismissed

    def _bury(self, lane: str, known: _Lane, held: Sequence[str]) -> Verdict:
        verdict = self.deaths.died(lane, known.nodes, held, known.alone, known.words)
        known.alone = known.words = None
        if verdict.lane:
            known.retired = True
            self.notes.append(verdict.lane)
        return verdict
