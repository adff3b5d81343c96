"""What keeps a lane's work: checkpoints at and within epochs, patience with storage, leaving a node in time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tuner.errors import TunerError
from tuner.lanes.files import LaneFiles
from tuner.patience import Patience

if TYPE_CHECKING:
    from tuner.train.member import Member

# What a dead worker costs at most, however long an epoch is. A checkpoint is a few megabytes.
CHECKPOINT_SECONDS = 120.0
# AWS gives two minutes' notice of taking a spot machine back, Google Cloud half a minute. Asking is a call to an actor.
NOTICE_SECONDS = 5.0


class LaneLeaves(Exception):
    """Ends the train function of a lane on purpose; Ray Train starts it again, on a node that stays."""


class Guard:
    """Saves the members of one lane worker's pack.

    Args:
        rank: of the worker; rank 0 alone writes, but every rank must make each call.
        files: of the study, as this worker sees them.
        tell: calls the coordinator (from rank 0).
        broadcast: gives rank 0's value to every rank.
    """

    def __init__(
        self,
        rank: int,
        files: LaneFiles,
        tell: Callable[..., Any],
        broadcast: Callable[[Any], Any],
    ) -> None:
        self.rank, self.files, self.tell, self.broadcast = rank, files, tell, broadcast
        self.patience = Patience(lambda text: tell("note", text))
        # Ray Train's watcher is off where nodes do not come and go, and so is the question.
        self._watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
        self._asked = self._saved = time.monotonic()

    def save(self, member: Member) -> bool:
        """Write a member's checkpoint, trying again while a disk is full or unreachable.

        Returns:
            False when that did not help, which ends the search.
        """
        self._saved = time.monotonic()
        if self.rank != 0:
            return True
        try:
            # torch's writer turns a full disk into a RuntimeError.
            path = self.files.checkpoint(member.trial)
            self.patience.outlast(path, lambda: member.save(path), (OSError, RuntimeError))
            self.files.keep(member.trial, member.config.model_dump(mode="json"))
        except TunerError as error:
            # Reported, not raised: the other ranks are on their way to the next step, and wait for this one there.
            self.tell("fatal", str(error))
            return False
        return True

    def between_steps(self, members: Iterable[Member]) -> None:
        """Called after each optimiser step: keep what a long epoch has done, and go when the node is about to.

        Raises:
            LaneLeaves: the node is being taken away; everything is saved and handed back.
        """
        now = time.monotonic()
        due = (now - self._saved > CHECKPOINT_SECONDS, now - self._asked > NOTICE_SECONDS)
        # By rank 0's clock, since the question is a barrier.
        save, ask = self.broadcast(due)
        if save:
            for member in members:
                self.save(member)
        if ask:
            self.leave_in_time(members)

    def leave_in_time(self, members: Iterable[Member]) -> None:
        """Leave if a node of this lane is being taken away. Every rank must call it.

        Raises:
            LaneLeaves: it is; everything is saved and handed back.
        """
        if not self._watched:
            return
        import ray.train

        self._asked = time.monotonic()
        if ray.train.get_preemption_info() is None:
            return
        for member in members:
            self.save(member)
        self.tell("leave")
        # No rank ends, and has the others killed, before rank 0 has saved.
        self.broadcast(None)
        raise LaneLeaves("the node is being taken away")
