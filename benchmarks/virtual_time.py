"""An asyncio event loop whose clock jumps: hours of waiting pass in no time, in the order in which they would have.

Code that waits with asyncio runs in it unchanged. Only what it awaits takes time; computing takes none, unless it is
measured and then slept for.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting for `timeout` seconds, say that they have passed."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits and nothing will ever happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 0 seconds; `time()` moves only when every task waits."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now


@contextmanager
def own_clock(loop: VirtualLoop, *modules: ModuleType) -> Iterator[None]:
    """Let `time.monotonic()` in these modules read the loop's clock."""
    clock = SimpleNamespace(monotonic=loop.time)
    patches = [patch.object(module, "time", clock) for module in modules]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def run_virtually(main: Coroutine[Any, Any, T], loop: VirtualLoop) -> T:
    """Run to the end, then end what it left running."""
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()
