"""Searches as jobs of a Ray cluster, through its Jobs API: submit, list, follow, stop.

The job is the whole search, its driver on the head; whoever follows it may come and go.
"""

from __future__ import annotations

import getpass
import itertools
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, Field, StudyError
from tuner.loopback import AUTH_TOKEN, AUTH_TOKEN_PATH, TOKEN_FILE
from tuner.redact import holds_secret
from tuner.service.jobs.follow import follow_lines, job_lines
from tuner.study.events import StudyStarted, parse_line, read_event
from tuner.study.folder import check_study_name

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUNNING = ("PENDING", "RUNNING")
STOP_SECONDS = 60.0
AGENT_SECONDS = 60.0
STOP_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StudyJob:
    """One search on a cluster; `state` is Ray's word: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    submission_id: str
    study: str
    space: str
    encoder: str
    user: str
    state: str
    started: datetime | None

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state not in RUNNING


def connect(address: str) -> Cluster:
    """The cluster whose dashboard answers at this URL.

    Raises:
        StudyError: nothing answers there, or the token is missing or wrong.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # It reports each closed connection among the lines that are followed.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address, headers=_token_header())
        # Anyone may read the version; this call checks the token.
        client.list_jobs()
    except AuthenticationError:
        raise _no_token(address) from None
    except (ConnectionError, requests.exceptions.RequestException):
        raise StudyError(
            Field("address"), f" {address}: no Ray dashboard answers; is `ray dashboard cluster.yaml` running?"
        ) from None
    except RuntimeError as error:
        if "status code 401" in str(error) or "status code 403" in str(error):
            raise _no_token(address) from None
        raise StudyError(
            Field("address"), f" {address}: {' '.join(str(error).split())[:200]}; give a Ray head's"
        ) from None
    return Cluster(client)


def _token_header() -> dict[str, str]:
    """This user's token, from where Ray looks for it; its own client would send it only in `RAY_AUTH_MODE=token`.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token, path = os.environ.get(AUTH_TOKEN), os.environ.get(AUTH_TOKEN_PATH)
    file = Path(path) if path else Path.home() / TOKEN_FILE
    if not token and (path or file.is_file()):
        try:
            token = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"{file}: the token cannot be read ({error.strerror}); correct RAY_AUTH_TOKEN_PATH"
            ) from None
    return {"Authorization": f"Bearer {token}"} if token else {}


def _no_token(address: str) -> StudyError:
    return StudyError(Field("address"), f" {address}: the cluster requires its token; put it into ~/{TOKEN_FILE}")


class Cluster:
    """The searches of one cluster."""

    def __init__(self, client: JobSubmissionClient) -> None:
        self.client = client

    def submit(
        self, study: str, space: str, encoder: str, arguments: Sequence[str], working_dir: Path | None
    ) -> StudyJob:
        """Start `tuner search` with these arguments on the head.

        Args:
            space, encoder: for those who look at the job; what it runs is in the arguments.
            working_dir: a folder to send along, such as one with the YAML file of a space.

        Raises:
            ConfigError: the arguments hold a password or key.
            StudyError: a search of this study runs already, or the study has no name that can be one.
        """
        check_study_name(study)
        _refuse_secrets(arguments)
        for job in self.studies():
            if job.study == study and not job.ended:
                raise StudyError(
                    f"study {study} runs already as {job.submission_id}; follow it with `tuner logs {study}`"
                )
        submission_id = self.start(
            entrypoint=shlex.join(["tuner", "search", "--address", "auto", "--json", *arguments]),
            # Two users who submit the same study in the same second get one job and one refusal.
            submission_id=f"tuner-{study}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
            metadata={"study": study, "space": space, "encoder": encoder, "user": getpass.getuser()},
            runtime_env={"working_dir": str(working_dir)} if working_dir else None,
        )
        return self.find(study, submission_id)

    def start(self, **job: Any) -> str:
        """Submit a job, with the arguments of Ray's `submit_job`; returns its submission id.

        Raises:
            StudyError: the cluster does not take it.
        """
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                return str(self.client.submit_job(**job))
            except RuntimeError as error:
                # A head that was started just now, or has much to do.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise StudyError(f"the cluster refused the job: {' '.join(str(error).split())[:300]}") from None

    def studies(self) -> list[StudyJob]:
        """All searches that the cluster remembers, the latest first."""
        jobs = [_study_job(details) for details in self.client.list_jobs() if "study" in (details.metadata or {})]
        return sorted(jobs, key=lambda job: job.started or datetime.now(UTC), reverse=True)

    def find(self, study: str, submission_id: str | None = None) -> StudyJob:
        """The latest search of a study, or the one of this id.

        Raises:
            ConfigError: the cluster knows no such study; names those it knows.
        """
        known = self.studies()
        for job in known:
            if job.study == study and submission_id in (None, job.submission_id):
                return job
        names = ", ".join(dict.fromkeys(job.study for job in known)) or "none"
        raise ConfigError(f"study {study}: not on this cluster, which knows {names}")

    def lines(self, job: StudyJob) -> list[str]:
        """Everything a search has printed so far."""
        return job_lines(self.client, job.submission_id)

    def run_dir(self, study: str) -> Path | None:
        """The study's folder on the head, or None if no search of it that is remembered has got so far as to say it."""
        for job in self.studies():
            for values in map(parse_line, self.lines(job) if job.study == study else ()):
                event = read_event(values) if values is not None else None
                if isinstance(event, StudyStarted):
                    return Path(event.run_dir)
        return None

    def follow(self, job: StudyJob, on_line: Callable[[str], None]) -> StudyJob:
        """Hand on every line of a search from its first, until it ends; returns how it ended.

        A lost connection is made again, and what was handed on is not repeated.

        Raises:
            StudyError: the cluster does not know the search any more.
        """
        follow_lines(self.client, job.submission_id, on_line)
        return self.find(job.study, job.submission_id)

    def stop(self, job: StudyJob) -> StudyJob:
        """End a search and wait until it has ended; its study is whole and can be resumed.

        Raises:
            StudyError: it has ended already, or does not end within a minute.
        """
        if job.ended:
            raise StudyError(f"study {job.study}: has ended already ({job.state.lower()}), there is nothing to stop")
        self.client.stop_job(job.submission_id)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            now = self.find(job.study, job.submission_id)
            if now.ended:
                return now
            time.sleep(STOP_POLL_SECONDS)
        raise StudyError(f"study {job.study}: still running {STOP_SECONDS:.0f} s later; try `tuner stop` again")


def _refuse_secrets(arguments: Sequence[str]) -> None:
    """Everybody on the cluster can read the command line of a job."""
    for option, value in itertools.pairwise(["", *arguments]):
        if holds_secret(value):
            raise ConfigError(
                f"{option} {value}: holds a password or key, which everybody on the cluster could read; "
                "drop it and let the nodes have it in their environment or instance profile"
            )


def _study_job(details: Any) -> StudyJob:
    metadata = details.metadata
    return StudyJob(
        submission_id=details.submission_id,
        study=metadata["study"],
        space=metadata.get("space", ""),
        encoder=metadata.get("encoder", ""),
        user=metadata.get("user", ""),
        state=str(details.status.value),
        # Ray tells milliseconds.
        started=datetime.fromtimestamp(details.start_time / 1000, UTC) if details.start_time else None,
    )
