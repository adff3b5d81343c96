"""The Grafana dashboard of a search, made of what `tuner.search.metrics` and `tuner.lanes.gauges` tell Prometheus.

`cluster/grafana/tuner.json` is its copy for those who import dashboards by hand; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner.service.dashboards.panels import COLUMNS, LINES, Panel, Query

UID = "tuner"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model."""
    return {
        "title": "tuner",
        "uid": UID,
        "description": "Searches of LoRA configurations: trials, front, lanes.",
        "tags": ["tuner", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": _laid_out(),
    }


def _variables() -> list[dict[str, Any]]:
    study = {
        "name": "study",
        "label": "Study",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(ray_tuner_trials, study)",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}
    ray = {
        "name": "ray",
        "label": "Ray dashboard",
        "type": "textbox",
        "query": "http://127.0.0.1:8265",
        "current": {"text": "http://127.0.0.1:8265", "value": "http://127.0.0.1:8265"},
    }
    return [source, study, ray]


def _laid_out() -> list[dict[str, Any]]:
    """Panels from left to right and top to bottom, a row's title above its own."""
    placed: list[dict[str, Any]] = []
    top = 0
    for title, panels in LINES:
        grid = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        placed.append({"id": len(placed) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": grid})
        placed[-1]["panels"] = []
        top += 1
        left = 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                left, top = 0, top + panel.height
            grid = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            placed.append({"id": len(placed) + 1, "gridPos": grid, **_panel(panel)})
            left += panel.width
        top += panels[-1].height
    return placed


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [_target(query, index, panel.kind) for index, query in enumerate(panel.queries)]
    values: dict[str, Any] = {
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {},
    }
    if panel.kind == "table":
        values["transformations"] = _named_columns()
        values["fieldConfig"]["overrides"] = [_log_link()]
    elif panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        fill = 30 if panel.stacked else 0
        values["fieldConfig"]["defaults"]["custom"] = {"stacking": stacking, "fillOpacity": fill, "spanNulls": False}
        values["options"] = {"tooltip": {"mode": "multi", "sort": "desc"}}
    else:
        values["options"] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return values


def _target(query: Query, index: int, kind: str) -> dict[str, Any]:
    target: dict[str, Any] = {"refId": "ABCDEFGH"[index], "datasource": SOURCE, "expr": query.expr}
    if kind == "table":
        return target | {"instant": True, "format": "table"}
    return target | {"legendFormat": query.legend}


def _named_columns() -> list[dict[str, Any]]:
    columns: Sequence[str] = ("study", "space", "lane", "rank", "ip", "pid", "GpuIndex", "actor")
    order = {name: place for place, name in enumerate(columns)}
    return [
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {"id": "organize", "options": {"indexByName": order, "excludeByName": {}, "renameByName": {"GpuIndex": "gpu"}}},
    ]


def _log_link() -> dict[str, Any]:
    link = {"title": "log of this worker", "url": "${ray}/#/actors/${__value.raw}", "targetBlank": True}
    return {"matcher": {"id": "byName", "options": "actor"}, "properties": [{"id": "links", "value": [link]}]}
