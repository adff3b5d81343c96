"""Run a command as a user does, in processes of its own: wall time, peak memory, and when it said what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peak import Peak, PeakSampler
from benchmarks.table import show

TAIL_LINES = 15


@dataclass(frozen=True)
class Event:
    """A JSON line of standard output and the seconds from the start of the process to its arrival."""

    seconds: float
    fields: dict[str, Any]


@dataclass(frozen=True)
class Session:
    """A command that ended well."""

    seconds: float
    peak: Peak
    events: tuple[Event, ...]


def search_command(arguments: Sequence[str]) -> list[str]:
    """`tuner` of this interpreter with these arguments."""
    return [sys.executable, "-m", "tuner.cli", *arguments]


def run_session(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Session:
    """Run a command to its end; what it writes besides JSON lines goes to `log`.

    Raises:
        RuntimeError: it ended with another exit code than 0; quotes the end of the log.
    """
    started = time.perf_counter()
    events: list[Event] = []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | dict(environment or {})
        )
        assert process.stdout is not None
        with process, PeakSampler(process.pid) as sampler:
            for line in process.stdout:
                arrived = time.perf_counter() - started
                if (fields := _object(line)) is None:
                    file.write(line)
                else:
                    events.append(Event(arrived, fields))
            code = process.wait()
            seconds = time.perf_counter() - started
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        raise RuntimeError("\n".join([f"{' '.join(command)} ended with exit code {code}:", *tail]))
    return Session(seconds, sampler.peak, tuple(events))


def _object(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return None
    return fields if isinstance(fields, dict) else None


@dataclass(frozen=True)
class SearchTimes:
    """Where the wall time of one search on one lane went, in seconds.

    Attributes:
        start: from the process's start to the first step of the first trial: imports, Ray, lane, encoder.
        working: training and validation of all trials; the first trial's fill the prefix cache where it is empty.
        outside_each: between trials, per change of trial: what one more trial costs beside its own work.
        outside_mean: all time from the first trial's start to the last one's end that is not `working`, per trial;
            holds the part of `start` that follows the first trial's start.
        after: from the last trial's end to the process's: confirmation on the test gallery, export, report.
    """

    start: float
    working: float
    outside_each: float
    outside_mean: float
    after: float


def search_times(events: Sequence[Event], total: float) -> SearchTimes:
    """Split the `total` seconds of a search with at least two trials, side by side never more than one."""
    epochs = [event for event in events if event.fields["event"] == "epoch_done"]
    starts = [event for event in events if event.fields["event"] == "trial_started"]
    ends = [event for event in events if event.fields["event"] == "trial_ended"]
    assert len(ends) > 1, "one trial has no change of trial"
    failed = [event.fields for event in ends if event.fields["state"] != "complete"]
    assert not failed, f"trials did not end well: {failed}"
    first, last = epochs[0], ends[-1]
    trained = [_trained(event) for event in epochs]
    working = sum(trained)
    after_first = working - trained[0]
    return SearchTimes(
        start=first.seconds - trained[0],
        working=working,
        outside_each=(last.seconds - first.seconds - after_first) / (len(ends) - 1),
        outside_mean=(last.seconds - starts[0].seconds - working) / len(ends),
        after=total - last.seconds,
    )


def _trained(epoch: Event) -> float:
    """Seconds of training and validation."""
    return float(epoch.fields["train_seconds"]) + float(epoch.fields["validation_seconds"])


def show_search_times(times: SearchTimes, total: float) -> None:
    """Print the parts of a search."""
    rows = (
        ("start of process, Ray and lane, once", f"{times.start:.1f}"),
        ("training and validation, all trials", f"{times.working:.1f}"),
        ("outside training, each further trial", f"{times.outside_each:.2f}"),
        ("outside training, each trial, start of the lane shared out", f"{times.outside_mean:.2f}"),
        ("confirmation, export and report, once", f"{times.after:.1f}"),
        ("whole search", f"{total:.1f}"),
    )
    show("seconds of `tuner search`", ("part", "seconds"), rows)
