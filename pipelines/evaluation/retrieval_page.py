"""The page of `tamis eval retrieval`: systems side by side, what tells them apart, and the queries that do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.metrics.bootstrap import ends
from pipelines.evaluation import charts
from pipelines.evaluation.page import Figure, Grid, Section, Text, Texts, Tile, render_page
from pipelines.report.charts import unchecked

if TYPE_CHECKING:
    from pipelines.evaluation.retrieval_record import RetrievalEvalResult

_SHOWN = 8  # queries, either way
_NOT_SHOWN = {"run", "rows", "files"}


def render(result: RetrievalEvalResult, record: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """The page as HTML.

    Args:
        result: The figures.
        record: What `results.json` will hold.
        texts: Of queries.
    """
    first = result.measures[0]
    base = record["baseline"]
    ranked = sorted(result.systems, key=lambda s: -s.means[first].mean)
    best = ranked[0]
    tiles = [
        Tile(
            f"{s.means[first].mean:.4f}",
            f"{first} of {s.name}",
            ends(s.means[first].as_dict(), between=" to "),
        )
        for s in ranked[:3]
    ]
    tiles.append(Tile(f"{len(result.queries):,}", "queries", f"{record['labels']:,} labels"))
    headline = f"{best.name} ranks best: {first} {best.means[first].mean:.4f}"
    if len(ranked) == 1:
        headline = f"{best.name}: {first} {best.means[first].mean:.4f}"
    with unchecked():
        sections = [_figures(result, best.name)]
        if len(result.systems) > 1:
            sections.append(_comparisons(record, result.measures))
            sections.append(_queries(result, texts, base, first))
    sections.append(_how(record))
    return render_page(
        job="eval retrieval",
        headline=headline,
        lede="Every system answers the same queries over the same documents and is scored by one set of rules, printed below. Intervals "
        "(95 %) draw queries with replacement.",
        tiles=tiles,
        sections=sections,
        record=record,
        warnings=record["notes"],
    )


def _figures(result: RetrievalEvalResult, best: str) -> Section:
    blocks: list[Figure | Grid] = []
    for m in result.measures:
        bars = [(s.name, s.means[m]) for s in result.systems]
        blocks.append(Figure(charts.interval_bars(bars, title=m), m))
    rows = [
        [
            s.name,
            s.kind,
            f"{s.answered:,}",
            *(f"{x.mean:.4f} {ends(x.as_dict(), 4)}" for x in s.means.values()),
        ]
        for s in result.systems
    ]
    strong = tuple(i for i, s in enumerate(result.systems) if s.name == best)
    blocks.append(
        Grid(("system", "kind", "queries answered", *result.measures), rows, words=(0, 1), strong=strong)
    )
    return Section("figures", "Figures", "", blocks)


def _comparisons(record: Mapping[str, Any], measures: Sequence[str]) -> Section:
    blocks = []
    for m in measures:
        rows = []
        for pair in record["comparisons"]:
            x = pair["measures"][m]
            d = x["difference"]
            rows.append(
                [
                    f"{pair['a']} - {pair['b']}",
                    f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]",
                    f"{x['t_p_value']:.4f}",
                    f"{x['t_p_value_holm']:.4f}",
                    f"{x['p_value']:.4f}",
                    f"{x['wins']:,} / {x['losses']:,}",
                ]
            )
        head = ("difference", "mean [95 %]", "p, t-test", "p, Holm", "p, bootstrap", "queries ahead / behind")
        blocks.append(Grid(head, rows, title=m))
    return Section("comparisons", "Differences", "Paired by query.", blocks)


def _queries(result: RetrievalEvalResult, texts: Mapping[str, str], base: str, measure: str) -> Section:
    """The queries that most tell the best other system from the baseline."""
    others = [s for s in result.systems if s.name != base]
    other = max(others, key=lambda s: s.means[measure].mean)
    a, b = other.values[measure], result.system(base).values[measure]
    gaps = sorted(zip(result.queries, a, b, strict=True), key=lambda x: (x[2] - x[1], x[0]))
    groups = []
    for title, rows in (
        (f"{other.name} is ahead", [g for g in gaps if g[1] > g[2]][:_SHOWN]),
        (f"{base} is ahead", [g for g in reversed(gaps) if g[1] < g[2]][:_SHOWN]),
    ):
        shown = [
            Text(
                [("query", q), (other.name, f"{x:.3f}"), (base, f"{y:.3f}")],
                [("equal", texts.get(q, q))],
            )
            for q, x, y in rows
        ]
        if shown:
            groups.append(Texts(title, shown))
    return Section(
        "queries", "Queries that tell them apart", f"By {measure}, the largest differences.", groups
    )


def _how(record: Mapping[str, Any]) -> Section:
    rules = [[name.replace("_", " "), said] for name, said in record["conventions"].items()]
    rows = [
        [
            s["name"],
            ", ".join(
                f"{k} {_short(v)}"
                for k, v in s["settings"].items()
                if k not in _NOT_SHOWN and v not in (None, "")
            ),
        ]
        for s in record["systems"]
    ]
    blocks = [
        Grid(("rule", "here"), rules, words=(0, 1)),
        Grid(("system", "how"), rows, title="Systems", words=(0, 1)),
    ]
    return Section("rules", "How it was computed", "Figures of different rules cannot be compared.", blocks)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
