"""`tuner cluster`: what is wrong with a cluster file, before `ray up` or `kubectl apply` spends money on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check files that bring up a cluster.", no_args_is_help=True)


@app.callback()
def cluster() -> None:
    """Keep `check` a command of its own."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="for `ray up`, or RayCluster and RayJob for KubeRay")],
) -> None:
    """List everything wrong with a cluster file, one sentence a line."""
    from tuner.errors import ConfigError
    from tuner.service.cluster_file import check_cluster_file
    from tuner.service.mistakes import locked_ray

    mistakes = check_cluster_file(file)
    if not mistakes:
        typer.echo(f"{file}: no mistakes found, for Ray {locked_ray()}")
        return
    for mistake in mistakes:
        typer.echo(f"{file}: {mistake}")
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    raise ConfigError(f"{file}: {count}, listed above; mend the file and check it again")
