"""The page and the card of `tamis label`, and the lines it prints: labels, positives, cost, agreement, what has no label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipelines.evaluation.page import Figure, Grid, Section, Text, Texts, Tile, render_page
from pipelines.report.charts import bars, histogram, unchecked
from schemas.judgments import READABLE

if TYPE_CHECKING:
    from pipelines.label import LabelResult, Task
    from pipelines.label_config import LabelConfig
    from pipelines.retrieval.label_finish import Seen

EXAMPLES = 6  # queries shown
_MOST_CHARACTERS = 400
_MOST_DOCUMENTS = 5
_FIGURES = ("auc", "tau", "kappa", "precision", "recall", "f1", "weighted_kappa")


def render(record: Mapping[str, Any], seen: Seen, task: Task) -> str:
    """The page as HTML.

    Args:
        record: The manifest's facts.
        seen: What was seen of the labels.
        task: What was judged.
    """
    totals, cost = record["totals"], record["cost"]
    positives = record["positives"]
    each = cost["per_1000_pairs"]
    tiles = [
        Tile(f"{totals['labels']:,}", "labels", f"of {totals['candidates']:,} pairs"),
        Tile(
            f"{positives['mean']['mean']:.1f}" if positives else "-",
            "positives a query",
            f"{positives['queries_without']:,} of {totals['queries']:,} queries have none"
            if positives
            else "an order only",
        ),
        Tile(
            f"{each['prompt_tokens'] + each['completion_tokens']:,.0f}",
            "tokens for 1,000 pairs",
            "" if each["price"] is None else f"at a price of {each['price']:.2f}",
        ),
        Tile(
            f"{totals['unreadable'] + totals['unasked']:,}",
            "pairs without a label",
            "the column parse_status says why",
        ),
    ]
    with unchecked():
        sections = [
            _labels(record, seen),
            *_agreement(record),
            _cost(record),
            _examples(seen, task),
        ]
    return render_page(
        job="label",
        headline=f"{totals['labels']:,} labels by {record['models']['judge']['name']} for {totals['queries']:,} queries",
        lede=f"Method {record['method']['name']}, prompts {', '.join(record['prompts'].values()) or 'none'}. A reply that could "
        "not be read is a row with its status and no label.",
        tiles=tiles,
        sections=sections,
        record=record,
        warnings=record["notes"],
    )


def _labels(record: Mapping[str, Any], seen: Seen) -> Section:
    rows = seen.all()
    blocks: list[Figure | Grid | Texts] = []
    if rows.height:
        readable = rows.filter(pl.col("parse_status").is_in(list(READABLE)))
        for column, title in (("grade", "Grades"), ("binary", "Yes and no")):
            counts = readable.filter(pl.col(column).is_not_null()).group_by(column).len().sort(column)
            if counts.height:
                names = {True: "yes", False: "no"}
                pairs = [(str(names.get(v, v)), float(n)) for v, n in counts.iter_rows()]
                blocks.append(
                    Figure(bars(pairs, suffixes=[f"{n:,.0f}" for _, n in pairs], title=title), title)
                )
        for (signal,), own in readable.group_by(["signal"], maintain_order=True):
            values = own["value"].drop_nulls().to_numpy()
            if len(values):
                blocks.append(Figure(histogram(np.asarray(values, np.float64), title=f"value of {signal}")))
        if record["positives"]:
            counted = [(k, float(n)) for k, n in _binned(record["positives"]["by_count"])]
            svg = bars(counted, suffixes=[f"{n:,.0f}" for _, n in counted], title="Queries by positives")
            blocks.append(Figure(svg, "Queries by number of positives"))
    statuses = [[name, f"{n:,}"] for name, n in record["statuses"].items()]
    if record["totals"]["unasked"]:
        statuses.append(["not asked (budget)", f"{record['totals']['unasked']:,}"])
    blocks.append(Grid(("status", "pairs"), statuses, title="What became of each pair"))
    return Section("labels", "Labels", "", blocks)


def _binned(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Queries by positives; above ten together in tens."""
    found: dict[str, int] = {}
    for key, queries in sorted(((int(k), v) for k, v in counts.items())):
        low = key // 10 * 10
        name = str(key) if key < 10 else f"{low} to {low + 9}"
        found[name] = found.get(name, 0) + queries
    return list(found.items())


def _agreement(record: Mapping[str, Any]) -> list[Section]:
    if not record["agreement"]:
        return []
    rows, says = [], []
    for own in record["agreement"]:
        figures = {**own["order"], **(own["binary"] or {}), **(own["graded"] or {})}
        rows += [[own["signal"], name, _interval(figures[name])] for name in _FIGURES if figures.get(name)]
        unjudged = ", pairs people did not judge counted as negative" if own["unjudged_as_negative"] else ""
        says.append(f"{own['signal']}: {own['pairs']:,} pairs of {own['queries']:,} queries{unjudged}.")
    say = " ".join(says) + " Intervals (95 %) draw queries. An AUC of 0.5 and a kappa of 0 are chance."
    return [
        Section(
            "agreement",
            "Agreement with people",
            say,
            [Grid(("signal", "figure", "[95 %]"), rows, words=(0, 1))],
        )
    ]


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _cost(record: Mapping[str, Any]) -> Section:
    cost, each = record["cost"], record["cost"]["per_1000_pairs"]
    rows = [
        ["questions asked", f"{cost['asked']:,}", ""],
        ["answered by the request cache", f"{cost['from_cache']:,}", ""],
        ["prompt tokens", f"{cost['prompt_tokens']:,}", f"{each['prompt_tokens']:,.0f}"],
        ["answer tokens", f"{cost['completion_tokens']:,}", f"{each['completion_tokens']:,.0f}"],
        ["seconds of work", f"{cost['seconds']:,.1f}", f"{each['seconds']:,.1f}"],
    ]
    if cost["price"] is not None:
        rows.append(["price", f"{cost['price']:,.4f}", f"{each['price']:,.4f}"])
    say = "Tokens as a server would bill them; in this process a beginning that prompts share is read once."
    if cost["from_cache"]:
        say += " What the cache answered was paid for before and is not in these figures."
    return Section("cost", "Cost", say, [Grid(("", "in all", "for 1,000 pairs"), rows)])


def _examples(seen: Seen, task: Task) -> Section:
    queries = {q["query_id"]: q["text"] for q in task.data.queries.to_pylist()}
    by_query: dict[str, list[dict[str, Any]]] = {}
    for row in seen.examples:
        by_query.setdefault(row["query_id"], []).append(row)
    shown = dict(list(by_query.items())[:EXAMPLES])
    texts = _texts(task, [r["doc_id"] for rows in shown.values() for r in _best(rows)])
    blocks = []
    for query_id, rows in shown.items():
        meta = [("query", query_id), ("candidates", str(len(rows)))]
        facts = seen.facts.get(query_id, {}).get("facts", {})
        if facts.get("pseudo_answer"):
            meta.append(("pseudo-answer", _short(str(facts["pseudo_answer"]))))
        more = [(f"{r['doc_id']} ({_label(r)})", _short(texts.get(r["doc_id"], ""))) for r in _best(rows)]
        blocks.append(Text(meta, [("equal", queries.get(query_id) or query_id)], more))
    return Section("examples", "Examples", "The first queries, their best labels first.", [Texts("", blocks)])


def _best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def key(row: Mapping[str, Any]) -> tuple[float, ...]:
        value = row["value"] if row["value"] is not None else -1e9
        grade = row["grade"] if row["grade"] is not None else float(bool(row["binary"]))
        return (-grade, row["rank"] if row["rank"] is not None else 1e9, -value)

    return sorted(rows, key=key)[:_MOST_DOCUMENTS]


def _label(row: Mapping[str, Any]) -> str:
    if row["parse_status"] not in READABLE:
        return str(row["parse_status"])
    said = [f"grade {row['grade']}"] if row["grade"] is not None else []
    said += ["yes" if row["binary"] else "no"] if row["binary"] is not None else []
    said += [f"value {row['value']:.2f}"] if row["value"] is not None else []
    said += [f"rank {row['rank']}"] if row["rank"] is not None else []
    return ", ".join(said)


def _texts(task: Task, ids: Sequence[str]) -> dict[str, str]:
    from pipelines.retrieval.corpus import documents_in

    assert task.data.documents is not None
    found = {}
    for batch in documents_in(ids, task.data.documents):
        for row in batch.select(["doc_id", "title", "text"]).to_pylist():
            found[row["doc_id"]] = (
                f"{row['title']}. {row['text'] or ''}" if row["title"] else (row["text"] or "")
            )
    return found


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " ..."


def card(record: Mapping[str, Any]) -> str:
    """README.md of the folder."""
    totals, each = record["totals"], record["cost"]["per_1000_pairs"]
    notes = "\n".join(f"- {n}" for n in record["notes"])
    lines = []
    for own in record["agreement"]:
        figures = {**own["order"], **(own["binary"] or {}), **(own["graded"] or {})}
        lines += [f"| {own['signal']} | {n} | {_interval(figures[n])} |" for n in _FIGURES if figures.get(n)]
    agreement = (
        "\n## Agreement with people\n\nIntervals (95 %) draw queries.\n\n| signal | figure | |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
        if lines
        else ""
    )
    return f"""---
pretty_name: judgments made by tamis
tags: [tamis, retrieval, judgments]
configs:
- config_name: default
  data_files: [{{split: train, path: data/*.parquet}}]
- config_name: queries
  data_files: [{{split: train, path: queries/*.parquet}}]
---

# Judgments by a language model

{totals["labels"]:,} labels of (query, document) pairs for {totals["queries"]:,} queries, by {record["models"]["judge"]["name"]}
(revision {record["models"]["judge"]["revision"]}), method {record["method"]["name"]}. {totals["unreadable"]:,} pairs have a status and no label,
{totals["unasked"]:,} were not asked. Cost for 1,000 pairs: {each["prompt_tokens"]:,.0f} prompt tokens, {each["completion_tokens"]:,.0f} answer
tokens, {each["seconds"]:,.1f} seconds.

Labels by models are not labels by people: look at the agreement, and keep the two apart (`label_source`, `annotator`).
{agreement}
{("## Notes" + chr(10) + chr(10) + notes + chr(10)) if notes else ""}
Made by `tamis label`; `report.html` shows it, `manifest.json` says with what settings.
"""


def planned_lines(plan: Mapping[str, Any]) -> list[str]:
    """What a dry run says."""
    totals = plan["totals"]
    about = "" if totals["exact"] else "about "
    lines = [
        f"would judge {totals['pairs']:,} pairs of {totals['queries']:,} queries with {plan['judge']}, method {plan['method']}",
        f"{about}{totals['requests']:,} questions, {about}{totals['prompt_tokens']:,} prompt tokens and at most "
        f"{about}{totals['completion_tokens']:,} answer tokens",
    ]
    if plan["price"] is not None:
        lines.append(f"price: {about}{plan['price']:,.4f}")
    if "seconds" in totals:
        lines.append(f"time: about {_time(totals['seconds'])} of one worker on this machine")
    return lines


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def result_lines(config: LabelConfig, result: LabelResult) -> list[str]:
    """What a run says."""
    if not result.manifest:
        return [f"{result.state}:"]
    totals = result.manifest["totals"]
    lines = [
        f"{result.state}: {totals['labels']:,} labels of {totals['candidates']:,} pairs, {totals['queries']:,} queries"
    ]
    if totals.get("unreadable"):
        statuses = ", ".join(
            f"{n:,} {name}" for name, n in result.manifest["statuses"].items() if name not in READABLE
        )
        lines.append(f"without a label: {statuses}")
    for own in result.manifest["agreement"]:
        figures = {**own["order"], **(own["binary"] or {})}
        said = [f"{n} {_interval(figures[n])}" for n in ("auc", "kappa") if figures.get(n)]
        if said:
            lines.append(f"{own['signal']} against people: {', '.join(said)} ({own['pairs']:,} pairs)")
    lines.append(f"report: {config.output.rstrip('/')}/report.html")
    return lines
