"""The comparison's charts: dots with intervals, and what was gained against what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.charts import AFTER, BEFORE, INK, MUTED, SOFT, to_svg

Dot = Mapping[str, Any]


def dots(
    values: Sequence[tuple[str, Dot]], *, title: str, percent: bool = False, reference: str | None = None
) -> str:
    """One dot an arm with its interval, and a small one for each training seed.

    Args:
        values: Arm and its figure: `mean`, `low`, `high`, `by_seed`.
        title: Of the axis, and what screen readers say.
        percent: Show shares as percentages.
        reference: Arm whose value is drawn as a line through all.
    """
    import altair as alt

    names = [n for n, _ in values]
    rows = [
        {
            "arm": n,
            "mean": f["mean"],
            "low": f["low"],
            "high": f["high"],
            "colour": BEFORE if n == reference else AFTER,
        }
        for n, f in values
    ]
    seeds = [
        {"arm": n, "value": v}
        for n, f in values
        if len(f.get("by_seed", {})) > 1
        for v in f["by_seed"].values()
    ]
    y = alt.Y(
        "arm:N",
        sort=names,
        title=None,
        axis=alt.Axis(labelLimit=190, labelFontSize=12, labelColor=INK, grid=False),
    )
    scale = alt.Scale(zero=False, nice=True)
    axis = alt.Axis(format=".0%" if percent else "~g", tickCount=6)

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=scale, axis=axis)

    base = alt.Chart(alt.InlineData(values=rows), width=330, height=26 * len(rows)).encode(y=y)
    layers: list[Any] = []
    line = next((r for r in rows if r["arm"] == reference), None)
    if line is not None:
        rule = alt.Chart(alt.InlineData(values=[{"v": line["mean"]}]))
        layers.append(rule.mark_rule(strokeDash=[4, 3], color=BEFORE, strokeWidth=1).encode(x=x("v")))
    layers.append(
        base.mark_rule(strokeWidth=2.2, strokeCap="round").encode(
            x=x("low"), x2="high:Q", color=alt.Color("colour:N", scale=None)
        )
    )
    if seeds:
        small = alt.Chart(alt.InlineData(values=seeds)).mark_point(size=22, color=MUTED, strokeWidth=1.2)
        layers.append(small.encode(x=x("value"), y=y))
    layers.append(
        base.mark_circle(size=78, opacity=1).encode(x=x("mean"), color=alt.Color("colour:N", scale=None))
    )
    return to_svg(alt.layer(*layers), title)


def trade_off(
    points: Sequence[tuple[str, float, float]],
    *,
    x_title: str,
    y_title: str,
    percent: bool = False,
    reference: str = "",
) -> str:
    """Arms as labelled points: the better, the lower.

    Args:
        points: Arm, x and y.
        x_title: Of the axis.
        y_title: Of the axis.
        percent: x is a share.
        reference: Arm in another colour.
    """
    import altair as alt

    low, high = min(p[1] for p in points), max(p[1] for p in points)
    room = (high - low) * 0.35 or abs(high) * 0.05 or 0.05
    labels = _apart(points, near=room)
    rows = [
        {"arm": n, "x": x, "y": y, "label": labels[n], "colour": BEFORE if n == reference else AFTER}
        for n, x, y in points
    ]
    ticks = [t / 100 for t in range(0, 101, 5 if high - low < 0.3 else 10) if low - room <= t / 100 <= 1]
    base = alt.Chart(alt.InlineData(values=rows), width=400, height=250).encode(
        x=alt.X(
            "x:Q",
            title=x_title,
            scale=alt.Scale(domain=[low - room * 0.15, high + room], nice=False),
            axis=alt.Axis(format=".0%", values=ticks) if percent else alt.Axis(format="~g", tickCount=6),
        ),
    )
    scale = alt.Scale(zero=False, nice=True)
    dot = base.mark_circle(size=80, opacity=1).encode(
        y=alt.Y("y:Q", title=y_title, scale=scale), color=alt.Color("colour:N", scale=None)
    )
    text = base.mark_text(align="left", dx=8, fontSize=11, color=SOFT).encode(
        y=alt.Y("label:Q", title=y_title, scale=scale), text="arm:N"
    )
    return to_svg(dot + text, f"{y_title} against {x_title}")


def _apart(points: Sequence[tuple[str, float, float]], *, near: float) -> dict[str, float]:
    """Heights of the labels: each at its point, moved down where one above stands too close."""
    heights = [y for _, _, y in points]
    gap = (max(heights) - min(heights)) * 0.055
    placed: list[tuple[float, float]] = []
    found: dict[str, float] = {}
    for name, x, height in sorted(points, key=lambda p: -p[2]):
        y = height
        for other_x, other_y in placed:
            if abs(other_x - x) < near and y > other_y - gap:
                y = other_y - gap
        placed.append((x, y))
        found[name] = y
    return found
