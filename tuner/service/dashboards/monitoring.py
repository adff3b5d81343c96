"""Files that Prometheus and Grafana read on a cluster's head: what to scrape, and which dashboards to show.

Ray writes files of its own below its session and empties that folder whenever it starts, so these live elsewhere and
point there: Prometheus finds the nodes that Ray lists, Grafana shows Ray's dashboards and ours.
"""

from __future__ import annotations

import configparser
import io
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tuner.atomic import write_text
from tuner.errors import ConfigError

# As Ray's own: it publishes every ten seconds.
SCRAPE_INTERVAL = "10s"
LOOPBACK = "127.0.0.1"
PROMETHEUS_FILE = "prometheus.yml"
GRAFANA_FILE = "grafana/grafana.ini"
DASHBOARDS = "grafana/dashboards"
DASHBOARD = "tuner.json"


def write_monitoring(folder: Path, ray_temp: Path, prometheus_port: int, grafana_port: int) -> None:
    """Write the files into `folder`, over those of an earlier call.

    Args:
        ray_temp: `--temp-dir` of `ray start`, /tmp/ray unless it was given.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = folder.absolute()
    session = ray_temp.absolute() / "session_latest"
    files = {
        PROMETHEUS_FILE: _yaml(_prometheus(session)),
        GRAFANA_FILE: _ini(_grafana(folder, grafana_port)),
        "grafana/provisioning/datasources/prometheus.yml": _yaml(_source(prometheus_port)),
        "grafana/provisioning/dashboards/tuner.yml": _yaml(_providers(folder, session)),
        f"{DASHBOARDS}/{DASHBOARD}": dashboard(),
    }
    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, text)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); give a folder that can"
        ) from None


def dashboard() -> str:
    """Grafana's dashboard of a search, as the text of its JSON file, which is the source: edit it in Grafana and export
    it again."""
    return resources.files(__package__).joinpath(DASHBOARD).read_text(encoding="utf-8")


def _prometheus(session: Path) -> dict[str, Any]:
    # Ray makes another folder at each start, which Prometheus watches; by default it looks again after 5 minutes.
    found = {"files": [str(session / "prom_metrics_service_discovery.json")], "refresh_interval": SCRAPE_INTERVAL}
    return {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [found]}],
    }


def _grafana(folder: Path, port: int) -> dict[str, dict[str, Any]]:
    """Whoever has the tunnel may look, nobody may edit, and Ray's dashboard may show the panels in its own pages."""
    return {
        "paths": {"provisioning": folder / "grafana/provisioning", "data": folder / "grafana/data"},
        "server": {"http_addr": LOOPBACK, "http_port": port},
        "security": {"allow_embedding": "true", "disable_initial_admin_creation": "true"},
        "auth.anonymous": {"enabled": "true", "org_role": "Viewer"},
        "analytics": {"reporting_enabled": "false", "check_for_updates": "false"},
    }


def _source(port: int) -> dict[str, Any]:
    # The name that Ray's pages look for.
    source = {"name": "Prometheus", "type": "prometheus", "url": f"http://{LOOPBACK}:{port}", "access": "proxy"}
    return {"apiVersion": 1, "datasources": [{**source, "isDefault": True}]}


def _providers(folder: Path, session: Path) -> dict[str, Any]:
    places = {"tuner": folder / DASHBOARDS, "Ray": session / "metrics/grafana/dashboards"}
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": str(place)}}
        for name, place in places.items()
    ]
    return {"apiVersion": 1, "providers": providers}


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def _ini(sections: dict[str, dict[str, Any]]) -> str:
    # Grafana reads % literally.
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()
