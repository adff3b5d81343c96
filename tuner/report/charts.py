"""Charts of a study as Vega-Lite specifications, made with Altair, which is imported only for drawing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from tuner.space.dimension import FloatRange, IntRange
from tuner.study.events import finite
from tuner.study.history import Cell, Trial
from tuner.study.pareto import hypervolume
from tuner.study.study import Study
from tuner.study.wording import ORIGINS, placed

if TYPE_CHECKING:
    import altair as alt

    Drawing = alt.LayerChart | alt.FacetChart | alt.Chart

# Vega-Lite's own form, which Altair checks.
Spec = dict[str, Any]  # type: ignore[explicit-any]

# Hues after Okabe and Ito, which color-blind readers can distinguish, readable on white and on near-black.
ROLES = {"front": "#2a8fd0", "projection only": "#e06c1a", "recommended": "#12a37a", "other trial": "#9a9a9a"}
SHAPES = {"front": "circle", "projection only": "diamond", "recommended": "square", "other trial": "circle"}
MAX_CURVES = 200
MAX_TICKS = 12
MARGIN = 0.05


def all_charts(study: Study) -> dict[str, Spec]:
    """Specifications by place on the page; charts without data are omitted."""
    charts: dict[str, Spec] = {}
    if study.measured:
        charts["front"] = front_chart(study).to_dict()
        charts["curves"] = curves_chart(study).to_dict()
        if study.complete:
            charts["progress"] = progress_chart(study).to_dict()
        for index, path in enumerate(study.searched):
            charts[f"dimension-{index}"] = dimension_chart(study, path).to_dict()
    for spec in charts.values():
        # The page must not have any address, and this is the only one in a specification.
        spec.pop("$schema", None)
    return charts


def front_chart(study: Study) -> Drawing:
    """Validation metric against trainable parameters (log), the front as steps, test values with their intervals."""
    import altair as alt

    trials = alt.InlineData(values=[_mark(study, trial) for trial in study.measured])
    steps = alt.InlineData(values=[_mark(study, trial) for trial in study.measured if trial.trial in study.on_front])
    x = alt.X(
        "parameters:Q",
        title="trainable parameters",
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=_si_axis(),
    )
    y = alt.Y("value:Q", title=study.metric.name, scale=_value_scale(study))
    tooltip = [*_tooltip("trial", "role", "state", "summary"), _number("parameters", ","), _number("value", ".3f")]
    line = (
        alt.Chart(steps)
        .mark_line(interpolate="step-after", color=ROLES["front"], opacity=0.6)
        .encode(x=x, y=y, order="parameters:Q")
    )
    points = alt.Chart(trials).mark_point(filled=True, size=90, opacity=0.9).encode(
        x=x, y=y, color=_role_color(), shape=_role_shape(), tooltip=tooltip
    )  # fmt: skip
    return alt.layer(line, points, *_test_layers(study, x)).properties(width="container", height=340)


def _test_layers(study: Study, x: alt.X) -> list[alt.Chart]:
    import altair as alt

    values: list[dict[str, JsonValue]] = []
    for point in study.front.points if study.front else ():
        value = point.test.value(study.metric.name)
        if value is not None:
            low, high = point.interval(study.metric.name) or (value, value)
            values.append(
                {
                    "trial": point.trial,
                    "parameters": point.trainable_parameters,
                    "test": value,
                    "low": low,
                    "high": high,
                }
            )
    if not values:
        return []
    base = alt.Chart(alt.InlineData(values=values)).encode(x=x)
    tooltip = [*_tooltip("trial"), *(_number(name, ".3f") for name in ("test", "low", "high"))]
    whisker = base.mark_rule(opacity=0.55).encode(
        y=alt.Y("low:Q", title=study.metric.name), y2="high:Q", tooltip=tooltip
    )
    tick = base.mark_tick(thickness=3, size=16, orient="horizontal").encode(
        y=alt.Y("test:Q", title=study.metric.name), tooltip=tooltip
    )
    return [whisker, tick]


def curves_chart(study: Study) -> Drawing:
    """Validation metric after each epoch, a line per trial; only the latest trials if there are very many."""
    import altair as alt

    values = [
        {"trial": trial.trial, "epoch": number, "value": value, "role": _role(study, trial)}
        for trial in study.trials[-MAX_CURVES:]
        for number, epoch in sorted(trial.epochs.items())
        if (value := finite(epoch.metrics.get(study.metric.name))) is not None
    ]
    last = max((max(trial.epochs) for trial in study.trials[-MAX_CURVES:] if trial.epochs), default=1)
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X("epoch:Q", axis=_count_axis(last), scale=alt.Scale(nice=False)),
        y=alt.Y("value:Q", title=study.metric.name, scale=alt.Scale(zero=False)),
        color=_role_color(),
        detail="trial:N",
        tooltip=[*_tooltip("trial", "role", "epoch"), _number("value", ".3f")],
    )
    layers = base.mark_line(opacity=0.75), base.mark_point(filled=True, size=28)
    return alt.layer(*layers).properties(width="container", height=280)


def dimension_chart(study: Study, path: str) -> Drawing:
    """The metric against one searched value: names and flags as categories, numbers on the space's own scale."""
    import altair as alt

    trials = [trial for trial in study.measured if study.setting(trial, path) is not None]
    values = [{**_mark(study, trial), "setting": study.setting(trial, path)} for trial in trials]
    numeric = all(isinstance(item["setting"], int | float) and not isinstance(item["setting"], bool) for item in values)
    if numeric:
        dimension = study.record.space.dimensions.get(path)
        log = isinstance(dimension, IntRange | FloatRange) and dimension.log
        scale = alt.Scale(type="log" if log else "linear", zero=False, nice=False, padding=12)
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


def progress_chart(study: Study) -> Drawing:
    """Progress of the search: hypervolume after each complete trial."""
    import altair as alt

    objectives = study.record.objectives
    title = f"best {study.metric.name}" if len(objectives) == 1 else "hypervolume"
    values = [
        {"trial": trial.trial, "number": number, "reached": reached}
        for number, (trial, reached) in enumerate(zip(study.complete, _reached(study), strict=True), start=1)
    ]
    number_axis = _count_axis(len(values))
    line = alt.Chart(alt.InlineData(values=values)).mark_line(
        interpolate="step-after", point=True, color=ROLES["front"]
    )
    encoded: alt.Chart = line.encode(
        x=alt.X("number:Q", title="complete trials", axis=number_axis, scale=alt.Scale(nice=False)),
        y=alt.Y("reached:Q", title=title, scale=alt.Scale(zero=False)),
        tooltip=[*_tooltip("trial"), _number("reached", ".4f")],
    )
    return encoded.properties(width="container", height=220)


def _reached(study: Study) -> list[float]:
    """Hypervolume of the first n complete trials; for a single objective, the best value."""
    values = [trial.values(study.record.objectives) for trial in study.complete]
    return [hypervolume(values[: n + 1], study.record.objectives) for n in range(len(values))]


def save_front_svg(study: Study, path: Path) -> None:
    """Write the front of a study as an SVG file for other documents; the file is complete or not changed."""
    import vl_convert

    spec = front_chart(study).properties(width=640).to_dict()
    spec["background"] = "white"
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    staged.replace(path)


def _role(study: Study, trial: Trial) -> str:
    return ORIGINS.get(trial.origin) or ("front" if trial.trial in study.on_front else "other trial")


def _mark(study: Study, trial: Trial) -> dict[str, Cell]:
    lora = trial.config.lora
    summary = "no LoRA"
    if lora is not None:
        summary = f"rank {lora.rank}, {placed(str(study.setting(trial, 'lora.targets')), lora.placement)}"
    return {
        "trial": trial.trial,
        "role": _role(study, trial),
        "state": trial.state,
        "summary": summary,
        "parameters": trial.parameters,
        "value": trial.value(study.metric.name),
    }


def _tooltip(*names: str) -> list[alt.Tooltip]:
    import altair as alt

    return [alt.Tooltip(f"{name}:N") for name in names]


def _number(name: str, form: str) -> alt.Tooltip:
    import altair as alt

    return alt.Tooltip(f"{name}:Q", format=form)


def _value_scale(study: Study) -> alt.Scale:
    """A scale as wide as the values; around a single value, which has no width, with a margin."""
    import altair as alt

    values = {trial.value(study.metric.name) for trial in study.measured}
    if len(values) > 1 or study.front:
        return alt.Scale(zero=False, padding=12)
    (value,) = values
    return alt.Scale(domain=[value - MARGIN, value + MARGIN])


def _count_axis(last: int) -> alt.Axis:
    """Ticks at whole numbers from 1, not too many; Vega's own ticks are fractions that it rounds."""
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
