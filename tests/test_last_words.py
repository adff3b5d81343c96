"""A sentence that outlives its process, and is not printed where the process ends in order."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
from tuner.commands.last_words import LastWords
words = LastWords("tuner: ended; resume with `tuner search --resume naïve`")
{}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(1)"])
def test_a_process_that_is_ended_leaves_its_sentence(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end)], capture_output=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.decode() == "tuner: ended; resume with `tuner search --resume naïve`\n"
    assert done.stdout == b""


@pytest.mark.parametrize("end", ["words.goodbye()", "words.goodbye(); words.goodbye()", "words.goodbye(); os._exit(1)"])
def test_a_process_that_says_goodbye_leaves_nothing(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end)], capture_output=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_an_interrupt_of_the_whole_group_does_not_make_the_child_speak() -> None:
    """As Ctrl-C in a terminal: the process itself prints what has happened, a moment later."""
    script = SCRIPT.format(
        "import time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(0.5)\n"
        "os.killpg(0, signal.SIGINT)\ntime.sleep(0.2)\nwords.goodbye()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, check=False, start_new_session=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
