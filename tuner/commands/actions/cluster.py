"""`tuner cluster`: files of a cluster, and spot machines."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from tuner.commands.console import say
from tuner.errors import ConfigError
from tuner.service.cluster_files.check import check_cluster_file
from tuner.service.cluster_files.mistakes import locked_ray
from tuner.service.dashboards.monitoring import GRAFANA_FILE, LOOPBACK, PROMETHEUS_FILE, write_monitoring
from tuner.service.spot import METADATA, cloud_named, drain_node, watch


def check_file(file: Path) -> None:
    """Print every mistake of a cluster file.

    Raises:
        ConfigError: there are some.
    """
    mistakes = check_cluster_file(file)
    if not mistakes:
        typer.echo(f"{file}: no mistakes found, for Ray {locked_ray()}")
        return
    for mistake in mistakes:
        typer.echo(f"{file}: {mistake}")
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    raise ConfigError(f"{file}: {count}, listed above; fix the file and check it again")


def write_monitoring_files(folder: Path, ray_temp: Path, prometheus_port: int, grafana_port: int) -> None:
    """Write the files of Prometheus and Grafana, and print the commands that start both."""
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


def watch_spot(cloud: str, address: str, node: str | None, metadata: str | None) -> None:
    """Wait for the cloud's notice, then drain the node."""
    known = cloud_named(cloud)
    watch(known, metadata or METADATA[known], lambda notice: drain_node(address, node, notice), say)
