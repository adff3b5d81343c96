"""Where the traceback of a bug goes: into a file that can be sent to somebody, not onto the user's screen."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tuner import __version__
from tuner.data.cache import cache_root
from tuner.redact import printable, redact

DEBUG = "TUNER_DEBUG"  # set to 1, the traceback goes to standard error too
BUG = 70  # exit code, EX_SOFTWARE of sysexits.h
LOGS_KEPT = 20


def debugging() -> bool:
    """Whether the user wants to see tracebacks."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def show_traceback(error: BaseException) -> None:
    """Print it on standard error, without secrets."""
    print(_text(error), file=sys.stderr, end="")  # noqa: T201


def write_log(error: BaseException) -> Path | None:
    """The file with the traceback and the command line, without secrets; None where nothing can be written."""
    name = f"tuner-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    about = f"tuner {__version__}, Python {platform.python_version()}, {platform.platform()}"
    text = f"{about}\n{redact(shlex.join(sys.argv))}\n\n{_text(error)}"
    for folder in (cache_root() / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
                file.write(text)
        except OSError:
            continue
        if folder != Path(tempfile.gettempdir()):
            _forget_old(folder)
        return folder / name
    return None


def _forget_old(folder: Path) -> None:
    for old in sorted(folder.glob("tuner-*.log"))[:-LOGS_KEPT]:
        old.unlink(missing_ok=True)


def _text(error: BaseException) -> str:
    return printable(redact("".join(traceback.format_exception(error))))
