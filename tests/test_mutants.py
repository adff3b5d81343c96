"""The faults that `make mutants` plants, and its verdicts on a module with one good test."""

from __future__ import annotations

import json
import signal
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutations import mutations_of

SOURCE = b'''"""Words."""
LIMIT: int = 3


def clamp(value: float, quick: bool = True) -> float:
    """No change here: 1 + 1."""
    assert value != 0
    if value > LIMIT and quick:
        raise ValueError(f"{value + 1}: is above {LIMIT}")
    print("a sentence")
    return -value * 0.5


def never(text: str) -> str:
    return text + "x" if text else ""
'''
TEST = """
import pytest
from sized import clamp

def test_clamp():
    assert clamp(2) == -1
    with pytest.raises(ValueError):
        clamp(4)
"""


def test_the_changes_of_a_module() -> None:
    found = [(each.line, each.before, each.after) for each in mutations_of("sized.py", SOURCE)]
    assert found == [
        (2, "3", "4"),
        (5, "True", "False"),
        (8, "value > LIMIT and quick", "(value > LIMIT or quick)"),
        (8, "value > LIMIT", "(value >= LIMIT)"),
        (9, 'raise ValueError(f"{value + 1}: is above {LIMIT}")', "pass"),
        (10, 'print("a sentence")', "pass"),
        (11, "return -value * 0.5", "return None"),
        (11, "-value * 0.5", "(-value / 0.5)"),
        (11, "-value", "(value)"),
        (11, "0.5", "1.0"),
        (15, 'return text + "x" if text else ""', "return None"),
        (15, 'text + "x"', "(text - 'x')"),
        (15, '"x"', "'XXx'"),
        (15, "text", "(not text)"),
    ]


def test_a_change_is_one_place_of_the_file_and_has_its_own_key() -> None:
    changes = mutations_of("sized.py", SOURCE)
    assert len({change.key for change in changes}) == len(changes)
    assert {change.key for change in mutations_of("other.py", SOURCE)}.isdisjoint(change.key for change in changes)
    (limit,) = (change for change in changes if change.before == "3")
    assert limit.apply(SOURCE) == SOURCE.replace(b"= 3", b"= 4")
    assert limit.at_import and not changes[-1].at_import


def test_verdicts_and_a_file_that_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test sees the sign of the result, not what is printed; it does not run `never`."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the forked runs start in a fraction of the time
    folder = tmp_path / "copy-0"
    folder.mkdir()
    (folder / "sized.py").write_bytes(SOURCE)
    (folder / "test_sized.py").write_text(textwrap.dedent(TEST))
    path = tmp_path / "trace.json"
    mutants._trace_file("test_sized.py", ["sized.py"], folder, path)
    tests = json.loads(path.read_text())["tests"]
    assert set(tests) == {"test_sized.py::test_clamp"}
    assert {8, 9, 11} <= set(tests["test_sized.py::test_clamp"]["lines"]["sized.py"])
    verdicts = {}
    for change in mutations_of("sized.py", SOURCE):
        if change.before in ("-value", 'print("a sentence")', '"x"'):
            verdicts[change.before] = mutants.judge(change, tests, folder)
    assert verdicts == {
        "-value": mutants.KILLED,
        'print("a sentence")': mutants.SURVIVED,
        '"x"': mutants.NOT_RUN,
    }
    assert (folder / "sized.py").read_bytes() == SOURCE


def test_what_takes_too_long_is_ended() -> None:
    started = time.monotonic()
    assert mutants.forked(lambda: time.sleep(60) or 0, 0.3) is None  # type: ignore[func-returns-value]
    assert mutants.forked(lambda: 3, 10) == 3
    assert time.monotonic() - started < 10


def test_a_change_that_never_ends_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's time, which a busy machine does not stretch."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/test_loop.py").write_text("def test_loop():\n    while True:\n        pass\n")
    status = mutants.forked(lambda: mutants._try(tmp_path / "loop", ["test_loop.py"], 1), 60)
    assert status == -signal.SIGXCPU


def test_only_changes_without_a_verdict_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run goes on where it ended; the last verdict on a change counts."""
    monkeypatch.setattr(mutants, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(mutants, "judge", lambda change, tests, folder: mutants.KILLED)
    changes = mutations_of("sized.py", SOURCE)
    assert mutants.read_results() == {}
    for change in changes[:3]:
        mutants.record(change, {}, tmp_path)
    monkeypatch.setattr(mutants, "judge", lambda change, tests, folder: mutants.SURVIVED)
    for change in changes[2:4]:
        mutants.record(change, {}, tmp_path)
    known = mutants.read_results()
    assert [known[change.key] for change in changes[:4]] == ["killed", "killed", "survived", "survived"]
    assert mutants.left_of(changes, again=False) == changes[4:]
    assert mutants.left_of(changes, again=True) == changes[2:]


def test_rooms_have_tests_that_need_no_ray() -> None:
    files = mutants.files_of_tests(mutants.ROOMS)
    assert {"tests/test_pack.py", "tests/test_losses.py", "tests/test_manifest.py"} <= set(files)
    assert not {"tests/test_search.py", "tests/test_faults.py"} & set(files)
    assert all(mutants.modules_of(room) for room in mutants.ROOMS)
