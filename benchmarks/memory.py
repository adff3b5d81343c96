"""Peak memory and overhead of `tuner search` on the demo, all processes together (`peak.py`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from benchmarks import run
from benchmarks.peak import GB, show_peak
from benchmarks.session import run_session, search_command, search_times, show_search_times
from tuner.commands.actions.stores import find_store
from tuner.commands.options import DataChoice

TARGET_GB = 3.0


def main(trials: int = 4, epochs: int = 1, data: str = "demo") -> None:
    """Peak memory and overhead of `tuner search` on the demo, prepared beforehand."""
    store = find_store(DataChoice(data))
    with tempfile.TemporaryDirectory(prefix="tuner-bench-") as folder:
        options = ["--trials", str(trials), "--epochs", str(epochs), "--json"]
        command = search_command(["search", "--data", str(store), "--runs", folder, *options])
        session = run_session(command, Path(folder) / "search.log")
    show_peak(f"peak memory of `tuner search --data {data}`, {trials} trials of {epochs} epochs", session.peak)
    show_search_times(search_times(session.events, session.seconds), session.seconds)
    typer.echo(f"peak {session.peak.total / GB:.2f} GB; the target is below {TARGET_GB:g} GB")


if __name__ == "__main__":
    run(main)
