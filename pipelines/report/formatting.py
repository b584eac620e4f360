"""How numbers, times and texts are put before a reader, in the report and the card alike."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACTION_NAMES = {
    "rewrite": "rewritten",
    "span_edit": "span edited",
    "redact": "span redacted",
    "drop_segment": "passage removed",
    "drop_document": "document dropped",
    "flag": "kept and flagged",
}


@functools.cache
def environment() -> Any:
    """The Jinja environment of this package: everything is escaped unless marked otherwise."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name) and "html" in str(name),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters.update(
        n=count, pct=percent, rate=rate, f2=two_places, secs=seconds, size=size, when=when, temp=temperature
    )
    return env


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return "–" if value is None else f"{int(value):,}"


def rate(value: float | None) -> str:
    """Something a second: with a decimal below 10, where it matters."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


def percent(value: float | None) -> str:
    """A share as a percentage, with as many decimals as it needs to be neither 0 nor 100 when it is not."""
    if value is None:
        return "–"
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    text = ""
    for digits in (1, 2, 3):
        text = f"{100 * value:.{digits}f}"
        if 0 < float(text) < 100:
            break
    return f"{text} %"


def two_places(value: float | None) -> str:
    """A score to two places."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """A duration in the unit a person would use."""
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: float | None) -> str:
    """Bytes in the unit a person would use."""
    if value is None:
        return "–"
    value = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def when(value: str | None) -> str:
    """An ISO time as date and minute."""
    try:
        return datetime.datetime.fromisoformat((value or "").replace("Z", "+00:00")).strftime(
            "%-d %B %Y, %H:%M UTC"
        )
    except ValueError:
        return value or "–"


def temperature(value: float) -> str:
    """A sampling temperature, with at least one decimal."""
    return f"{value:.1f}" if round(value, 1) == round(value, 4) else f"{value:g}"


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as dotted names and values."""
    out: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            out.append((f"{prefix}{key}", ", ".join(map(str, value)) or "–"))
        else:
            out.append((f"{prefix}{key}", "–" if value is None else str(value)))
    return out


def heat_pieces(
    text: str, spans: Sequence[Mapping[str, Any]], *, offset: int = 0
) -> list[tuple[str, float | None]]:
    """Cut a text where spans begin and end.

    Args:
        text: A passage.
        spans: With `start`, `end` (characters of the document) and `score`; they may overlap or reach outside.
        offset: Where the passage begins in the document.

    Returns:
        Pieces that join to `text`, each with the largest score of the spans over it (1 where a span has none);
        None where there is no span.
    """
    found = []
    for span in spans:
        start, end = max(0, span["start"] - offset), min(len(text), span["end"] - offset)
        if start < end:
            score = span.get("score")
            found.append((start, end, 1.0 if score is None else float(score)))
    cuts = sorted({0, len(text), *(s for s, _, _ in found), *(e for _, e, _ in found)})
    pieces: list[tuple[str, float | None]] = []
    for a, b in itertools.pairwise(cuts):
        over = [score for s, e, score in found if s <= a and b <= e]
        pieces.append((text[a:b], max(over) if over else None))
    return pieces
