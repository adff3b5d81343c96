"""The report page: one HTML file that includes its charts, scripts and styles, and opens without a network."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from tuner.atomic import write_text
from tuner.report.answer import headline
from tuner.report.charts import Spec, all_charts
from tuner.study.events import BASELINE
from tuner.study.folder import StudyFolder
from tuner.study.objectives import WAYS
from tuner.study.points import Interval, Point
from tuner.study.study import Study
from tuner.study.wording import ORIGINS, placed

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "page.html"
CONTENT = "content.html"
NOTHING = "\N{EN DASH}"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path; works while the search runs and after it.

    Raises:
        StudyError: there is no readable study in the folder.
    """
    path = StudyFolder(run_dir).report
    save_page(Study.open(run_dir), path)
    return path


def save_page(study: Study, path: Path, elsewhere: bool = False) -> None:
    """Write the page of a study; the file is complete or not changed. `elsewhere` as in `render`."""
    write_text(path, render(study, elsewhere))


def render(study: Study, elsewhere: bool = False, live: str | None = None) -> str:
    """The page as text. Everything from files is escaped, because names and captions may have markup.

    Args:
        elsewhere: the study is on a cluster; `tuner export` downloads its adapters.
        live: the version of the study, for a page that asks its server for newer versions.
    """
    page = _page(study, elsewhere)
    library = _library() if page.charts or live is not None else ""
    return _environment().get_template(TEMPLATE).render(vars(page), library=library, live=live)


@dataclass(frozen=True)
class Content:
    """The part of a page that changes while the search runs: its markup, and its charts by place."""

    html: str
    charts: dict[str, Spec]


def render_content(study: Study, elsewhere: bool = False) -> Content:
    """The new content of a live page."""
    page = _page(study, elsewhere)
    return Content(_environment().get_template(CONTENT).render(vars(page)), page.charts)


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


@dataclass(frozen=True)
class _Row:
    """A row of the table of points; values that were not measured are None."""

    point: Point
    kind: str
    targets: str
    layers: str
    validation: float | None
    expected: tuple[float, float] | None
    test: float | None
    interval: Interval | None
    difference: tuple[float, Interval] | None
    sides: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class _Page:
    """The values of the templates."""

    study: Study
    elsewhere: bool
    metric: str
    headline: list[str]
    points: list[_Row]
    believed: bool
    charts: dict[str, Spec]
    dimensions: list[tuple[str, str]]
    columns: list[str]
    settings: dict[str, JsonValue]


def _page(study: Study, elsewhere: bool) -> _Page:
    charts, metric = all_charts(study), study.metric.name
    points = sorted(study.front.points, key=lambda point: point.trainable_parameters) if study.front else []
    paths = dict.fromkeys(path for trial in study.trials for path in trial.settings() if path in study.searched)
    shared = {"study", "seed", "objectives", "settings", "encoder", "data", "space"}
    return _Page(
        study=study,
        elsewhere=elsewhere,
        metric=metric,
        headline=headline(study),
        points=[_row(point, metric) for point in points],
        believed=any(point.belief for point in points),
        charts=charts,
        dimensions=[(f"dimension-{i}", path) for i, path in enumerate(study.searched) if f"dimension-{i}" in charts],
        columns=list(paths),
        settings=study.record.model_dump(mode="json", include=shared),
    )


@cache
def _library() -> str:
    """Vega-Embed with its dependencies, 0.9 MB; cached, since bundling takes over a second."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _row(point: Point, metric: str) -> _Row:
    lora, found = point.config.lora, point.test_vs_baseline.get(metric)
    return _Row(
        point=point,
        kind=", ".join(filter(None, [_standing(point), ORIGINS.get(point.origin)])),
        targets=placed(", ".join(lora.targets), lora.placement) if lora else "",
        layers=_spans(list(point.layers)),
        validation=point.validation.value(metric),
        expected=_expected(point, metric),
        test=point.test.value(metric),
        interval=point.interval(metric),
        difference=(found.difference, found.interval) if found and point.origin != BASELINE else None,
        sides={way: point.test.side(way) for way in WAYS},
    )


def _standing(point: Point) -> str | None:
    if point.belief is None:
        return "front" if point.on_front else None
    return f"{'front' if point.on_front else 'off the front'}, probability {point.belief.probability:.0%}"


def _expected(point: Point, metric: str) -> tuple[float, float] | None:
    belief = point.belief
    if belief is None or metric not in belief.expected:
        return None
    return belief.expected[metric], belief.deviation.get(metric, 0.0)


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
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _whole(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _setting(value: object) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pretty(values: object) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M")
