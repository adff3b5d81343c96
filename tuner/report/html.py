"""The report page: one HTML file with its charts, scripts and styles inside, which opens without a network."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from tuner.report.answer import difference_of, headline, interval_of
from tuner.report.charts import ROLES, all_charts
from tuner.report.run import BASELINE, RECOMMENDED, Run, metric_of, placed, read_run

REPORT_FILE = "report.html"
TEMPLATE = "page.html"
NOTHING = "\N{EN DASH}"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path; works while the search runs and after it.

    Raises:
        StudyError: there is no readable study in the folder.
    """
    page = render(read_run(run_dir))
    path = run_dir / REPORT_FILE
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(page, encoding="utf-8")
    staged.replace(path)
    return path


def render(run: Run) -> str:
    """The page as text. Everything that comes from files is escaped: names and captions may hold markup."""
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
    }
    charts = all_charts(run)
    points = [_point(run, point) for point in run.front["points"]] if run.front else []
    return environment.get_template(TEMPLATE).render(
        run=run,
        headline=headline(run),
        points=sorted(points, key=lambda point: point["trainable_parameters"]),
        charts=charts,
        dimensions=[(f"dimension-{i}", path) for i, path in enumerate(run.searched) if f"dimension-{i}" in charts],
        failed=[trial for trial in run.trials if trial.state == "failed"],
        columns=list(dict.fromkeys(path for trial in run.trials for path in trial.config if path in run.searched)),
        roles=ROLES,
        library=_library() if charts else "",
    )


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
        "difference": difference_of(point, run.metric),
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
