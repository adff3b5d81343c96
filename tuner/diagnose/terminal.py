"""A diagnosis as text for people, with rich."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuner.diagnose.findings import STEPS, Diagnosis, Finding, Step

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red", "skipped": "dim"}
LABELS = {"ok": "OK", "note": "note", "warning": "warning", "error": "error", "skipped": "skipped"}


def show(diagnosis: Diagnosis, out: TextIO) -> None:
    """Print each step with its state, each finding with its advice, and the number of errors and warnings."""
    console = Console(file=out, highlight=False, soft_wrap=not out.isatty())
    for step in diagnosis.steps:
        _show_step(console, step)
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    verdict = f"{_many(errors, 'error')}, {_many(warnings, 'warning')}"
    console.print(Text(verdict, STYLES["error" if errors else "warning" if warnings else "ok"]))


def _show_step(console: Console, step: Step) -> None:
    heading = Text.assemble((f"{step.number} of {len(STEPS)}  {step.name}  ", "bold"))
    heading.append(LABELS[step.state], STYLES[step.state])
    console.print(heading)
    if step.skipped is not None:
        console.print(Text(f"  skipped: {step.skipped}", STYLES["skipped"]))
    for finding in step.findings:
        console.print(_line(finding))
    if "comparison" in step.values:
        console.print(_comparison(step.values["comparison"]))


def _line(finding: Finding) -> Text:
    # As text: rich would read brackets in a sentence as markup.
    line = Text.assemble("  ", (LABELS[finding.level], STYLES[finding.level]), f"  {finding.text}")
    if finding.advice:
        line.append(f"; {finding.advice}")
    return line


def _comparison(comparison: dict[str, Any]) -> Table:
    table = Table(f"LoRA at rank {comparison['rank']}", box=None, header_style="dim", padding=(0, 2, 0, 2))
    for column in ("tensors", "parameters", "times the first"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparison["rows"]:
        table.add_row(row["placement"], f"{row['tensors']:,}", f"{row['parameters']:,}", f"{row['ratio']:.2f}")
    return table


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
