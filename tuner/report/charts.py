"""Charts of a study as Vega-Lite specifications, made with Altair, which is imported only when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.pareto import hypervolume
from tuner.report.answer import interval_of
from tuner.report.progress import BASELINE
from tuner.report.run import PARAMETERS, RECOMMENDED, Run, TrialSummary, finite, metric_of, placed

if TYPE_CHECKING:
    import altair as alt

    Drawing = alt.LayerChart | alt.FacetChart | alt.Chart

Spec = dict[str, Any]

# Hues after Okabe and Ito, told apart by color-blind readers, at a lightness that reads on white and on near-black.
ROLES = {"front": "#2a8fd0", "projection only": "#e06c1a", "recommended": "#12a37a", "other trial": "#9a9a9a"}
SHAPES = {"front": "circle", "projection only": "diamond", "recommended": "square", "other trial": "circle"}
MAX_CURVES = 200
MAX_TICKS = 12
MARGIN = 0.05


def all_charts(run: Run) -> dict[str, Spec]:
    """Specifications by place on the page; what has no data yet is left out."""
    charts: dict[str, Spec] = {}
    if run.measured:
        charts["front"] = front_chart(run).to_dict()
        charts["curves"] = curves_chart(run).to_dict()
        charts["progress"] = progress_chart(run).to_dict()
        for index, path in enumerate(run.searched):
            charts[f"dimension-{index}"] = dimension_chart(run, path).to_dict()
    for spec in charts.values():
        # The only address in a specification; the page must not name any.
        spec.pop("$schema", None)
    return charts


def front_chart(run: Run) -> Drawing:
    """Validation metric against trainable parameters (log), the front as steps, test values with their intervals."""
    import altair as alt

    trials = alt.InlineData(values=[_mark(run, trial) for trial in run.measured])
    steps = alt.InlineData(values=[_mark(run, trial) for trial in run.measured if trial.trial in run.on_front])
    x = alt.X(
        "parameters:Q",
        title="trainable parameters",
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=_si_axis(),
    )
    y = alt.Y("value:Q", title=run.metric, scale=_value_scale(run))
    tooltip = [*_tooltip("trial", "role", "state", "summary"), _number("parameters", ","), _number("value", ".3f")]
    line = (
        alt.Chart(steps)
        .mark_line(interpolate="step-after", color=ROLES["front"], opacity=0.6)
        .encode(x=x, y=y, order="parameters:Q")
    )
    points = alt.Chart(trials).mark_point(filled=True, size=90, opacity=0.9).encode(
        x=x, y=y, color=_role_color(), shape=_role_shape(), tooltip=tooltip
    )  # fmt: skip
    return alt.layer(line, points, *_test_layers(run, x)).properties(width="container", height=340)


def _test_layers(run: Run, x: alt.X) -> list[alt.Chart]:
    import altair as alt

    values = []
    for point in (run.front or {"points": []})["points"]:
        value, interval = metric_of(point.get("test") or {}, run.metric), interval_of(point, run.metric)
        if value is not None:
            low, high = interval or (value, value)
            values.append(
                {"trial": point["trial"], "parameters": point[PARAMETERS], "test": value, "low": low, "high": high}
            )
    if not values:
        return []
    base = alt.Chart(alt.InlineData(values=values)).encode(x=x)
    tooltip = [*_tooltip("trial"), *(_number(name, ".3f") for name in ("test", "low", "high"))]
    whisker = base.mark_rule(opacity=0.55).encode(y=alt.Y("low:Q", title=run.metric), y2="high:Q", tooltip=tooltip)
    tick = base.mark_tick(thickness=3, size=16, orient="horizontal").encode(
        y=alt.Y("test:Q", title=run.metric), tooltip=tooltip
    )
    return [whisker, tick]


def curves_chart(run: Run) -> Drawing:
    """Validation metric after each epoch, a line per trial; the latest trials when there are very many."""
    import altair as alt

    roles = {trial.trial: _role(run, trial) for trial in run.trials[-MAX_CURVES:]}
    values = [
        {"trial": row["trial"], "epoch": row["epoch"], "value": value, "role": roles[row["trial"]]}
        for row in run.rows
        if row["trial"] in roles and row.get("epoch") and (value := finite(row.get(run.metric))) is not None
    ]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X("epoch:Q", axis=_count_axis(max(value["epoch"] for value in values)), scale=alt.Scale(nice=False)),
        y=alt.Y("value:Q", title=run.metric, scale=alt.Scale(zero=False)),
        color=_role_color(),
        detail="trial:N",
        tooltip=[*_tooltip("trial", "role", "epoch"), _number("value", ".3f")],
    )
    layers = base.mark_line(opacity=0.75), base.mark_point(filled=True, size=28)
    return alt.layer(*layers).properties(width="container", height=280)


def dimension_chart(run: Run, path: str) -> Drawing:
    """The metric against one searched value; names and flags side by side, numbers on the space's own scale."""
    import altair as alt

    trials = [trial for trial in run.measured if trial.config.get(path) is not None]
    values = [{**_mark(run, trial), "setting": run.setting(trial, path)} for trial in trials]
    numeric = all(isinstance(item["setting"], int | float) and not isinstance(item["setting"], bool) for item in values)
    if numeric:
        described = run.study.get("space", {}).get("dimensions", {}).get(path, {})
        scale = alt.Scale(type="log" if described.get("log") else "linear", zero=False, nice=False, padding=12)
        x = alt.X("setting:Q", title=None, scale=scale, axis=alt.Axis(format="~g", labelOverlap=True, tickCount=5))
    else:
        x = alt.X("setting:N", title=None, axis=alt.Axis(labelAngle=0, labelLimit=90))
    tooltip = [*_tooltip("trial", "setting"), _number("parameters", ","), _number("value", ".3f")]
    encoded: alt.Chart = alt.Chart(alt.InlineData(values=values)).mark_point(filled=True, size=60, opacity=0.8).encode(
        x=x,
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        color=_role_color(legend=False),
        shape=_role_shape(legend=False),
        tooltip=tooltip,
    )  # fmt: skip
    return encoded.properties(width="container", height=170)


def progress_chart(run: Run) -> Drawing:
    """How the search advanced: hypervolume after each trial, or the best value with one objective."""
    import altair as alt

    title = "dominated area" if len(run.objectives) == 2 else f"best {run.metric}"
    reached = enumerate(zip(run.measured, _progress(run), strict=True), start=1)
    values = [{"trial": trial.trial, "number": number, "reached": value} for number, (trial, value) in reached]
    number_axis = _count_axis(len(values))
    line = alt.Chart(alt.InlineData(values=values)).mark_line(
        interpolate="step-after", point=True, color=ROLES["front"]
    )
    encoded: alt.Chart = line.encode(
        x=alt.X("number:Q", title="trials with a result", axis=number_axis, scale=alt.Scale(nice=False)),
        y=alt.Y("reached:Q", title=title, scale=alt.Scale(zero=False)),
        tooltip=[*_tooltip("trial"), _number("reached", ".4f")],
    )
    return encoded.properties(width="container", height=220)


def _progress(run: Run) -> list[float]:
    """Hypervolume of the first n trials, or the best value of a single objective.

    The reference is the worst value seen in each objective. Parameters count in decades, so that halving a small
    adapter weighs as much as halving a large one, and their reference lies one decade above the largest.
    """
    names, directions = zip(*run.objectives, strict=True)
    values = [
        [
            math.log10(value) if name == PARAMETERS else value
            for name, value in zip(names, trial.objectives, strict=True)
        ]
        for trial in run.measured
    ]
    if len(names) == 1:
        best = max if run.direction == "maximize" else min
        return [best(value for [value] in values[: n + 1]) for n in range(len(values))]
    corner = [
        (min if direction == "maximize" else max)(column) + (name == PARAMETERS)
        for name, direction, column in zip(names, directions, zip(*values, strict=True), strict=True)
    ]
    return [hypervolume(values[: n + 1], corner, directions) for n in range(len(values))]


def save_front_svg(run: Run, path: Path) -> None:
    """Draw the front of a run as an SVG file for other documents, whole or not at all."""
    import vl_convert

    spec = front_chart(run).properties(width=640).to_dict()
    spec["background"] = "white"
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    staged.replace(path)


def _role(run: Run, trial: TrialSummary) -> str:
    named = {BASELINE: "projection only", RECOMMENDED: "recommended"}
    return named.get(trial.origin) or ("front" if trial.trial in run.on_front else "other trial")


def _mark(run: Run, trial: TrialSummary) -> dict[str, Any]:
    rank = trial.config.get("lora.rank")
    targets = placed(str(run.setting(trial, "lora.targets")), trial.config.get("lora.placement"))
    return {
        "trial": trial.trial,
        "role": _role(run, trial),
        "state": trial.state,
        "summary": f"rank {rank}, {targets}" if rank else "no LoRA",
        "parameters": trial.parameters,
        "value": trial.value,
    }


def _tooltip(*names: str) -> list[alt.Tooltip]:
    import altair as alt

    return [alt.Tooltip(f"{name}:N") for name in names]


def _number(name: str, form: str) -> alt.Tooltip:
    import altair as alt

    return alt.Tooltip(f"{name}:Q", format=form)


def _value_scale(run: Run) -> alt.Scale:
    """As wide as the values; of a single one, which would have no width, some of what lies around it."""
    import altair as alt

    values = {trial.value for trial in run.measured if trial.value is not None}
    if len(values) > 1 or run.front:
        return alt.Scale(zero=False, padding=12)
    (value,) = values
    return alt.Scale(domain=[value - MARGIN, value + MARGIN])


def _count_axis(last: int) -> alt.Axis:
    """Whole numbers from 1 on, not more of them than can be read; by itself Vega puts ticks between and rounds them."""
    import altair as alt

    return alt.Axis(values=list(range(1, last + 1, max(1, math.ceil(last / MAX_TICKS)))), format="d")


def _si_axis() -> alt.Axis:
    import altair as alt

    return alt.Axis(format="~s", labelOverlap=True)


def _role_color(legend: bool = True) -> alt.Color:
    import altair as alt

    scale = alt.Scale(domain=list(ROLES), range=list(ROLES.values()))
    return alt.Color("role:N", scale=scale, legend=alt.Legend(title=None, orient="bottom") if legend else None)


def _role_shape(legend: bool = True) -> alt.Shape:
    import altair as alt

    scale = alt.Scale(domain=list(SHAPES), range=list(SHAPES.values()))
    return alt.Shape("role:N", scale=scale, legend=alt.Legend(title=None, orient="bottom") if legend else None)
