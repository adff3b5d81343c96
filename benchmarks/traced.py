"""Which test runs which line of some modules: a pytest plugin for `mutants.py`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

SLOWEST_TEST = 10.0


class Tracer:
    """Records lines while tests run. What the setup of a test runs counts for all tests of its file. Times are of the
    processor, so that a busy machine changes nothing.

    Args:
        root: folder of the repository that is tested.
        modules: their files, relative to it.
    """

    def __init__(self, root: Path, modules: Sequence[str]) -> None:
        self._names = {str(root / module): module for module in modules}
        self._hit: set[tuple[str, int]] = set()
        self._lines: dict[str, set[tuple[str, int]]] = defaultdict(set)  # by test, and by file for setups
        self._seconds: dict[str, float] = defaultdict(float)
        self._unusable: set[str] = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """Record for the file."""
        yield from self._watch(_file_of(item.nodeid), item.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Record for the test."""
        yield from self._watch(item.nodeid, item.nodeid)
        if self._seconds[item.nodeid] > SLOWEST_TEST:
            self._unusable.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome."""
        if report.outcome != "passed":
            self._unusable.add(report.nodeid)

    def write(self, path: Path) -> None:
        """Write the lines of each fast test that passed, and the names of the other tests."""
        tests = {test: self._lines_of(test) for test in sorted(self._seconds.keys() - self._unusable)}
        path.write_text(json.dumps({"tests": tests, "unusable": sorted(self._unusable)}))

    def _lines_of(self, test: str) -> dict[str, Any]:
        lines: dict[str, list[int]] = defaultdict(list)
        for module, line in sorted(self._lines[test] | self._lines[_file_of(test)]):
            lines[module].append(line)
        return {"seconds": self._seconds[test], "lines": lines}

    def _watch(self, key: str, test: str) -> Iterator[None]:
        self._hit, started = self._lines[key], time.process_time()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        yield
        sys.settrace(None)
        threading.settrace(None)
        self._seconds[test] += time.process_time() - started

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        module = self._names.get(frame.f_code.co_filename)
        if module is None:
            return None
        self._hit.add((module, frame.f_lineno))
        return self._trace


def _file_of(test: str) -> str:
    return test.partition("::")[0]
