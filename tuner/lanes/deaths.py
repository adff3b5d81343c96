"""Who is to blame when a lane's worker dies: its node, a trial, or the lane itself. Plain data, no Ray.

A node that goes away takes its workers with it, as spot machines do each day: such a death counts for nobody. Otherwise
it was the trial that was training. Of a pack each trial is suspected, and trained by itself until an epoch of it is
finished, so that one that needs too much memory does not end its neighbours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# A trial whose worker dies this often without finishing an epoch is what kills it.
DEATHS_PER_TRIAL = 3
# A lane that dies this often without a trial to blame will not work the next time either.
STARTS_PER_LANE = 4
# A lane on which so many trials in a row die, with no epoch finished between them, is what kills them.
TRIALS_PER_LANE = 3

Nodes = frozenset[str]  # ids of the nodes that a lane's workers were on


@dataclass(frozen=True)
class Verdict:
    """What follows from a death: trials that end with a reason, and why the lane is given up, if it is."""

    trials: dict[str, str] = field(default_factory=dict)
    lane: str | None = None


class Deaths:
    """Deaths of lanes' workers since the last epoch that was finished, by what may have caused them."""

    def __init__(self) -> None:
        self._alive: Nodes | None = None
        self._of_trials: defaultdict[str, list[Nodes]] = defaultdict(list)
        self._of_lanes: defaultdict[str, list[Nodes]] = defaultdict(list)
        self._killers: Counter[str] = Counter()

    def see_nodes(self, alive: Iterable[str] | None) -> None:
        """Nodes that the cluster has now; None where they do not come and go."""
        self._alive = None if alive is None else frozenset(alive)

    def died(self, lane: str, nodes: Nodes, held: Sequence[str], alone: str | None, words: str | None) -> Verdict:
        """A lane's worker has died.

        Args:
            nodes: where its workers were.
            held: trials that it had.
            alone: the one of them that it was training by itself.
            words: its last message, if there was one.
        """
        if not held:
            self._of_lanes[lane].append(nodes)
            times = self._count(self._of_lanes[lane])
            if times >= STARTS_PER_LANE:
                return Verdict(lane=f"lane {lane} died {times} times in a row; {words or 'its log tells why'}")
            return Verdict()
        ended = {}
        for trial in [alone] if alone is not None and alone in held else held:
            self._of_trials[trial].append(nodes)
            times = self._count(self._of_trials[trial])
            if times >= DEATHS_PER_TRIAL:
                ended[trial] = f"the lane's worker died {times} times while training it ({words or 'out of memory?'})"
                self._killers[lane] += 1
        if self._killers[lane] >= TRIALS_PER_LANE:
            why = f"on lane {lane}, {self._killers[lane]} trials in a row killed their worker; its log tells why"
            return Verdict(ended, why)
        return Verdict(ended)

    def suspect(self, trials: Iterable[str]) -> str | None:
        """The first of these trials that a worker may have died of."""
        return next((trial for trial in trials if self._count(self._of_trials.get(trial, []))), None)

    def forget_trial(self, trial: str) -> None:
        """It has finished an epoch, or starts again."""
        self._of_trials.pop(trial, None)

    def forget_lane(self, lane: str) -> None:
        """It has finished something, so what it died of before was not its own fault."""
        self._of_lanes.pop(lane, None)
        self._killers.pop(lane, None)

    def _count(self, deaths: list[Nodes]) -> int:
        """Deaths on nodes that are still there; checked again each time, since a node's end is noticed late."""
        return sum(self._alive is None or nodes <= self._alive for nodes in deaths)
