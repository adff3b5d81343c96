"""A search on a cluster as a live page sees it: its state from its job's log, what to draw fetched now and then."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from tuner.errors import StudyError, TunerError
from tuner.report.live import Tally
from tuner.report.watch import Status
from tuner.service.jobs.cluster import Cluster, StudyJob
from tuner.service.jobs.feed import EventFeed
from tuner.service.jobs.fetch import StudySource
from tuner.study.study import Study

# Fetching takes a job of its own, a few seconds of one core of the head.
FETCH_SECONDS = 30.0


class WatchedJob:
    """A search on a cluster, which is followed from the start.

    Its log says every epoch as it comes; records to draw from are fetched again at most each `FETCH_SECONDS`, and once
    more when the search has ended.

    Raises:
        TunerError: the records cannot be fetched; later also from both calls.
    """

    elsewhere = True

    def __init__(self, cluster: Cluster, job: StudyJob, source: StudySource) -> None:
        self.cluster, self.job, self.source = cluster, job, source
        self._tally = Tally()
        self._telling, self._fetching = threading.Lock(), threading.Lock()
        self._lost: TunerError | None = None
        self._failed: TunerError | None = None
        # Events shown, and whether the search had ended, when the records were fetched.
        self._fetched: tuple[int, bool] = (0, False)
        self._study, self._generation, self._fetched_at = self._fetch(), 0, time.monotonic()
        threading.Thread(target=self._follow, daemon=True, name="follow").start()

    def status(self) -> Status:
        """From the job's log."""
        if self._lost is not None:
            raise StudyError(str(self._lost))
        with self._telling:
            ended, due = self.job.ended, self._due()
            if ended:
                text = f"the search has ended ({self.job.state.lower()})"
            elif self._tally.progress.plan is None:
                text = "the search is starting"
            else:
                text = self._tally.progress.describe()
        return Status(str(self._generation + due), ended and not due, text)

    def study(self) -> Study:
        """What was fetched last, or is fetched now if there is news and the last time was long enough ago."""
        with self._fetching:
            if self._due():
                try:
                    self._study, self._failed = self._fetch(), None
                    self._generation += 1
                except TunerError as error:
                    self._failed = error
                finally:
                    self._fetched_at = time.monotonic()
            if self._failed is not None:
                raise StudyError(str(self._failed))
            return self._study

    def _due(self) -> bool:
        if self._fetched[1] or self._now() == self._fetched:
            return False
        waited = time.monotonic() - self._fetched_at > FETCH_SECONDS
        return waited or (self.job.ended and self._failed is None)

    def _now(self) -> tuple[int, bool]:
        return self._tally.events, self.job.ended

    def _fetch(self) -> Study:
        now = self._now()
        with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
            self.source.records(Path(folder))
            study = Study.open(Path(folder))
        self._fetched = now
        return study

    def _follow(self) -> None:
        feed = EventFeed(self._tally, lambda words: None)

        def tell(line: str) -> None:
            with self._telling:
                feed.line(line)

        try:
            self.job = self.cluster.follow(self.job, tell)
        except TunerError as error:
            self._lost = error
