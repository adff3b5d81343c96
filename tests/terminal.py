"""The command line in this process, in a folder of its own: the fixture `terminal` of conftest.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tuner import cli


@dataclass
class Finished:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass
class Terminal:
    """Runs commands in this process, in a folder of its own."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: object) -> Finished:
        self.monkeypatch.setattr(sys, "argv", ["tuner", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = self.capsys.readouterr()
        return Finished(int(ended.value.code or 0), printed.out, printed.err)

    def refused(self, *arguments: object) -> str:
        """The one sentence of a command that must fail and leave everything as it was."""
        before = contents(self.folder)
        finished = self.run(*arguments)
        assert finished.code == 2, finished
        assert finished.out == ""
        assert finished.err.startswith("tuner: "), finished.err
        assert finished.err.count("\n") == 1, finished.err
        assert contents(self.folder) == before
        return finished.err


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
