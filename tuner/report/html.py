"""The report page: one HTML file with its charts, scripts and styles inside, which opens without a network."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.records import write_text
from tuner.report.answer import difference_of, headline, interval_of
from tuner.report.charts import Spec, all_charts
from tuner.report.progress import BASELINE
from tuner.report.run import RECOMMENDED, Run, metric_of, placed, read_run

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_FILE = "report.html"
TEMPLATE = "page.html"
CONTENT = "content.html"
NOTHING = "\N{EN DASH}"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path; works while the search runs and after it.

    Raises:
        StudyError: there is no readable study in the folder.
    """
    path = run_dir / REPORT_FILE
    save_page(read_run(run_dir), path)
    return path


def save_page(run: Run, path: Path) -> None:
    """Write the page of a study as one file, which is whole or as it was before."""
    write_text(path, render(run))


def render(run: Run, live: str | None = None) -> str:
    """The page as text. Everything that comes from files is escaped: names and captions may hold markup.

    Args:
        live: the version of the study that is shown, for a page that asks its server for newer ones.
    """
    values = _values(run)
    library = _library() if values["charts"] or live is not None else ""
    return _environment().get_template(TEMPLATE).render(**values, library=library, live=live)


@dataclass(frozen=True)
class Content:
    """What of a page changes while the search runs: the markup between its scripts, and its charts by place."""

    html: str
    charts: dict[str, Spec]


def render_content(run: Run) -> Content:
    """The part of the page that a live one takes in place of what it shows."""
    values = _values(run)
    return Content(_environment().get_template(CONTENT).render(**values), values["charts"])


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "whole": _whole,
        "setting": _setting,
        "moment": _moment,
        "pretty": _pretty,
        "quoted": shlex.join,
    }
    return environment


def _values(run: Run) -> dict[str, Any]:
    charts = all_charts(run)
    points = [_point(run, point) for point in run.front["points"]] if run.front else []
    return {
        "run": run,
        "headline": headline(run),
        "points": sorted(points, key=lambda point: point["trainable_parameters"]),
        "charts": charts,
        "dimensions": [(f"dimension-{i}", path) for i, path in enumerate(run.searched) if f"dimension-{i}" in charts],
        "failed": [trial for trial in run.trials if trial.state == "failed"],
        "columns": list(dict.fromkeys(path for trial in run.trials for path in trial.config if path in run.searched)),
    }


@cache
def _library() -> str:
    """Vega-Embed with all that it needs, 0.9 MB; bundling takes over a second and the page is written many times."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _point(run: Run, point: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of points; measured values are None where nothing was measured."""
    lora = point["config"].get("lora") or {}
    test = point.get("test") or {}
    named = {BASELINE: "projection only", RECOMMENDED: "recommended"}
    return {
        "trial": point["trial"],
        "kind": ", ".join(filter(None, ["front" if point["on_front"] else None, named.get(point["origin"])])),
        "on_front": point["on_front"],
        "rank": lora.get("rank"),
        "alpha": lora["alpha_ratio"] * lora["rank"] if lora else None,
        "dropout": lora.get("dropout"),
        "targets": placed(", ".join(lora.get("targets", ())), lora.get("placement")),
        "modules": point.get("target_modules") or [],
        "layers": _spans(point.get("layers") or []),
        "lora_parameters": point["lora_parameters"],
        "trainable_parameters": point["trainable_parameters"],
        "validation": metric_of(point["validation"], run.metric),
        "test": metric_of(test, run.metric),
        "interval": interval_of(point, run.metric),
        "queries": {side: (test.get(side) or {}).get("N") for side in ("audio_to_text", "text_to_audio")},
        "difference": None if point["origin"] == BASELINE else difference_of(point, run.metric),
        "adapter": point.get("adapter"),
        "sides": {side: test.get(side) or {} for side in ("audio_to_text", "text_to_audio")},
    }


def _spans(layers: list[int]) -> str:
    """`0-3, 6` for [0, 1, 2, 3, 6]."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _whole(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _setting(value: object) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pretty(values: object) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _moment(iso: str) -> str:
    try:
        return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return iso
