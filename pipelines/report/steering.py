"""Contrastive decoding in the report: where it steered along a text, and what the other modes would have chosen.

Both are measured after the run (`pipelines.steering_views`), because they take the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.charts import AFTER, BEFORE, INK, SOFT, to_svg
from pipelines.report.words import word_diff

_MOST_TOKENS = 60  # more make bars too thin to read; the rest is said to be left out
MODE_NAMES = {
    "prompt_only": "prompt only",
    "vanilla_cd": "classic contrastive",
    "official": "SoCD, official",
    "logratio": "SoCD, log-ratio",
}


def steering_context(views: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the template shows; None where nothing was measured.

    Args:
        views: As `pipelines.steering_views` wrote it.
    """
    if not views or not (views.get("traces") or views.get("modes")):
        return None
    modes = [m for m in MODE_NAMES if any(m in row["modes"] for row in views.get("modes", []))]
    rows = [_row(row, modes) for row in views.get("modes", [])]
    return {
        "traces": [_trace(t) for t in views.get("traces", [])],
        "modes": [MODE_NAMES[m] for m in modes],
        "rows": rows,
        "accepted": [sum(bool(cell and cell["accepted"]) for cell in column) for column in _columns(rows)],
    }


def steering_chart(tokens: Sequence[str], alpha: Sequence[float], k: Sequence[int]) -> str:
    """Bars of alpha and a line of k, token by token.

    Args:
        tokens: Texts of n tokens.
        alpha: n numbers in [0, 1).
        k: n counts, at least 1.
    """
    import altair as alt

    # Equal tokens are different places: each label carries its number, which the axis does not show.
    places = [f"{i:04d}{_visible(token)}" for i, token in enumerate(tokens)]
    data = [{"x": x, "alpha": a, "k": max(1, n)} for x, a, n in zip(places, alpha, k, strict=True)]
    base = alt.Chart(
        alt.InlineData(values=data), width=alt.Step(max(13, min(30, 640 // max(1, len(data))))), height=150
    ).encode(
        x=alt.X(
            "x:O",
            sort=places,
            title=None,
            axis=alt.Axis(labelExpr="slice(datum.label, 4)", labelAngle=-60, labelColor=INK, labelLimit=70),
        )
    )
    top = max([*alpha, 0.05])
    bar = base.mark_bar(color=AFTER, opacity=0.8).encode(
        y=alt.Y(
            "alpha:Q",
            title="alpha (bars)",
            scale=alt.Scale(domain=[0, top], nice=True),
            axis=alt.Axis(tickCount=4, format=".2f"),
        )
    )
    line = base.mark_line(color=BEFORE, strokeWidth=1.3, point={"size": 14, "color": BEFORE}).encode(
        y=alt.Y(
            "k:Q",
            title="k (line, log scale)",
            scale=alt.Scale(type="log", nice=False, domainMin=max(1, min(d["k"] for d in data) * 0.8)),
            axis=alt.Axis(orient="right", format="~s", grid=False, titleColor=SOFT, tickCount=4),
        )
    )
    return to_svg(alt.layer(bar, line).resolve_scale(y="independent"), "Alpha and k along the tokens")


def _trace(trace: Mapping[str, Any]) -> dict[str, Any]:
    tokens, alpha, k = (trace[name][:_MOST_TOKENS] for name in ("tokens", "alpha", "k"))
    vocabulary = trace["vocabulary"]
    strongest = sorted(range(len(tokens)), key=lambda i: (-alpha[i], i))[:3]
    return {
        "diff": word_diff(trace["before"], trace["after"]),
        "temperature": trace["temperature"],
        "chart": steering_chart(tokens, alpha, k),
        "more": len(trace["tokens"]) - len(tokens),
        "mean": sum(trace["alpha"]) / len(trace["alpha"]),
        "largest": max(trace["alpha"]),
        "share": sum(trace["edited"]) / len(trace["edited"]) / vocabulary,
        "strongest": [_visible(tokens[i]) for i in strongest],
    }


def _row(row: Mapping[str, Any], modes: Sequence[str]) -> dict[str, Any]:
    return {
        "text": row["text"],
        "toxicity": row["toxicity"],
        "cells": [row["modes"].get(mode) for mode in modes],
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*(row["cells"] for row in rows), strict=True))


def _visible(token: str) -> str:
    """A token as a label: what it says, or what it is where it says nothing."""
    return token.strip() or {" ": "␣", "\n": "⏎"}.get(token[:1], "·")
