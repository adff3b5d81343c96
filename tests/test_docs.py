"""What the documents tell people to type exists: commands with their options, files behind links, make targets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from ray.scripts.scripts import cli as ray_cli
from typer.exceptions import TyperException

from tuner import cli

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("benchmarks/*.md")])
# Documents of one folder each may use the same name.
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]
PROGRAMS: dict[str, Any] = {"tuner": typer.main.get_command(cli.app), "ray": ray_cli}
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(tuner|ray) ([^`\n]+)`")
LONE_OPTION = re.compile(r"`(--[a-z][a-z0-9-]*)[^`\n]*`")
FILE = re.compile(r"`((?:tuner|tests|benchmarks|cluster|search_spaces|docs)/[\w./-]*\w\.(?:py|yaml|json|sh|md))`")
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def blocks(text: str) -> list[str]:
    """Lines of all fenced blocks, continued ones joined, without comments and prompts."""
    lines = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip() for line in lines]


def commands(text: str) -> list[list[str]]:
    """Words of each command of ours or of Ray's; `tuner a | b X` stands for `tuner a` and `tuner b X`."""
    found = []
    for line in blocks(text):
        program, _, rest = line.partition(" ")
        if program in PROGRAMS and rest:
            parts = [part.strip() for part in rest.split(" | ")]
            known = [part for part in parts if part.split()[0] in PROGRAMS[program].commands]
            found += [[program, *shlex.split(part)] for part in known or parts]
    return found


def find(program: str, words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words begin with, and the rest of them."""
    command = PROGRAMS[program]
    while hasattr(command, "commands") and words[:1] != ["--help"]:
        assert words and words[0] in command.commands, f"{program}: no command {' '.join(words[:1])!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_of(command: Any) -> set[str]:
    """Options of a command and of all commands below it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(below) for below in getattr(command, "commands", {}).values()))


def check(program: str, words: list[str]) -> None:
    """Parse a whole command line as the program would, without running it."""
    command, rest = find(program, words)
    if "--help" not in rest:
        command.make_context(command.name, list(rest))


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_command_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_ADDRESS", "http://127.0.0.1:8265")  # the documents say it may stand for --address
    for program, *words in commands(path.read_text(encoding="utf-8")):
        try:
            check(program, words)
        except Exception as error:
            detail = getattr(error, "message", None) or error
            pytest.fail(f"{path.name}: `{program} {' '.join(words)}`: {detail}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_options_named_in_the_text_exist(path: Path) -> None:
    for program, rest in INLINE.findall(path.read_text(encoding="utf-8")):
        words = rest.split()
        command, words = find(program, words)
        options = options_of(command)
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options | {"--help"}, f"{path.name}: `{program} {rest}`: {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_options_named_alone_exist(path: Path) -> None:
    known = {option for program in PROGRAMS.values() for option in options_of(program)}
    # Benchmarks take the parameters of their function `main` as options.
    benchmarks = " ".join(file.read_text(encoding="utf-8") for file in REPOSITORY.glob("benchmarks/*.py"))
    words = set(re.findall(r"\w+", benchmarks))
    named = LONE_OPTION.findall(path.read_text(encoding="utf-8"))
    assert not [name for name in named if name not in known and name[2:].replace("-", "_") not in words]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "log.md"], ids=lambda path: path.stem)
def test_files_named_in_the_text_exist(path: Path) -> None:
    """The log is dated: it may name what is gone."""
    assert not [name for name in FILE.findall(path.read_text(encoding="utf-8")) if not (REPOSITORY / name).exists()]


def test_decisions_are_complete_and_in_the_index() -> None:
    folder = REPOSITORY / "docs/decisions"
    records = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    index = re.findall(r"^\| \[(\d{3})\]\((\S+)\) \| (.+) \| .+ \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert [name for _, name, _ in index] == [path.name for path in records]
    for (number, name, title), path in zip(index, records, strict=True):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {number}. {title}\n"), name
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Context", "Decision", "Consequence"], name


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{path.name}: {target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{path.name}: {target}#{anchor} is no heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_make_targets_exist(path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z-]+)`", text)
    named += [line.split()[1] for line in blocks(text) if re.match(r"make [a-z]", line)]
    assert set(named) <= targets


def anchors(file: Path) -> set[str]:
    """Headings as GitHub makes links of them."""
    headings = re.findall(r"^#+ +(.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("tuner serach", "no command"),
        ("tuner search --adress http://127.0.0.1:8265", "--adress"),
        ("tuner search --trials many", "integer"),
        ("tuner status", "STUDY"),
        ("tuner cluster chekc cluster.yaml", "no command"),
        ("ray up cluster.yaml --yess", "--yess"),
    ],
)
def test_a_wrong_command_is_found(line: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_ADDRESS", "http://127.0.0.1:8265")
    (words,) = commands(f"```\n{line}   # a comment\n```\n")
    with pytest.raises((AssertionError, click.ClickException, TyperException)) as caught:
        check(words[0], words[1:])
    assert mistake.lower() in str(getattr(caught.value, "message", "") or caught.value).lower()


def test_alternatives_and_continued_lines_are_read() -> None:
    text = "```\ntuner studies | status STUDY   # with an address\n$ tuner search \\\n  --trials 3\nls | tuner\n```\n"
    assert commands(text) == [["tuner", "studies"], ["tuner", "status", "STUDY"], ["tuner", "search", "--trials", "3"]]
