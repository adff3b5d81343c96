"""The command line itself: a lazy table of commands, options in messages, places checked first, and a net for bugs."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from terminal import Terminal

import tuner.commands
from tuner import __version__, cli
from tuner.commands import crash, paths
from tuner.commands.lazy import LazyCommands
from tuner.errors import ConfigError, DataError, Field

HEAVY = ("torch", "ray", "transformers", "peft", "optuna", "pyarrow", "numpy")
ROOT: Any = typer.main.get_command(cli.app)
ACTION = "tuner.commands.actions"


def command_lines() -> list[list[str]]:
    """Every command with its words, groups first."""
    found: list[list[str]] = [[]]
    for name, command in ROOT.commands.items():
        found += [[name], *([name, child] for child in getattr(command, "commands", ()))]
    return found


# Help


def test_help_imports_nothing_heavy() -> None:
    """In one process, one command after another, the list of all first: which of them imports something is named."""
    script = (
        "import contextlib, io, json, sys\n"
        "from tuner.cli import main\n"
        "found = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['tuner', *words, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n            main()\n        except SystemExit as ended:\n            assert not ended.code\n"
        "    assert 'Usage: tuner' in out.getvalue(), words\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    ours = [name for name in sys.modules if name.startswith('tuner.commands.')]\n"
        "    found.append((words, heavy, ours))\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(command_lines())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [words for words, heavy, _ in found if heavy] == []
    assert len(found) == len(cli.COMMANDS) + 1 + 4  # four commands of the groups
    listing = found[0][2]
    assert not {entry.where.partition(":")[0] for entry in cli.COMMANDS.values()} & {
        name.rpartition(".")[2] for name in listing
    }, "the list of commands imports none of them"


@pytest.mark.parametrize("command", [[], ["search"], ["diagnose"], ["spaces", "show"]])
def test_help_is_instant(command: list[str]) -> None:
    """Less than a second of processor time, however busy the machine is."""
    script = (
        "import resource, sys\n"
        "from tuner.cli import main\n"
        f"sys.argv = ['tuner', *{command!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(f'\\n{used.ru_utime + used.ru_stime}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1


def test_every_command_is_listed_with_its_line(terminal: Terminal) -> None:
    terminal.monkeypatch.setenv("COLUMNS", "200")
    listed = terminal.run("--help")
    assert listed.code == 0
    lines = [" ".join(line.strip("│ ").split()) for line in listed.out.splitlines()]
    for name, entry in cli.COMMANDS.items():
        assert (f"{name} {entry.help}" in lines) is not entry.hidden


def test_a_mistyped_command_names_the_nearest(terminal: Terminal) -> None:
    finished = terminal.run("serach")
    assert finished.code == 2 and "Did you mean 'search'?" in finished.err


def test_the_version(terminal: Terminal) -> None:
    assert terminal.run("--version").out == f"tuner {__version__}\n"


@pytest.mark.parametrize("path", sorted(Path(tuner.commands.__path__[0]).glob("*.py")), ids=lambda path: path.name)
def test_a_command_imports_its_action_and_nothing_else_late(path: Path) -> None:
    """Imports in functions are late ones: one for each command, of its action."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            late = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            named = {node.module or "" for node in late if isinstance(node, ast.ImportFrom)}
            ours = {f"{name}." for name in named if name.startswith("tuner")}
            assert len(late) <= 1 or not ours, f"{function.name} imports late more than one module"
            assert all(name.startswith(f"{ACTION}.") for name in ours), f"{function.name} imports {ours} late"


# Messages


def test_errors_name_options_where_the_rooms_name_fields(terminal: Terminal) -> None:
    message = terminal.refused("diagnose", "--data", ".", "--precision", "fp8")
    assert message == "tuner: --precision fp8: give auto, bf16, fp32\n"
    assert str(ConfigError(Field("precision"), " fp8: no")) == "precision fp8: no"


def test_a_field_that_is_no_option_of_the_command_keeps_its_name(terminal: Terminal) -> None:
    def refuse() -> None:
        raise DataError(Field("max_gpus"), ": none; omit ", Field("lanes"))

    terminal.monkeypatch.setattr("tuner.commands.actions.jobs.list_studies", lambda address: refuse())
    assert terminal.refused("studies", "--address", "http://x") == "tuner: max_gpus: none; omit lanes\n"


def test_messages_in_parts_survive_pickling_and_hide_secrets() -> None:
    error = ConfigError(Field("storage"), " s3://key:hidden@bucket: refused; omit ", Field("runs"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ConfigError
    assert str(copy) == str(error) == "storage s3://***@bucket: refused; omit runs"
    copy.name_fields({"storage": "--storage"})
    assert str(copy) == "--storage s3://***@bucket: refused; omit runs"
    assert str(pickle.loads(pickle.dumps(copy))) == str(copy)


# Places


BAD_OUTPUTS = {
    "": "is empty",
    "file/below": "a parent of it is a file",
    "/dev/null/x": "a parent of it is a file",
    "é" * 128: "has over 240 bytes",
    "/proc/nowhere": "permission denied",
}
# Each option that names a place to write: its command line without that option, and the field.
OUTPUTS = {
    "prepare --out": ["prepare", "here", "--encoder", "here", "--text-encoder", "here", "--out"],
    "report --out": ["report", "study", "--out"],
    "report --svg": ["report", "study", "--svg"],
    "export --out": ["export", "study", "--out"],
    "train --out": ["train", "here", "--out"],
    "embed --out": ["embed", "here", "here", "--out"],
    "cluster monitoring folder": ["cluster", "monitoring"],
}
# Each that names a place to read.
INPUTS = {
    "prepare manifest": ["prepare", "--encoder", "here", "--text-encoder", "here"],
    "evaluate adapter": ["evaluate"],
    "embed adapter": ["embed", "--out", "e.parquet", "{}", "here"],
    "embed audio": ["embed", "--out", "e.parquet", "here"],
    "train config": ["train", "--out", "again"],
    "cluster check file": ["cluster", "check"],
    "diagnose --adapter": ["diagnose", "--adapter"],
    "diagnose --peft-config": ["diagnose", "--peft-config"],
    "diagnose --data": ["diagnose", "--data"],
}
# Folders of studies are looked into only where the study may be; a wrong one says that no study is there.
STUDIES = {"report --runs", "export --runs", "send folder"}
ELSEWHERE = {"cluster monitoring --ray-temp"}  # on another machine


def test_every_place_is_tried_here() -> None:
    """A new option that names a place must be given its case, above or in the tests of searches."""
    places = set()
    for words in command_lines():
        command: Any = ROOT
        for word in words:
            command = command.commands[word]
        for parameter in command.params:
            descriptor = getattr(parameter, "type_descriptor", None)
            annotation = getattr(descriptor, "annotation", None)
            if "Path" in str(annotation) and words[0] != "search":
                name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name
                places.add(f"{' '.join(words)} {name}")
    audio_roots = {"prepare --audio-root", "diagnose --audio-root"}  # test_cli.py, test_audio_root.py
    assert places - audio_roots <= {*OUTPUTS, *INPUTS, *STUDIES, *ELSEWHERE}
    assert "embed --out" in places


@pytest.fixture
def here(terminal: Terminal) -> Terminal:
    """A folder and a file to name where another place is the bad one; torch and Ray are never reached."""
    (terminal.folder / "here").mkdir()
    (terminal.folder / "file").write_text("x")
    return terminal


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("place", BAD_OUTPUTS)
def test_a_place_that_cannot_be_written_is_refused_first(here: Terminal, case: str, place: str) -> None:
    message = here.refused(*OUTPUTS[case], place)
    named = case.split()[-1]
    assert BAD_OUTPUTS[place] in message and len(message) < 400
    if place or named.startswith("--"):
        assert message.startswith(f"tuner: {named}")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "cannot be used (Input/output error)"),
    ],
)
def test_a_disk_that_refuses_files(here: Terminal, number: int, said: str) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    here.monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for command in ([*OUTPUTS["report --out"], "page.html"], [*OUTPUTS["export --out"], "new"]):
        assert said in here.refused(*command)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("here", "is a folder; give a file"),
        ("missing/page.html", "there is no folder missing; make it first"),
        ("/dev/null", "is not an ordinary file"),
    ],
)
def test_a_page_needs_an_ordinary_file(here: Terminal, place: str, said: str) -> None:
    assert said in here.refused("report", "study", "--out", place)
    assert said in here.refused("embed", "here", "here", "--out", place)


@pytest.mark.parametrize("place", BAD_OUTPUTS)
def test_a_search_needs_a_folder_for_its_studies(here: Terminal, place: str) -> None:
    """Before the data are looked at."""
    message = here.refused("search", "--data", "nowhere", "--runs", place)
    assert message.startswith("tuner: --runs") and BAD_OUTPUTS[place] in message


def test_an_export_makes_a_new_folder(here: Terminal) -> None:
    assert "--out here: exists; give a new folder" in here.refused("export", "study", "--out", "here")


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("place", ["", "nowhere", "file/below", "é" * 128])
def test_a_place_that_cannot_be_read_is_refused_first(here: Terminal, case: str, place: str) -> None:
    words = INPUTS[case]
    filled = [place if word == "{}" else word for word in words] if "{}" in words else [*words, place]
    message = here.refused(*filled)
    assert len(message) < 400
    assert place == "" or place[:50] in message


@pytest.mark.parametrize("study", ["nowhere", "file/below", "é" * 128, ""])
@pytest.mark.parametrize("command", ["report", "export", "send"])
def test_a_study_that_cannot_be_there(here: Terminal, command: str, study: str) -> None:
    here.refused(command, study)
    if command != "send":
        here.refused(command, "study", "--runs", study)


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    paths.check_output_folder("out", tmp_path / "a" / "b")
    paths.check_new_folder("out", tmp_path / "a")
    paths.check_output_file("out", tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == [] and tmp_path.stat().st_mtime_ns >= before


# The net


def broken(terminal: Terminal, error: Exception) -> None:
    def fail() -> None:
        raise error

    terminal.monkeypatch.setattr("tuner.commands.spaces.list_spaces", fail)


def test_a_bug_is_one_sentence_and_a_log(terminal: Terminal) -> None:
    terminal.monkeypatch.setenv("SOME_TOKEN", "very-secret-value")
    broken(terminal, RuntimeError("no very-secret-value today\nand more"))
    finished = terminal.run("spaces")
    assert finished.code == crash.BUG == 70 and finished.out == ""
    (log,) = (terminal.folder / "cache" / "logs").iterdir()
    assert finished.err == f"tuner: unexpected error, RuntimeError: no *** today; the traceback is in {log}\n"
    text = log.read_text()
    assert "Traceback" in text and "RuntimeError: no *** today" in text and "tuner spaces" in text
    assert "very-secret-value" not in text
    assert log.stat().st_mode & 0o077 == 0


def test_a_bug_shows_its_traceback_to_those_who_ask(terminal: Terminal) -> None:
    terminal.monkeypatch.setenv(crash.DEBUG, "1")
    broken(terminal, RuntimeError("no"))
    finished = terminal.run("spaces")
    assert finished.code == 70 and "Traceback" in finished.err
    assert finished.err.splitlines()[-1].startswith("tuner: unexpected error, RuntimeError: no; ")


def test_a_bug_where_no_log_can_be_written(terminal: Terminal) -> None:
    terminal.monkeypatch.setenv("TUNER_CACHE", "/dev/null/cache")
    terminal.monkeypatch.setattr("tempfile.gettempdir", lambda: "/dev/null/tmp")
    broken(terminal, RuntimeError("no"))
    assert terminal.run("spaces").err.endswith("no; set TUNER_DEBUG=1 to see the traceback\n")


def test_old_logs_go(terminal: Terminal) -> None:
    folder = terminal.folder / "cache" / "logs"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"tuner-20200101-0000{number:02}-1.log").touch()
    broken(terminal, RuntimeError("no"))
    terminal.run("spaces")
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == crash.LOGS_KEPT and left[0] == "tuner-20200101-000011-1.log"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x", "a/b"), "a/b: the disk is full; free space or give another place"),
        (OSError(errno.EROFS, "x", "a/b"), "a/b: the disk is read-only"),
        (NotADirectoryError(errno.ENOTDIR, "x", "a/b"), "a/b: a parent of it is a file"),
        (OSError(errno.ENAMETOOLONG, "x", "a/b"), "a/b: the name is too long"),
        (FileNotFoundError(errno.ENOENT, "x", "a/b"), "a/b: does not exist"),
        (OSError(errno.ENOSPC, "no room for 'a/b'"), "no room for 'a/b': the disk is full"),
    ],
)
def test_a_disk_at_fault_is_one_sentence(terminal: Terminal, error: OSError, said: str) -> None:
    broken(terminal, error)
    assert said in terminal.refused("spaces")


def test_a_disk_that_breaks_is_not_the_users_fault(terminal: Terminal) -> None:
    broken(terminal, OSError(errno.EIO, "Input/output error"))
    assert terminal.run("spaces").code == 70


def test_the_table_is_what_is_there() -> None:
    assert isinstance(ROOT.commands, LazyCommands)
    for name, command in ROOT.commands.items():
        assert command.name == name and command.hidden is cli.COMMANDS[name].hidden
