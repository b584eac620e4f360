"""The report's charts: Altair specifications rendered to inline SVG, with no browser and no network.

Colours are literal in the SVG, so a chart saved on its own still looks right; the page's style sheet maps each of
them to its dark counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from pipelines.report.stats import Histogram

if TYPE_CHECKING:
    import altair as alt

BEFORE, AFTER, MUTED = "#c2410c", "#0f766e", "#94a3b8"
INK, SOFT, GRID = "#1e293b", "#64748b", "#e2e8f0"
_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"
_LOG_FROM = 60  # the largest bin is that many times the smallest: a linear axis would hide the tail


@contextmanager
def unchecked() -> Iterator[None]:
    """Build charts without Altair's schema check of every part: it takes longer than all the drawing."""
    from altair.utils import schemapi

    with schemapi.debug_mode(False):
        yield


def to_svg(chart: alt.TopLevelMixin, title: str) -> str:
    """Render a chart as an SVG element fit to stand in a page beside others.

    Args:
        chart: Any Altair chart.
        title: Read out by screen readers.
    """
    import vl_convert

    svg = vl_convert.vegalite_to_svg(chart.to_dict(validate=False), config=_theme())
    svg = _with_own_ids(svg)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _with_own_ids(svg: str) -> str:
    """Rename clip paths and gradients: they are numbered by a counter of the renderer's, and a page holds many charts."""
    names = {name: f"{k}" for k, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg)))}
    if not names:
        return svg

    def rename(prefix: str) -> str:
        return re.sub(
            r'(\bid="|url\(#|href="#)([^")]+)',
            lambda m: m[1] + (prefix + names[m[2]] if m[2] in names else m[2]),
            svg,
        )

    return rename(f"c{xxhash.xxh3_64_hexdigest(rename('').encode())[:10]}-")


def before_after(before: Histogram, after: Histogram | None, *, unit: str = "documents") -> str:
    """Two histograms, bin beside bin, over toxicity in [0, 1]; one alone where nothing came after."""
    import altair as alt

    pairs = [("before", before, BEFORE)] + ([("after", after, AFTER)] if after is not None else [])
    data, log = _bars([(n, h) for n, h, _ in pairs], low=0.5)
    chart = (
        alt.Chart(alt.InlineData(values=data), width=560, height=220)
        .mark_bar(cornerRadiusTopLeft=1.5, cornerRadiusTopRight=1.5)
        .encode(
            x=_score_axis("toxicity"),
            x2="x2:Q",
            y=_count_axis(unit, log),
            y2="y2:Q",
            color=_colours([(n, c) for n, _, c in pairs]),
        )
    )
    return to_svg(chart, f"Toxicity of {unit}: " + " and ".join(n for n, _, _ in pairs))


def label_panels(labels: Mapping[str, tuple[Histogram, Histogram]]) -> list[str]:
    """One small chart a label, on one scale: the scores of the edited segments before and after."""
    import altair as alt

    log = any(_is_skewed(h) for pair in labels.values() for h in pair)
    top = max((int(h.counts.max()) for pair in labels.values() for h in pair), default=1)
    panels = []
    for name, (before, after) in labels.items():
        data, _ = _bars([("before", before), ("after", after)], low=0.5, log=log)
        chart = (
            alt.Chart(alt.InlineData(values=data), width=266, height=96, title=name.replace("_", " "))
            .mark_bar()
            .encode(
                x=_score_axis(None, ticks=[0, 0.5, 1]),
                x2="x2:Q",
                y=_count_axis(None, log, ticks=3, top=top),
                y2="y2:Q",
                color=_colours([("before", BEFORE), ("after", AFTER)], legend=False),
            )
        )
        panels.append(to_svg(chart, f"Scores on {name} of edited segments, before and after"))
    return panels


def bars(
    counts: Sequence[tuple[str, float]],
    *,
    suffixes: Sequence[str],
    title: str,
    colour: str | Sequence[str] = AFTER,
    width: int = 450,
) -> str:
    """Horizontal bars in the given order, each with its number behind it.

    Args:
        counts: Labels and lengths.
        suffixes: What is written behind each bar.
        title: Read out by screen readers.
        colour: Of all bars, or of each.
        width: Of the whole chart, labels and numbers included.
    """
    import altair as alt

    colours = [colour] * len(counts) if isinstance(colour, str) else list(colour)
    data = [
        {"label": name, "n": float(n), "text": suffixes[i], "colour": colours[i]}
        for i, (name, n) in enumerate(counts)
    ]
    # The numbers stand in the plot itself: leave them room behind the longest bar.
    room = (
        max((n for _, n in counts), default=1) * (1 + 0.03 * max((len(s) for s in suffixes), default=0)) or 1
    )
    base = alt.Chart(
        alt.InlineData(values=data),
        width=width,
        height=25 * len(data),
    ).encode(
        y=alt.Y(
            "label:N",
            sort=[name for name, _ in counts],
            title=None,
            axis=alt.Axis(labelLimit=200, labelFontSize=12, labelColor=INK),
        ),
        x=alt.X("n:Q", axis=None, scale=alt.Scale(domain=[0, room], nice=False)),
    )
    bar = base.mark_bar(height={"band": 0.62}, cornerRadiusEnd=2).encode(
        color=alt.Color("colour:N", scale=None)
    )
    text = base.mark_text(align="left", dx=5, color=SOFT, fontSize=11.5).encode(text="text:N")
    return to_svg(alt.layer(bar, text, autosize=alt.AutoSizeParams(type="fit")), title)


def scatter(
    points: Sequence[tuple[float, float, str]], *, max_toxicity: float | None, min_similarity: float | None
) -> str:
    """Candidates by toxicity and similarity; the accepted corner lies at the upper left of the two lines."""
    import altair as alt

    data = [{"t": t, "s": s, "kind": kind} for t, s, kind in reversed(points)]
    low = min([s for _, s, _ in points] + [min_similarity if min_similarity is not None else 0.5, 0.5])
    floor = max(-1.0, np.floor(low * 10) / 10)
    dots = (
        alt.Chart(alt.InlineData(values=data), width=500, height=300)
        .mark_circle(size=26, clip=True)
        .encode(
            x=_score_axis("toxicity of the candidate", field="t"),
            y=alt.Y("s:Q", title="similarity to the source", scale=alt.Scale(domain=[floor, 1], nice=False)),
            color=_colours([("chosen", AFTER), ("not chosen", MUTED)]),
            opacity=alt.condition("datum.kind == 'chosen'", alt.value(0.85), alt.value(0.4)),
        )
    )
    layers: list[Any] = [dots]
    for value, channel in ((max_toxicity, "x"), (min_similarity, "y")):
        if value is not None:
            rule = alt.Chart(alt.InlineData(values=[{"v": value}])).mark_rule(
                strokeDash=[4, 3], color=BEFORE, strokeWidth=1.2
            )
            layers.append(rule.encode(x="v:Q") if channel == "x" else rule.encode(y="v:Q"))
    return to_svg(alt.layer(*layers), "Similarity against toxicity of candidates")


def heat(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A correlation matrix, each cell with its number."""
    import altair as alt

    data = [
        {"a": a, "b": b, "r": values[i][j], "text": "–" if values[i][j] is None else f"{values[i][j]:.2f}"}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    ]
    base = alt.Chart(alt.InlineData(values=data), width=alt.Step(74), height=alt.Step(46)).encode(
        x=alt.X(
            "b:N", sort=list(names), title=None, axis=alt.Axis(labelAngle=0, orient="top", labelColor=INK)
        ),
        y=alt.Y("a:N", sort=list(names), title=None, axis=alt.Axis(labelColor=INK)),
    )
    # One hue whose opacity is |r|: it needs no second palette on a dark page.
    cells = (
        base.mark_rect(color=AFTER, cornerRadius=3)
        .encode(opacity=alt.Opacity("abs:Q", scale=alt.Scale(domain=[0, 1], range=[0.05, 0.85]), legend=None))
        .transform_calculate(abs="datum.r == null ? 0 : abs(datum.r)")
    )
    text = base.mark_text(fontSize=12.5, color=INK).encode(text="text:N")
    return to_svg(cells + text, "Correlation between scorers")


def histogram(values: np.ndarray, *, title: str) -> str:
    """One histogram of a sample, its range taken from the values."""
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts = Histogram(20, low, high)
    counts.add(values)
    return one_histogram(counts, title, heading=True)


def one_histogram(counts: Histogram, title: str, *, heading: bool = False) -> str:
    """One histogram; empty ends are cut off unless it has a heading of its own (and stands among others)."""
    import altair as alt

    data, log = _bars([("", counts)], low=0.5)
    low, high = float(counts.edges[0]), float(counts.edges[-1])
    if not heading and data:
        low = min(d["x"] for d in data) - (data[0]["x2"] - data[0]["x"]) * 0.1
    chart = (
        alt.Chart(alt.InlineData(values=data), width=200 if heading else 250, height=90 if heading else 130)
        .mark_bar(color=AFTER)
        .encode(
            x=alt.X(
                "x:Q",
                title=None if heading else title,
                scale=alt.Scale(domain=[low, high], nice=False),
                axis=alt.Axis(tickCount=5, grid=False, format="~g"),
            ),
            x2="x2:Q",
            y=_count_axis(None, log, ticks=3),
            y2="y2:Q",
        )
    )
    return to_svg(chart.properties(title=title) if heading else chart, f"Distribution of {title}")


def _bars(
    series: Sequence[tuple[str, Histogram]], *, low: float, log: bool | None = None
) -> tuple[list[dict[str, Any]], bool]:
    """Rows for bars that share each bin between the series; empty bins are left out."""
    if log is None:
        log = any(_is_skewed(h) for _, h in series)
    rows = []
    for k, (name, counts) in enumerate(series):
        width = (counts.edges[1] - counts.edges[0]) / len(series)
        gap = width * 0.08
        for left, n in zip(counts.edges[:-1], counts.counts, strict=True):
            if n:
                x = float(left + k * width)
                rows.append(
                    {"x": x + gap, "x2": x + width - gap, "n": int(n), "y2": low if log else 0, "kind": name}
                )
    return rows, log


def _is_skewed(counts: Histogram) -> bool:
    filled = counts.counts[counts.counts > 0]
    return bool(len(filled) > 1 and filled.max() >= _LOG_FROM * filled.min())


def _score_axis(title: str | None, *, field: str = "x", ticks: Sequence[float] | None = None) -> alt.X:
    import altair as alt

    values = list(ticks or [0, 0.2, 0.4, 0.6, 0.8, 1])
    return alt.X(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(domain=[0, 1], nice=False),
        axis=alt.Axis(values=values, format=".1f", grid=False),
    )


def _count_axis(title: str | None, log: bool, ticks: int = 5, top: int | None = None) -> alt.Y:
    import altair as alt

    upper = alt.Undefined if top is None else top
    if not log:
        axis = alt.Axis(tickCount=ticks, format="~s", tickMinStep=1)
        return alt.Y("n:Q", title=title, scale=alt.Scale(nice=True, zero=True, domainMax=upper), axis=axis)
    axis = alt.Axis(values=[10**k for k in range(0, 10, 1 if ticks > 3 else 2)], format="~s")
    scale = alt.Scale(type="log", domainMin=0.5, domainMax=upper, nice=False)
    return alt.Y("n:Q", title=f"{title} (log scale)" if title else None, scale=scale, axis=axis)


def _colours(pairs: Sequence[tuple[str, str]], *, legend: bool = True) -> alt.Color:
    import altair as alt

    names, colours = [p[0] for p in pairs], [p[1] for p in pairs]
    box = alt.Legend(title=None, orient="top", symbolType="square") if legend and len(pairs) > 1 else None
    return alt.Color("kind:N", scale=alt.Scale(domain=names, range=colours), legend=box)


def _theme() -> dict[str, Any]:
    return {
        "background": "transparent",
        "mark": {"aria": False},  # the whole chart is one image with one label; a label a dot would weigh 200 KB
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": SOFT, "titleColor": SOFT, "titleFontWeight": "normal", "titleFontSize": 11.5,
            "labelFontSize": 11, "gridColor": GRID, "domainColor": MUTED, "tickColor": MUTED, "tickSize": 4,
            "labelPadding": 4,
        },
        "axisY": {"domain": False, "ticks": False},
        "legend": {"labelColor": INK, "labelFontSize": 12, "symbolSize": 90, "padding": 0, "offset": 8},
        "title": {"color": INK, "fontSize": 12.5, "fontWeight": 600, "anchor": "start", "offset": 6},
    }  # fmt: skip
