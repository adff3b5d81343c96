"""Starting Ray inside this process: a busy machine gets a second try, and every failure is one sentence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

import psutil

from tuner.errors import ClusterError, first_line
from tuner.leftovers import end_own

# Ray reads the first when it is imported; Ray Tune has a switch of its own.
NO_AUTO_INIT = {"RAY_ENABLE_AUTO_CONNECT": "0", "TUNE_DISABLE_AUTO_INIT": "1"}
# What another try may change. Others of these kinds (a path, a setting) fail in the same way again.
PASSING, LASTING = (ConnectionError, TimeoutError), (OSError, ValueError, TypeError, ImportError)
REASON_CHARACTERS = 300
Context = TypeVar("Context")


def forbid_auto_init() -> None:
    """From now on, no call of Ray starts a Ray of its own, in this process or in those that it starts.

    Most functions of Ray do so when none is up: a thread that asks for an actor after the end of a search would start a
    second Ray, without a token, in a folder that is open to all, or join another Ray of this machine.
    """
    from ray._private import auto_init_hook

    os.environ.update(NO_AUTO_INIT)
    # Whoever has imported Ray before us has read the variable.
    auto_init_hook.enable_auto_connect = False


def start_patiently(start: Callable[[], Context], folder: Path) -> Context:
    """Start Ray; once more where Ray itself gave up waiting: it does so after 30 s, which a busy machine may need.

    Args:
        start: calls `ray.init`.
        folder: where Ray keeps its sessions.

    Raises:
        ClusterError: Ray did not start, for any reason; nothing that it had started is left.
    """
    for retried in (False, True):
        try:
            with _leaving_nothing(folder), held_stderr("success"):
                return start()
        except Exception as error:
            lasting = isinstance(error, LASTING) and not isinstance(error, PASSING)
            if lasting or retried:
                raise ClusterError(_sentence(error, retried, f"{folder}/session_latest/logs")) from error
    raise AssertionError


def _sentence(error: Exception, retried: bool, logs: str) -> str:
    reason = short_reason(error)
    if "AF_UNIX path length" in str(error):
        return f"Ray cannot start ({reason}); name a shorter folder of yours in RAY_TMPDIR"
    if retried:
        return (
            f"Ray did not start in two tries ({reason}); run the same command again when this machine is less busy, or "
            f"look for the cause in {logs}"
        )
    return f"Ray cannot start ({reason}); its logs are in {logs}"


def short_reason(error: Exception) -> str:
    """Type and first line of what Ray raised."""
    return first_line(error)[:REASON_CHARACTERS]


@contextmanager
def _leaving_nothing(folder: Path) -> Iterator[None]:
    """End what Ray has started if the block fails, an interrupt included: Ray would leave it until this process ends,
    and then to its agents to find out."""
    before = _ray_children()
    try:
        yield
    except BaseException:
        import ray

        with suppress(Exception):
            ray.shutdown()
        left = [child for child in _ray_children() if child not in before]
        for process in [*left, *_below(left)]:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        # What a raylet had started that has ended in between.
        end_own(folder)
        raise


def _ray_children() -> list[psutil.Process]:
    """Processes that Ray has started from this one: programs and modules of its package."""
    import ray

    package, found = str(Path(ray.__file__).parent), []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(package in argument for argument in child.cmdline()):
                found.append(child)
    return found


def _below(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found += process.children(recursive=True)
    return found


@contextmanager
def held_stderr(shown: Literal["success", "failure"]) -> Iterator[None]:
    """Hold back what C++ and Ray's loggers write to stderr, and show it at the end of the block if that is the end
    which is named; on the other, what matters is an exception or nothing."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        end = "failure"
        try:
            yield
            end = "success"
        finally:
            os.dup2(stderr, 2)
            if end == shown:
                held.seek(0)
                os.write(2, held.read())
            os.close(stderr)
