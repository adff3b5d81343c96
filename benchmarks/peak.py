"""Peak memory of a process and its descendants: the proportional set size of all of them together.

PSS counts a page that several processes map once in total, so memory-mapped stores and shared libraries are not
counted again for every Ray worker, as they would be in a sum of resident set sizes.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from benchmarks.table import show

INTERVAL_SECONDS = 0.5
GB = 10**9


@dataclass(frozen=True)
class Peak:
    """The sample with the largest sum: bytes in total and by process name, with the number of such processes."""

    total: int = 0
    by_name: dict[str, int] = field(default_factory=dict)
    processes: dict[str, int] = field(default_factory=dict)
    samples: int = 0


class PeakSampler:
    """Samples the PSS of a process and all its descendants until the context ends.

    A descendant stays counted when its parent ends before it and another process adopts it.
    """

    def __init__(self, pid: int, interval: float = INTERVAL_SECONDS) -> None:
        self.peak = Peak()
        self._known = {psutil.Process(pid)}
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.sample()
            if self._stop.wait(self._interval):
                return

    def sample(self) -> None:
        """Take one sample now."""
        bytes_of: Counter[str] = Counter()
        number_of: Counter[str] = Counter()
        for process in self._family():
            try:
                pss, name = process.memory_full_info().pss, label(process)
            except psutil.Error:
                continue  # it ended since it was listed
            bytes_of[name] += pss
            number_of[name] += 1
        total, taken = bytes_of.total(), self.peak.samples + 1
        if total >= self.peak.total:
            self.peak = Peak(total, dict(bytes_of), dict(number_of), taken)
        else:
            self.peak = Peak(self.peak.total, self.peak.by_name, self.peak.processes, taken)

    def _family(self) -> set[psutil.Process]:
        for process in tuple(self._known):
            try:
                self._known.update(process.children(recursive=True))
            except psutil.Error:
                self._known.discard(process)
        return self._known


def label(process: psutil.Process) -> str:
    """What a process is, in a word: the name that Ray gives its workers, or the script or module that runs."""
    command = process.cmdline()
    if not command or command[0].startswith("ray::"):
        return command[0] if command else process.name()
    program = Path(command[0]).name
    if not program.startswith("python"):
        return program
    if "-m" in command[1:-1]:
        return command[command.index("-m") + 1]
    if "-c" in command:
        return f"{program} -c"
    return next((Path(part).name for part in command[1:] if not part.startswith("-")), program)


def show_peak(title: str, peak: Peak) -> None:
    """Print a peak by process name, largest first."""
    rows = [
        (name, str(peak.processes[name]), f"{size / GB:.2f}")
        for name, size in sorted(peak.by_name.items(), key=lambda item: -item[1])
    ]
    rows.append(("together", str(sum(peak.processes.values())), f"{peak.total / GB:.2f}"))
    show(f"{title} ({peak.samples} samples)", ("process", "number", "PSS GB"), rows)
