"""The page of `tamis pool`, and the card of its folder: who found how much, how much is shared, some pools to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.metrics.bootstrap import Interval
from pipelines.evaluation import charts
from pipelines.evaluation.page import Figure, Grid, Section, Text, Texts, Tile, render_page
from pipelines.report.charts import bars, unchecked
from pipelines.retrieval.pool_figures import FUSED, UNION

if TYPE_CHECKING:
    from pipelines.retrieval.pool_examples import Example
    from pipelines.retrieval.pool_figures import Recalls

_BINS = 12
_OWN = {"name", "kind", "depth", "candidates", "queries", "files", "model"}


def render(
    record: Mapping[str, Any], recalls: Recalls, sizes: Sequence[int], examples: Sequence[Example] = ()
) -> str:
    """The page as HTML.

    Args:
        record: The manifest's facts: config, totals, sources, corpus, recall, overlap, notes.
        recalls: The same figures by query.
        sizes: Candidates of each query.
        examples: Pools to read.
    """
    totals, figures = record["totals"], record["recall"]
    mean = totals["candidates"] / max(1, totals["queries"])
    tiles = [
        Tile(f"{totals['candidates']:,}", "candidates", f"for {totals['queries']:,} queries"),
        Tile(f"{mean:.1f}", "candidates a query", f"{totals['documents']:,} different documents"),
        Tile(f"{len(record['sources'])}", "sources", ", ".join(s["name"] for s in record["sources"])),
    ]
    headline = f"{totals['candidates']:,} candidates for {totals['queries']:,} queries"
    sections = []
    with unchecked():
        if figures is not None:
            at = figures["at"]
            best = max(
                (
                    (n, c[str(at)]["mean"])
                    for n, c in figures["systems"].items()
                    if str(at) in c and n != FUSED
                ),
                key=lambda x: x[1],
                default=None,
            )
            union = figures["systems"].get(UNION)
            shown = union["all"]["mean"] if union else (best[1] if best else 0.0)
            tiles.append(
                Tile(
                    f"{shown:.3f}",
                    "recall of the pool",
                    f"of {figures['positives']:,} documents people judged good",
                )
            )
            headline += f", {100 * shown:.1f} % of what people judged good among them"
            sections.append(_recall(figures, recalls))
        sections.append(_sources(record, sizes))
        if record["overlap"]:
            sections.append(_overlap(record["overlap"]))
    if examples:
        sections.append(_examples(examples))
    return render_page(
        job="pool",
        headline=headline,
        lede="Every candidate keeps all retrievers that found it, with rank and score in each. A pool says nothing about relevance; "
        "what is not in it is never judged.",
        tiles=tiles,
        sections=sections,
        record=record,
        warnings=record["notes"],
    )


def _recall(figures: Mapping[str, Any], recalls: Recalls) -> Section:
    at, systems = figures["at"], figures["systems"]
    bars = [
        (_title(n, at, figures), Interval(**cuts[str(at)])) for n, cuts in systems.items() if str(at) in cuts
    ]
    if UNION in systems:
        bars.append((_title(UNION, at, figures), Interval(**systems[UNION]["all"])))
    blocks: list[Figure | Grid] = []
    if bars:
        blocks.append(
            Figure(
                charts.interval_bars(bars, title=f"recall at {at}"),
                "How much of what people judged good was found",
                f"Mean over {figures['queries']:,} queries with a document people judged good; intervals (95 %) draw queries. "
                "Candidates people put in count for no retriever.",
            )
        )
    lines = {
        _title(n, at, figures): [(float(k), x["mean"]) for k, x in cuts.items()]
        for n, cuts in systems.items()
        if n != UNION and len(cuts) > 1
    }
    if lines:
        blocks.append(
            Figure(
                charts.curves(lines, x_title="documents a query", y_title="recall", title="recall by depth")
            )
        )
    rows = [
        [
            "all, fused" if n == FUSED else n,
            *(_cell(cuts.get(str(k))) for k in recalls.cuts),
        ]
        for n, cuts in systems.items()
        if n != UNION
    ]
    blocks.append(Grid(("source", *(f"recall@{k}" for k in recalls.cuts)), rows, title="Recall by depth"))
    if figures["differences"]:
        rows = [
            [name, _signed(x["difference"]), f"{x['p_value']:.4f}"]
            for name, x in figures["differences"].items()
        ]
        note = (
            f"Paired by query, at {at} documents of the retriever. `fused` has as many documents as it; `union` is the whole "
            "pool, which is larger."
        )
        blocks.append(Grid(("difference", "recall [95 %]", "p"), rows, title="Together and alone", note=note))
    return Section("recall", "What people judged good", "", blocks)


def _sources(record: Mapping[str, Any], sizes: Sequence[int]) -> Section:
    rows = []
    for s in record["sources"]:
        how = ", ".join(f"{k} {_short(v)}" for k, v in s.items() if k not in _OWN and v not in (None, ""))
        rows.append(
            [s["name"], s["kind"], str(s.get("depth", "")), f"{s['candidates']:,}", f"{s['queries']:,}", how]
        )
    head = ("source", "kind", "depth", "candidates", "queries", "how")
    blocks: list[Figure | Grid] = [Grid(head, rows, words=(0, 1, 5))]
    if sizes:
        counts = _bins(sizes)
        suffixes = [f"{n:,.0f}" for _, n in counts]
        svg = bars(counts, suffixes=suffixes, title="queries by their number of candidates")
        blocks.append(Figure(svg, "Queries by their number of candidates"))
    return Section("sources", "Sources", "", blocks)


def _examples(examples: Sequence[Example]) -> Section:
    texts = [
        Text(
            [("query", e.query_id), ("candidates", f"{e.candidates:,}")],
            [("equal", e.text)],
            [(f"{doc} ({where})", e.texts.get(doc, doc)) for doc, where in e.documents],
        )
        for e in examples
    ]
    say = "The first queries, each with the candidates its sources agree on most, and their rank in each."
    return Section("pools", "Pools to read", say, [Texts("", texts)])


def _bins(sizes: Sequence[int]) -> list[tuple[str, float]]:
    """Queries by candidates, in a dozen ranges of whole numbers."""
    least, most = min(sizes), max(sizes)
    width = max(1, -(-(most - least + 1) // _BINS))
    counts = np.bincount((np.asarray(sizes) - least) // width)
    found = []
    for i, n in enumerate(counts.tolist()):
        first, last = least + i * width, min(most, least + (i + 1) * width - 1)
        found.append((f"{first:,}" if first == last else f"{first:,} to {last:,}", float(n)))
    return found


def _overlap(shared: Mapping[str, Any]) -> Section:
    names = shared["sources"]
    rows = [
        [a, *("–" if x is None else f"{100 * x:.1f} %" for x in line)]
        for a, line in zip(names, shared["shared"], strict=True)
    ]
    grid = Grid(("of what this one found", *(f"{n} found too" for n in names)), rows)
    return Section("overlap", "How much is shared", "Over all queries, within each depth.", [grid])


def _title(name: str, at: int, figures: Mapping[str, Any]) -> str:
    if name == FUSED:
        return f"fused, {at} a query"
    if name == UNION:
        return f"union, {figures['candidates_in_union']:.0f} a query"
    return name


def _cell(x: Mapping[str, float] | None) -> str:
    return "–" if x is None else f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"


def _signed(x: Mapping[str, float]) -> str:
    return f"{x['mean']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def card(record: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    totals, corpus = record["totals"], record["corpus"]
    rows = "\n".join(
        f"| {s['name']} | {s['kind']} | {s.get('depth', '')} | {s['candidates']:,} |"
        for s in record["sources"]
    )
    notes = "\n".join(f"- {n}" for n in record["notes"])
    figures = record["recall"]
    found = ""
    if figures is not None:
        lines = [
            f"| {n} | {_cell(cuts.get(str(figures['at']), cuts.get('all')))} |"
            for n, cuts in figures["systems"].items()
        ]
        found = (
            f"\n## Recall at {figures['at']}\n\nOf what people judged good, mean over {figures['queries']:,} queries "
            "[95 %]; `union` is the whole pool.\n\n| source | recall |\n|---|---|\n" + "\n".join(lines) + "\n"
        )
    return f"""---
pretty_name: candidate pool made by tamis
tags: [tamis, retrieval, candidate pool]
configs:
- config_name: default
  data_files: [{{split: train, path: data/*.parquet}}]
- config_name: queries
  data_files: [{{split: train, path: queries/*.parquet}}]
- config_name: corpus
  data_files: [{{split: train, path: corpus/*.parquet}}]
---

# Candidates to be judged

{totals["candidates"]:,} (query, document) pairs for {totals["queries"]:,} queries, of a corpus of {corpus["documents"]:,} documents.
One row a pair and source: `query_id, doc_id, source, rank, score`. A pool says nothing about relevance.

| source | kind | depth | candidates |
|---|---|---|---|
{rows}
{found}
{("## Notes" + chr(10) + chr(10) + notes + chr(10)) if notes else ""}
How each source works is in `manifest.json`; pictures are in `report.html`.
"""
