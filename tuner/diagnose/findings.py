"""What the steps of a diagnosis found: sentences with a level, values for programs. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "error"]
State = Literal["ok", "warning", "error", "skipped"]
STEPS = ("environment", "data", "checkpoint", "features", "forward", "backward", "strategy")


@dataclass(frozen=True)
class Finding:
    """One sentence; `advice` says what to do about a warning or an error."""

    level: Level
    text: str
    advice: str = ""


@dataclass
class Step:
    """What one step found. `values` holds the measured numbers, plain and stable, for `--json`."""

    name: str
    findings: list[Finding] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None  # why it could not run

    @property
    def number(self) -> int:
        """Its position among the seven steps, from 1."""
        return STEPS.index(self.name) + 1

    @property
    def state(self) -> State:
        """The worst of its findings; notes do not count."""
        levels = {finding.level for finding in self.findings}
        if "error" in levels:
            return "error"
        if self.skipped is not None:
            return "skipped"
        return "warning" if "warning" in levels else "ok"

    def ok(self, text: str) -> None:
        """Report that something is right."""
        self.findings.append(Finding("ok", text))

    def note(self, text: str) -> None:
        """Report something that is not a fault."""
        self.findings.append(Finding("note", text))

    def warn(self, text: str, advice: str) -> None:
        """Report something that may be a fault."""
        self.findings.append(Finding("warning", text, advice))

    def error(self, text: str, advice: str = "") -> None:
        """Report a fault that makes results wrong or a search fail. Without `advice`, `text` includes what to do."""
        self.findings.append(Finding("error", text, advice))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        return {
            "step": self.number,
            "name": self.name,
            "state": self.state,
            "skipped": self.skipped,
            "findings": [asdict(finding) for finding in self.findings],
            "values": _plain(self.values),
        }


@dataclass(frozen=True)
class Diagnosis:
    """All seven steps."""

    steps: tuple[Step, ...]

    def count(self, level: Level) -> int:
        """Findings of one level."""
        return sum(finding.level == level for step in self.steps for finding in step.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        counts = {"errors": self.count("error"), "warnings": self.count("warning")}
        return {"format": 1, **counts, "steps": [step.to_dict() for step in self.steps]}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gib(size: float) -> str:
    """Bytes for people: `1.27 GiB`, `37.6 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def flops(count: float) -> str:
    """Floating-point operations for people: `1.40 TFLOP`."""
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def duration(seconds: float) -> str:
    """Time for people: `0.4 s`, `12 min`, `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
