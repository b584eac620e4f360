"""Charts of figures with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.metrics.bootstrap import Interval
from pipelines.report.charts import AFTER, BEFORE, GRID, INK, MUTED, SOFT, to_svg

SERIES = (AFTER, BEFORE, MUTED, "#7c3aed", "#b45309")


def interval_bars(
    figures: Sequence[tuple[str, Interval]],
    *,
    title: str,
    places: int = 3,
    highlight: str | None = None,
    from_zero: bool = True,
    width: int = 470,
) -> str:
    """Horizontal bars (points, where the axis does not start at zero) with their intervals and numbers.

    Args:
        figures: Labels and intervals, top to bottom.
        title: Read out by screen readers.
        places: Decimals of the numbers.
        highlight: The label drawn in grey: what the others are compared with.
        from_zero: Whether lengths mean something.
        width: Of the whole chart.
    """
    import altair as alt

    data = [
        {
            "label": name,
            "mean": x.mean,
            "low": x.low,
            "high": x.high,
            "text": f"{x.mean:.{places}f}",
            "colour": MUTED if name == highlight else AFTER,
        }
        for name, x in figures
    ]
    top, bottom = max(d["high"] for d in data), min(d["low"] for d in data)
    low = min(0.0, bottom) if from_zero else bottom - 0.12 * (top - bottom or abs(top) or 1)
    room = top + 0.24 * ((top - low) or 1)
    domain = alt.Scale(domain=[low, room], nice=False)
    base = alt.Chart(alt.InlineData(values=data), width=width, height=27 * len(data)).encode(
        y=alt.Y(
            "label:N",
            sort=[name for name, _ in figures],
            title=None,
            axis=alt.Axis(labelLimit=180, labelFontSize=12, labelColor=INK),
        )
    )
    colour = alt.Color("colour:N", scale=None)
    x = alt.X("mean:Q", axis=None, scale=domain)
    mark = (
        base.mark_bar(height={"band": 0.6}, cornerRadiusEnd=2)
        if from_zero
        else base.mark_point(filled=True, size=70)
    )
    layers = [
        mark.encode(x=x, color=colour),
        base.mark_rule(color=INK, strokeWidth=1.2).encode(
            x=alt.X("low:Q", scale=domain, axis=None), x2="high:Q"
        ),
        base.mark_text(align="left", dx=6, color=SOFT, fontSize=11.5).encode(
            x=alt.X("high:Q", scale=domain, axis=None), text="text:N"
        ),
    ]
    if from_zero and bottom < 0:
        zero = (
            alt.Chart(alt.InlineData(values=[{"v": 0}]))
            .mark_rule(color=GRID)
            .encode(x=alt.X("v:Q", scale=domain, axis=None))
        )
        layers.insert(0, zero)
    return to_svg(alt.layer(*layers, autosize=alt.AutoSizeParams(type="fit")), title)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x_title: str, y_title: str, title: str
) -> str:
    """Lines over one axis, each with its name: a threshold sweep."""
    import altair as alt

    data = [{"x": x, "y": y, "series": name} for name, points in series.items() for x, y in points]
    names = list(series)
    colours = [SERIES[i % len(SERIES)] for i in range(len(names))]
    chart = (
        alt.Chart(alt.InlineData(values=data), width=470, height=230)
        .mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=1.8)
        .encode(
            x=alt.X("x:Q", title=x_title),
            y=alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False)),
            color=alt.Color(
                "series:N", scale=alt.Scale(domain=names, range=colours), legend=alt.Legend(title=None)
            ),
        )
    )
    return to_svg(chart, title)
