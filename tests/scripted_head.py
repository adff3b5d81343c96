"""The head of a cluster with one job, as Ray's client for jobs shows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from ray.job_submission import JobStatus


class Head:
    """The part of Ray's client that is used, for one job; each connection tells so many chunks and breaks."""

    def __init__(self, log: list[str], connections: list[int | None]) -> None:
        self.log, self.connections = log, connections
        self.status, self.space = "RUNNING", "full"
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        metadata = {"study": "s", "space": self.space, "encoder": "whisper-small", "user": "me"}
        status = SimpleNamespace(value=self.status)
        other = SimpleNamespace(submission_id=None, metadata=None, status=status, start_time=None)
        return [other, SimpleNamespace(submission_id="one", metadata=metadata, status=status, start_time=1000)]

    def get_job_status(self, job_id: str) -> JobStatus:
        return JobStatus(self.status)

    def get_job_logs(self, job_id: str) -> str:
        return "".join(self.log)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        chunks = self.connections.pop(0)
        for chunk in self.log[:chunks]:
            yield chunk
        if chunks is not None:
            raise ConnectionResetError
        self.status = "SUCCEEDED"

    def submit_job(self, **given: Any) -> str:
        self.submitted.append(given)
        return "one"

    def stop_job(self, job_id: str) -> bool:
        self.status = "STOPPED"
        return True
