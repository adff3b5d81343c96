"""`tuner cluster`: what is wrong with a cluster file, before it spends money; what Prometheus and Grafana read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Check files that bring up a cluster; monitor one; leave spot machines in time.", no_args_is_help=True
)

RayTemp = Annotated[Path, typer.Option(help="--temp-dir of `ray start`")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="on loopback")]


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="for `ray up`, or RayCluster and RayJob for KubeRay")],
) -> None:
    """List everything wrong with a cluster file, one sentence a line."""
    from tuner.errors import ConfigError
    from tuner.service.cluster_files.check import check_cluster_file
    from tuner.service.cluster_files.mistakes import locked_ray

    mistakes = check_cluster_file(file)
    if not mistakes:
        typer.echo(f"{file}: no mistakes found, for Ray {locked_ray()}")
        return
    for mistake in mistakes:
        typer.echo(f"{file}: {mistake}")
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    raise ConfigError(f"{file}: {count}, listed above; mend the file and check it again")


@app.command()
def monitoring(
    folder: Annotated[Path, typer.Argument(help="folder for the files; on the cluster's head")],
    ray_temp: RayTemp = Path("/tmp/ray"),
    prometheus_port: Port = 9090,
    grafana_port: Port = 3000,
) -> None:
    """Write the files with which Prometheus and Grafana show this machine's cluster, and say how to start both."""
    from tuner.service.dashboards.monitoring import GRAFANA_FILE, LOOPBACK, PROMETHEUS_FILE, write_monitoring

    write_monitoring(folder, ray_temp, prometheus_port, grafana_port)
    where = folder.absolute()
    prometheus = [
        "prometheus",
        f"--config.file={where / PROMETHEUS_FILE}",
        f"--storage.tsdb.path={where / 'prometheus'}",
    ]
    typer.echo(shlex.join([*prometheus, f"--web.listen-address={LOOPBACK}:{prometheus_port}"]))
    typer.echo(
        shlex.join(["grafana", "server", "--homepath", "/usr/share/grafana", "--config", str(where / GRAFANA_FILE)])
    )


@app.command()
def spot_watch(
    cloud: Annotated[str, typer.Option(help="whose machine this is: aws or gcp")],
    address: Annotated[str, typer.Option(help="the head, as `ray start` has it")] = "auto",
    node: Annotated[str | None, typer.Option(help="id of the Ray node to drain; default: this machine's")] = None,
    metadata: Annotated[str | None, typer.Option(help="address of the metadata service; default: the cloud's")] = None,
) -> None:
    """Wait for the notice that this spot machine is taken back, and have its lanes leave in time."""
    from tuner.commands.inputs import say
    from tuner.service.spot import METADATA, cloud_named, drain_node, watch

    known = cloud_named(cloud)
    watch(known, metadata or METADATA[known], lambda notice: drain_node(address, node, notice), say)
