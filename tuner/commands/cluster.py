"""`tuner cluster`: what is wrong with a cluster file, before it spends money; what Prometheus and Grafana read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.commands.lazy import Command
from tuner.commands.paths import check_input, check_output_folder

app = typer.Typer(
    help="Check files that bring up a cluster; monitor one; leave spot machines in time.", no_args_is_help=True
)

RayTemp = Annotated[Path, typer.Option(help="--temp-dir of `ray start`")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="on loopback")]


@app.command(cls=Command)
def check(
    file: Annotated[Path, typer.Argument(help="for `ray up`, or RayCluster and RayJob for KubeRay")],
) -> None:
    """List everything wrong with a cluster file, one sentence a line."""
    check_input("file", file)
    from tuner.commands.actions.cluster import check_file

    check_file(file)


@app.command(cls=Command)
def monitoring(
    folder: Annotated[Path, typer.Argument(help="folder for the files; on the cluster's head")],
    ray_temp: RayTemp = Path("/tmp/ray"),
    prometheus_port: Port = 9090,
    grafana_port: Port = 3000,
) -> None:
    """Write the files with which Prometheus and Grafana show this machine's cluster, and say how to start both."""
    check_output_folder("folder", folder)
    from tuner.commands.actions.cluster import write_monitoring_files

    write_monitoring_files(folder, ray_temp, prometheus_port, grafana_port)


@app.command(cls=Command)
def spot_watch(
    cloud: Annotated[str, typer.Option(help="whose machine this is: aws or gcp")],
    address: Annotated[str, typer.Option(help="the head, as `ray start` has it")] = "auto",
    node: Annotated[str | None, typer.Option(help="id of the Ray node to drain; default: this machine's")] = None,
    metadata: Annotated[str | None, typer.Option(help="address of the metadata service; default: the cloud's")] = None,
) -> None:
    """Wait for the notice that this spot machine is taken back, and have its lanes leave in time."""
    from tuner.commands.actions.cluster import watch_spot

    watch_spot(cloud, address, node, metadata)
