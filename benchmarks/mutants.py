"""Plant small faults and count those that a fast unit test notices: `make mutants`, or a sample with `--sample 400`.

Faults are those of `mutations.py`. The tests run once to learn which of them run which line (`traced.py`). Then each
fault is planted in a copy of the repository, and the tests that run its statement follow in a forked process, where
torch and transformers are imported already. Test files that start Ray, or that may take minutes, are not run.

Results go to build/mutants.jsonl. A run goes on where the last one ended, tries changes of an edited module again, and
with `--again` those that survived.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import typer

from benchmarks.mutations import Mutation, mutations_of
from benchmarks.table import show
from benchmarks.traced import Tracer

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/mutants"
RESULTS = ROOT / "build/mutants.jsonl"
ROOMS = ("tuner/train", "tuner/lora", "tuner/study", "tuner/search/stopping.py", "tuner/data/splits.py")
KILLED, TIMEOUT, SURVIVED, NOT_RUN = "killed", "timeout", "survived", "no test runs it"
BROKEN = 70  # exit status of a forked process that raised
SLOW_IMPORTS = ("ray.", "searches.", "benchmarks.")
FIRST_TESTS = 12  # tried before the others
MOST_SECONDS = 60.0  # of tests for one change, by their traced times
SLOWEST_FILE = 1800.0
# Imported once, before anything is forked.
HEAVY = [
    "torch", "transformers.models.whisper.modeling_whisper", "peft.tuners.lora", "optuna", "pyarrow.parquet",
    "hypothesis", "moocore", "soundfile", "pydantic", "safetensors.torch",
]  # fmt: skip
SKIPPED = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")


def modules_of(room: str) -> list[str]:
    """Files of a room, relative to the repository."""
    path = ROOT / room
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [str(file.relative_to(ROOT)) for file in files]


def files_of_tests(rooms: Sequence[str]) -> list[str]:
    """Test files that import from the rooms, without those that start Ray, may take minutes or are of benchmarks."""
    wanted = tuple(room.removesuffix(".py").replace("/", ".") + "." for room in rooms)
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        names = {f"{n.module}.{a.name}." for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
        names |= {f"{a.name}." for n in nodes if isinstance(n, ast.Import) for a in n.names}
        slow = "mark.timeout" in text or any(name.startswith(SLOW_IMPORTS) for name in names)
        if not slow and any(name.startswith(wanted) for name in names):
            found.append(str(path.relative_to(ROOT)))
    return found


def trace(files: Sequence[str], modules: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Tests by name with their lines; a test file runs only if it or a module has changed since the last time."""
    content = b"".join((ROOT / name).read_bytes() for name in modules)
    digests = {file: hashlib.sha256((ROOT / file).read_bytes() + content).hexdigest()[:16] for file in files}
    paths = {file: BUILD / f"trace-{digest}.json" for file, digest in digests.items()}
    new = [file for file in files if not paths[file].exists()]
    typer.echo(f"{len(files)} test files; {len(new)} run once to learn which lines each test runs")
    spread(new, folders, lambda file, folder: _trace_file(file, modules, folder, paths[file]))
    traced = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    unusable = [name for each in traced for name in each["unusable"]]
    unusable += [file for file, path in paths.items() if not path.exists()]
    typer.echo(f"not used, since they fail here, are skipped or slow: {' '.join(unusable) or 'none'}")
    return {name: test for each in traced for name, test in each["tests"].items()}


def _trace_file(file: str, modules: Sequence[str], folder: Path, path: Path) -> None:
    def run() -> int:
        tracer = Tracer(folder, modules)
        code = _pytest(folder, [file], tracer)
        tracer.write(path)
        return code

    forked(run, SLOWEST_FILE)


def _pytest(folder: Path, arguments: Sequence[str], *plugins: object) -> int:
    """Run tests of a copy in this process, which ends afterwards."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    # Plugins are imported here before pytest looks for them.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *arguments], plugins=list(plugins)))


def _try(folder: Path, tests: Sequence[str], seconds: int) -> int:
    # Of the processor: a busy machine must not look like a loop without an end.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    # A changed module may have the time and the size of the one before: bytecode would hide the change.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    return _pytest(folder, ["-x", *tests])


def forked(work: Callable[[], int], seconds: float) -> int | None:
    """Exit status of a function in a process group of its own; None if it took longer and was killed."""
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            os.setsid()
            status = work()
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def tests_of(mutation: Mutation, tests: dict[str, Any]) -> list[str]:
    """Tests that may notice a change, fastest first, as many as `MOST_SECONDS` allow."""
    here = {name: set(test["lines"].get(mutation.module, ())) for name, test in tests.items()}
    seeing = [name for name, lines in here.items() if lines & set(mutation.lines) or (lines and mutation.at_import)]
    seeing.sort(key=lambda name: (tests[name]["seconds"], name))
    spent = itertools.accumulate(tests[name]["seconds"] for name in seeing)
    return [name for name, seconds in zip(seeing, spent, strict=True) if seconds <= MOST_SECONDS] or seeing[:1]


def judge(mutation: Mutation, tests: dict[str, Any], folder: Path) -> str:
    """Plant a change and say what became of it."""
    names, path = tests_of(mutation, tests), folder / mutation.module
    source, stat = path.read_bytes(), path.stat()
    path.write_bytes(mutation.apply(source))
    try:
        for part in filter(None, (names[:FIRST_TESTS], names[FIRST_TESTS:])):
            seconds = 30 + round(5 * sum(tests[name]["seconds"] for name in part))
            status = forked(lambda part=part, seconds=seconds: _try(folder, part, seconds), SLOWEST_FILE)  # type: ignore[misc]
            assert status != BROKEN, f"see {folder}.log"
            if status != 0:
                return TIMEOUT if status in (None, -signal.SIGXCPU) else KILLED
    finally:
        path.write_bytes(source)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return SURVIVED if names else NOT_RUN


def spread(items: Sequence[T], folders: Sequence[Path], work: Callable[[T, Path], None]) -> None:
    """Work on items in as many processes as there are copies."""
    children = []
    for job, folder in enumerate(folders):
        if (child := os.fork()) == 0:
            try:
                for item in items[job :: len(folders)]:
                    work(item, folder)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def record(mutation: Mutation, tests: dict[str, Any], folder: Path) -> None:
    """Judge a change and add a line to the results."""
    start = time.monotonic()
    line: dict[str, Any] = {"key": mutation.key, "verdict": judge(mutation, tests, folder)}
    line |= {"module": mutation.module, "line": mutation.line, "before": mutation.before, "after": mutation.after}
    line["seconds"] = round(time.monotonic() - start, 1)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_results() -> dict[str, str]:
    """The latest verdict on each change."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {result["key"]: result["verdict"] for result in map(json.loads, lines)}


def left_of(chosen: Sequence[Mutation], again: bool) -> list[Mutation]:
    """Changes without a verdict, or also those that survived."""
    done = {key for key, verdict in read_results().items() if verdict in (KILLED, TIMEOUT) or not again}
    return [mutation for mutation in chosen if mutation.key not in done]


def report(rooms: Sequence[str], chosen: Sequence[Mutation]) -> None:
    """Print survivors and the score of each room."""
    verdicts, rows, every = read_results(), [], list[str]()
    for room in rooms:
        judged = [(m, verdicts[m.key]) for m in chosen if m.module in modules_of(room) and m.key in verdicts]
        for mutation, verdict in judged:
            if verdict in (SURVIVED, NOT_RUN):
                typer.echo(
                    f"{mutation.module}:{mutation.line} {verdict}: {mutation.before:.80} -> {mutation.after:.80}"
                )
        every += (found := [verdict for _, verdict in judged])
        rows.append(_row(room, found))
    show("Changes of the code that a test notices", ("room", "changes", "killed", "score"), [*rows, _row("all", every)])


def _row(name: str, verdicts: Sequence[str]) -> tuple[str, str, str, str]:
    killed = sum(verdict in (KILLED, TIMEOUT) for verdict in verdicts)
    return name, str(len(verdicts)), str(killed), f"{killed / len(verdicts):.1%}" if verdicts else "-"


def main() -> None:
    """Judge what is left of the sample and print its score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, help="folders or modules")
    parser.add_argument("--sample", type=int, help="number of changes, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="changes that are tried at once")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    options = parser.parse_args()
    folders = [BUILD / f"copy-{job}" for job in range(options.jobs)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, folder, ignore=SKIPPED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in HEAVY:
        importlib.import_module(name)
    sources = {name: (ROOT / name).read_bytes() for room in options.rooms for name in modules_of(room)}
    tests = trace(files_of_tests(options.rooms), list(sources), folders)
    every = [mutation for name, source in sources.items() for mutation in mutations_of(name, source)]
    chosen = random.Random(options.seed).sample(every, min(options.sample or len(every), len(every)))
    left = left_of(chosen, options.again)
    typer.echo(f"{len(every)} changes, {len(chosen)} drawn, {len(left)} to try with {len(tests)} tests")
    spread(left, folders, lambda mutation, folder: record(mutation, tests, folder))
    report(options.rooms, chosen)


if __name__ == "__main__":
    main()
