"""Lines of one job, from its first to its end, over as many connections as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from tuner.errors import StudyError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# A connection that says nothing for so long is asked after: a laptop that was closed does not hear that it is dead.
QUIET_SECONDS = 60.0
RETRY_SECONDS = 5.0


def follow_lines(client: JobSubmissionClient, submission_id: str, on_line: Callable[[str], None]) -> str:
    """Hand on each line that a job prints, until it ends; returns Ray's word for how.

    A lost connection is made again, and what was handed on is not repeated. What `on_line` raises ends it.

    Raises:
        StudyError: the cluster does not know the job any more.
    """
    try:
        return asyncio.run(_Follower(client, submission_id, on_line).run())
    except _Stopped as stopped:
        assert stopped.__cause__ is not None
        raise stopped.__cause__ from None


def job_lines(client: JobSubmissionClient, submission_id: str) -> list[str]:
    """Everything a job has printed so far."""
    text: str = client.get_job_logs(submission_id)
    # Not `splitlines`: a string in an event may hold what that takes for an end of line.
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


class _Stopped(Exception):
    """Carries what `on_line` raised past the faults of connections."""


class _Follower:
    def __init__(self, client: JobSubmissionClient, submission_id: str, on_line: Callable[[str], None]) -> None:
        self.client, self.submission_id, self.on_line = client, submission_id, on_line
        self.told = 0

    async def run(self) -> str:
        import aiohttp

        while True:
            try:
                await self._connection()
                status = await asyncio.to_thread(self.client.get_job_status, self.submission_id)
                if status.is_terminal():
                    # What was written between the last chunk and the end.
                    self._tell(await asyncio.to_thread(job_lines, self.client, self.submission_id))
                    return str(status.value)
            except TimeoutError:
                # Quiet for long: alive or not, a new connection will tell.
                continue
            except (OSError, RuntimeError, aiohttp.ClientError):
                if await asyncio.to_thread(self._forgotten):
                    raise StudyError(
                        f"job {self.submission_id}: the cluster no longer knows it; its head was started again"
                    ) from None
                await asyncio.sleep(RETRY_SECONDS)

    async def _connection(self) -> None:
        """Every connection tells the whole log again."""
        heard, rest, chunks = 0, "", self.client.tail_job_logs(self.submission_id)
        while True:
            try:
                async with asyncio.timeout(QUIET_SECONDS):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            *lines, rest = (rest + chunk).split("\n")
            self._tell(lines, heard)
            heard += len(lines)

    def _tell(self, lines: list[str], before: int = 0) -> None:
        """Hand on those of the lines, which came after so many others, that were not handed on before."""
        for line in lines[max(0, self.told - before) :]:
            self.told += 1
            try:
                self.on_line(line)
            except Exception as error:
                raise _Stopped from error

    def _forgotten(self) -> bool:
        try:
            self.client.get_job_status(self.submission_id)
        except (OSError, RuntimeError) as error:
            return "status code 404" in str(error)
        return False
