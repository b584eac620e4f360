"""The result page of an evaluation: one self-contained HTML file of tiles, charts, tables and veiled texts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.report.formatting import flatten


@dataclass(frozen=True)
class Tile:
    """A number at the top: value, label, and a note in small print."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of strings; columns after the first are numbers unless named in `words`.

    Attributes:
        head: Column headings.
        rows: Cells.
        title: Above it.
        note: Below it.
        words: Indices of columns that hold words.
        strong: Indices of rows in bold type.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    words: tuple[int, ...] = (0,)
    strong: tuple[int, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A chart (SVG) with a title and a note."""

    svg: str
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A text for people to read, veiled until asked for.

    Attributes:
        meta: Facts about it: (name, value).
        pieces: The text as (kind, text): equal, delete, insert, or mark.
        more: Further texts under headings.
    """

    meta: Sequence[tuple[str, str]]
    pieces: Sequence[tuple[str, str]]
    more: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Texts:
    """A group of veiled texts."""

    title: str
    texts: Sequence[Text]


@dataclass(frozen=True)
class Section:
    """A part of the page with its anchor."""

    anchor: str
    title: str
    say: str = ""
    blocks: Sequence[Figure | Grid | Texts] = field(default_factory=tuple)


def render_page(
    *,
    job: str,
    headline: str,
    lede: str,
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    record: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> str:
    """Fill the page.

    Args:
        job: `eval rewrites`, ...
        headline: One sentence that says what came out.
        lede: What was measured.
        tiles: Numbers at the top.
        sections: The body.
        record: The results: config, models and version are shown at the end.
        warnings: Lines a reader must not miss (a judge that also ranked).
    """
    import importlib.metadata

    css = Path(__file__).parents[1] / "report" / "report.css"
    models = [{"role": role, **info} for role, info in (record.get("models") or {}).items()]
    return str(
        _environment()
        .get_template("page.html.jinja")
        .render(
            job=job,
            headline=headline,
            lede=lede,
            tiles=tiles,
            sections=[(s, [(type(b).__name__, b) for b in s.blocks]) for s in sections],
            warnings=warnings,
            models=models,
            config=flatten(record.get("config") or {}),
            device=record.get("device"),
            version=importlib.metadata.version("tamis"),
            css=css.read_text(encoding="utf-8"),
        )
    )


@functools.cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
