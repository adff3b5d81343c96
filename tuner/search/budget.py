"""A search that ends in a given time: no trial begins that would not be trained and confirmed by then. No Ray."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from tuner.study.events import BASELINE
from tuner.study.history import History

# Confirming a point takes about as long as so many validations: export, loading, both galleries.
VALIDATIONS_PER_POINT = 4


class Budget:
    """Time for one session of a search, from now on.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.hours, self._clock = hours, clock
        self._ends = clock() + 3600 * hours

    @property
    def sentence(self) -> str:
        """Why no further trial begins."""
        return f"no further trial would end within {self.hours:g} hours, so the search ends here"

    def allows(self, history: History, epochs: int, points: int, places: int) -> bool:
        """Whether a trial that begins now, and the confirmation of the front after it, would end in time.

        Before an epoch with LoRA was seen, nothing is known and a trial may begin.

        Args:
            history: of the study, earlier sessions included.
            epochs: of a whole training.
            points: to confirm at the end.
            places: how many of them are confirmed at once.
        """
        trials = [trial for trial in history.trials if trial.origin != BASELINE]
        seen = [epoch for trial in trials for epoch in trial.epochs.values()]
        if not seen:
            return True
        training = epochs * statistics.median(epoch.seconds for epoch in seen)
        validation = statistics.median(epoch.validation_seconds or 0.0 for epoch in seen)
        rounds = math.ceil(points / places)
        return self._clock() + training + rounds * VALIDATIONS_PER_POINT * validation <= self._ends


def ends_at(hours: float, now: datetime) -> datetime:
    """When a search of so many hours ends."""
    return now + timedelta(hours=hours)
