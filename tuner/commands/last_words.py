"""The sentence of a process that cannot print one itself: Ray's C++ ends a driver whose raylet has gone, and nothing of
ours runs then. A small child holds the sentence and prints it when this process ends without having said goodbye.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

GOODBYE = b"."
# Nothing of the environment and no packages are needed; signals of a terminal reach this whole group.
CHILD = (
    "import os, signal, sys\n"
    "for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
    "    signal.signal(each, signal.SIG_IGN)\n"
    "if not os.read(0, 1):\n"
    "    os.write(2, sys.argv[1].encode('utf-8', 'replace'))\n"
)


class LastWords:
    """A child that prints a sentence on standard error if this process ends before `goodbye`."""

    def __init__(self, sentence: str) -> None:
        command = [sys.executable, "-I", "-S", "-c", CHILD, f"{sentence}\n"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)

    def goodbye(self) -> None:
        """This process prints its own end."""
        with suppress(OSError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.write(GOODBYE)
            self._child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=1)
