"""Tables of numbers on standard output, the same in a terminal and in a log."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 120


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text: first column to the left, numbers to the right; no cell is cut off."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        assert len(row) == len(columns), f"{len(row)} cells for {len(columns)} columns"
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([title, "", *(line for line in lines if line), ""])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    typer.echo(render(title, columns, rows))


def factor(slow: float, fast: float) -> str:
    """How many times longer `slow` takes than `fast`: `12.3x`."""
    return f"{slow / fast:.1f}x"
