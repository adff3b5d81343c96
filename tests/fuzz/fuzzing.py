"""Runs commands of `tuner` on made-up inputs, in this process, and judges what they leave.

Whatever the input: exit code 0 or 2, with 2 exactly one sentence on standard error and every file as it was, no
traceback, no temporary names, under 30 s of the processor and 4 GB. In the test suite a fault fails the test, and
hypothesis shrinks the input. With TUNER_FUZZ=1000 (`make fuzz`), that many inputs of each kind are tried whatever is
found: each kind of fault is written to a folder with its input, and a table shows the counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from terminal import contents

from tuner import cli
from tuner.commands.diagnose import FOUND_ERRORS

LONG = int(os.environ.get("TUNER_FUZZ", "0"))
FAULTS = Path(os.environ.get("TUNER_FUZZ_FAULTS", "fuzz-faults")).absolute()
SECONDS, BYTES = 30.0, 4 << 30
LONGEST = 2_500  # characters of a sentence; a path may have several hundred
PROPERTY = "fuzz"
# Raised where a command would start Ray: the input was accepted.
REACHED_RAY = "Ray would start here"
TEMPORARY = re.compile(r"\.(partial|tmp|old|lock)$|^\.partial-|^tmp[a-z0-9_]{8}$")
# A list of the rejected rows is left on purpose; the sentence names it.
LEFT_ON_PURPOSE = re.compile(r"\.rejects\.jsonl$")
PROGRESS = re.compile(r"^[a-z ]+: \d+ of \d+\n", re.MULTILINE)
Files = Mapping[str, bytes]


class TooLong(BaseException):
    """The command took more than `SECONDS`."""


@dataclass
class Tally:
    """Counts of one kind of input."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Outcome:
    """What one command did; `fault` says which rule it broke, if any."""

    code: int
    out: str
    err: str
    fault: str | None


class Bench:
    """One kind of input: an empty folder for each, and the counts."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.folder, self.tally = kind, folder / "input", Tally()
        self.monkeypatch = monkeypatch
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._files: Files = {}
        monkeypatch.setenv("TUNER_CACHE", str(folder / "cache"))
        monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))
        self.folder.mkdir()
        monkeypatch.chdir(self.folder)

    def inputs(self, strategy: SearchStrategy[Any], suite: int) -> Callable[[Callable[[Any], None]], None]:
        """Call a function with `suite` inputs, or with as many as `make fuzz` asks for."""

        def call(function: Callable[[Any], None]) -> None:
            checked = settings(
                max_examples=LONG or suite,
                deadline=None,
                database=None,
                derandomize=not LONG,
                suppress_health_check=list(HealthCheck),
            )
            checked(given(strategy)(function))()
            if LONG:
                assert not self.tally.faults, self.tally.faults

        return call

    def lay(self, files: Files) -> None:
        """Put these files, and nothing else, into the folder."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        self._files = files

    def sound(self, *words: object) -> None:
        """A command that must be accepted: what the inputs are made from is right, and everything is imported."""
        outcome = self._judged(tuple(map(str, words)))
        assert outcome.fault is None and _accepted(outcome), outcome

    def run(self, *words: object) -> None:
        """Run a command on the files that were laid, and count what came of it."""
        command = tuple(map(str, words))
        if LONG:
            # Whatever ends this process: the words are known.
            FAULTS.mkdir(parents=True, exist_ok=True)
            (FAULTS / f"{self.kind}-latest.json").write_text(json.dumps(command))
        started = time.process_time()
        outcome = self._judged(command)
        self.tally.slowest = max(self.tally.slowest, time.process_time() - started)
        self.tally.inputs += 1
        if outcome.fault is not None:
            self._fault(outcome, command)
        elif _accepted(outcome):
            self.tally.accepted += 1
        else:
            self.tally.refused += 1

    def row(self) -> dict[str, object]:
        """The counts as plain values, which travel between processes."""
        tally = self.tally
        counts = {"inputs": tally.inputs, "refused": tally.refused, "accepted": tally.accepted}
        return {"kind": self.kind, **counts, "slowest": tally.slowest, "faults": dict(tally.faults)}

    def _judged(self, command: Sequence[str]) -> Outcome:
        before = contents(self.folder)
        code, out, err, broken = run_limited(command)
        if code == FOUND_ERRORS and command[0] == "diagnose":
            code = 0  # It has found something and said so.
        fault = broken or _said_wrong(code, err)
        after = contents(self.folder)
        if fault is None and code and REACHED_RAY not in err:
            changed = {name for name in before | after if before.get(name, b"") != after.get(name, b"")}
            changed = {name for name in changed if not LEFT_ON_PURPOSE.search(name)}
            fault = f"a refused command changed {sorted(changed)[0]}" if changed else None
        names = [*after, *(path.name for path in self.temporary.iterdir())]
        left = [name for name in names if TEMPORARY.search(Path(name).name)]
        new = sorted(set(left) - set(before))
        if fault is None and new:
            fault = f"left the temporary name {new[0]}"
        for path in self.temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Outcome(code, out, err, fault)

    def _fault(self, outcome: Outcome, command: Sequence[str]) -> None:
        if not LONG:
            raise AssertionError(
                f"{outcome.fault}\n{command!r:.1000}\nexit code {outcome.code}\n{_traceback(outcome.err)[-3000:]}"
            )
        kind = _kind_of_fault(outcome)
        self.tally.faults[kind] += 1
        if self.tally.faults[kind] == 1:
            place = FAULTS / f"{self.kind}-{len(self.tally.faults)}"
            shutil.rmtree(place, ignore_errors=True)
            for name, content in self._files.items():
                (place / "input" / name).parent.mkdir(parents=True, exist_ok=True)
                (place / "input" / name).write_bytes(content)
            place.mkdir(parents=True, exist_ok=True)
            said = f"exit code {outcome.code}\n{outcome.err}\n{_traceback(outcome.err)}"
            report = f"{kind}\n{outcome.fault}\n{json.dumps(command)}\n{said}"
            (place / "fault.txt").write_text(report, encoding="utf-8", errors="backslashreplace")


def _accepted(outcome: Outcome) -> bool:
    return outcome.code == 0 or REACHED_RAY in outcome.err


def run_limited(command: Sequence[str]) -> tuple[int, str, str, str | None]:
    """Exit code, output and error output of a command, and what stopped it if that was a limit or an exception."""
    # Standard output is strict, as in a terminal: half a character cannot be printed.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    words, sys.argv = sys.argv, ["tuner", *command]
    code, broken = 0, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
            cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except TooLong:
        broken = f"takes more than {SECONDS:.0f} s"
    except Exception as error:
        broken = f"raised {type(error).__name__}: {error}"
    finally:
        sys.argv = words
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if broken is None and used > peak and used * 1024 > BYTES:
        broken = f"takes {used / 1024**2:.1f} GB"
    said, complained = (stream.detach() for stream in (out, err))
    assert isinstance(said, io.BytesIO) and isinstance(complained, io.BytesIO)
    return code, said.getvalue().decode(), complained.getvalue().decode(), broken


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """End what takes too much of the processor, which does not depend on what else runs, or too much memory."""

    def stop(*_: object) -> None:
        raise TooLong

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def _said_wrong(code: int, err: str) -> str | None:
    """What is wrong with exit code and error output."""
    if code not in (0, 2):
        return f"exit code {code}"
    if "Traceback" in err:
        return "prints a traceback"
    if code == 0 or REACHED_RAY in err:
        return None
    if err.startswith(("Usage: ", "╭─ Error")):
        # Typer's own box about words that it cannot parse.
        return None
    err = PROGRESS.sub("", err)
    if not err.startswith("tuner: ") or err.count("\n") != 1:
        return "does not print exactly one sentence"
    if len(err) > LONGEST:
        return f"prints a sentence of {len(err)} characters"
    if any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in err[:-1] if sign != "\t"):
        return "prints characters that a terminal would obey"
    return None


def _traceback(err: str) -> str:
    """What the log of a bug holds, or what was printed."""
    log = re.search(r"the traceback is in (\S+)$", err.strip())
    return Path(log[1]).read_text(encoding="utf-8") if log and Path(log[1]).is_file() else err


def _kind_of_fault(outcome: Outcome) -> str:
    """Faults are one kind if the exception comes from the same line, or the same rule was broken alike."""
    text = _traceback(outcome.err)
    places = re.findall(r'/tuner/([\w/]+\.py)", line (\d+), in (\w+)', text)
    if "Traceback" in text and places:
        raised = re.findall(r"^(\w[\w.]*(?:Error|Exception|Warning)\b)", text, re.MULTILINE)
        return f"{(raised or ['an exception'])[-1]} in {places[-1][0]}, line {places[-1][1]}"
    words = re.sub(r"[\d']+|/\S+", "*", f"{outcome.fault}: {outcome.err[:80]}")
    return " ".join(words.split())[:120]


# The table of `make fuzz`, as a plugin of pytest


_rows: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the counts of each kind, also from other processes."""
    if report.when == "teardown":
        _rows.extend(value for name, value in report.user_properties if name == PROPERTY and isinstance(value, dict))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line for each kind."""
    terminalreporter.write_line(f"{'kind':<16}{'inputs':>8}{'refused':>9}{'accepted':>10}{'faults':>8}  slowest")
    for row in sorted(_rows, key=lambda row: str(row["kind"])):
        counts = f"{row['inputs']:>8,}{row['refused']:>9,}{row['accepted']:>10,}{sum(row['faults'].values()):>8,}"
        terminalreporter.write_line(f"{row['kind']:<16}{counts}{row['slowest']:>7.2f} s")
        for fault, count in row["faults"].items():
            terminalreporter.write_line(f"    {count} x {fault}")
