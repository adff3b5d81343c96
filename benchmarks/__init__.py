"""Benchmarks: run one with `python -m benchmarks.NAME`; each prints its table. See README.md."""

from __future__ import annotations

from collections.abc import Callable

import typer


def run(main: Callable[..., None]) -> None:
    """Run a benchmark with the options that its signature names; a failure keeps Python's own traceback."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
