"""The last phase of `tamis label`: the engine's labels as judgments, queries with what was found out, figures, page."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import polars as pl
import pyarrow as pa

from models.metrics.bootstrap import mean_interval
from pipelines.retrieval.corpus import documents_in
from pipelines.retrieval.folder import TableFolder
from schemas.errors import TamisError
from schemas.judgments import DOCUMENT_SCHEMA, QUERY_SCHEMA, READABLE
from schemas.pools import POOL_SCHEMA
from transforms.retrieval.agreement import (
    How,
    as_json,
    binary_figures,
    by_query,
    graded_figures,
    order_figures,
    paired,
)
from transforms.retrieval.collection import frame
from transforms.retrieval.labelling.calibrate import Platt, calibrate, fit_platt
from transforms.retrieval.labelling.method import method_options
from transforms.retrieval.labelling.rows import LABEL_SCHEMA
from transforms.retrieval.unify import PositiveRule

if TYPE_CHECKING:
    from pipelines.label import Parts, Task
    from pipelines.label_config import LabelConfig

DEAD_SCHEMA = pa.schema(
    [pa.field("query_id", pa.string()), pa.field("stage", pa.string()), pa.field("error", pa.string())]
)
# Methods whose value slope and bias make a probability of.
CALIBRATES = ("yes_no", "likelihood")


@dataclass
class Seen:
    """What the figures and the page need of the labels as they go by.

    Attributes:
        rows: query_id, doc_id, the label and the status of every row: no text.
        examples: Whole rows to show.
        facts: query_id -> what was found out about it.
        unasked: query_id -> documents the budget had no room for.
    """

    rows: list[pl.DataFrame] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    unasked: dict[str, list[str]] = field(default_factory=dict)

    def all(self) -> pl.DataFrame:
        """Every row."""
        return pl.concat(self.rows) if self.rows else pl.DataFrame(schema=dict.fromkeys(_SLIM, pl.String))


_SLIM = (
    "query_id", "doc_id", "signal", "grade", "binary", "value", "rank", "parse_status", "truncated", "probability",
    "known_query", "target_model",
)  # fmt: skip


def finish(
    config: LabelConfig, parts: Parts, task: Task, out: TableFolder, engine: dict[str, Any]
) -> dict[str, Any]:
    """Write the output's tables and close it.

    Returns:
        The manifest.
    """
    from pipelines.label import price, shards
    from pipelines.retrieval import label_page

    platt = _fit(config, parts, task, out) if config.calibrate_on else None
    seen = Seen()
    written = 0
    for number, (_, ids, labels, facts) in enumerate(shards(out.folder)):
        rows = _rows(labels, platt, parts)
        written += out.write("data", f"judgments-{number:05d}.parquet", rows, LABEL_SCHEMA)
        for query_id, found in zip(ids, facts, strict=True):
            seen.facts[query_id] = {"known_to": found["known_to"], "facts": found["facts"]}
            if found["unasked"]:
                seen.unasked[query_id] = found["unasked"]
        slim = frame(rows).select(_SLIM)
        seen.rows.append(slim)
        room = label_page.EXAMPLES * 8 - len(seen.examples)
        seen.examples += rows.slice(0, max(0, room)).to_pylist()
    dead = _dead(out)
    if dead.num_rows:
        out.write("dead", "queries.parquet", dead, DEAD_SCHEMA)
    queries = _queries(task, seen)
    out.write("queries", "queries.parquet", queries, QUERY_SCHEMA)
    out.write("pool", "pool.parquet", _pool(task), POOL_SCHEMA)
    if config.documents == "pooled":
        assert task.data.documents is not None
        out.write(
            "corpus",
            "part-00000.parquet",
            documents_in(task.planned.documents, task.data.documents),
            DOCUMENT_SCHEMA,
        )
    every = seen.all()
    counters = engine.get("counters", {})
    unasked = sum(map(len, seen.unasked.values()))
    readable = int(every["parse_status"].is_in(list(READABLE)).sum()) if every.height else 0
    totals = {
        "pairs": written,
        "queries": task.planned.table.num_rows,
        "candidates": task.planned.candidates,
        "labels": readable,
        "unreadable": every.height - readable,
        "unasked": unasked,
        "queries_failed": dead.num_rows,
        "known_queries": sum(bool(f["known_to"]) for f in seen.facts.values()),
    }
    cost = _cost(config, counters, price)
    notes = [*parts.notes, *task.notes, *_notes(config, totals, platt), *_windows(seen)]
    record: dict[str, Any] = {
        "totals": totals,
        "notes": notes,
        "method": {
            "name": parts.method.name,
            "signal_class": parts.method.signal_class,
            "version": parts.method.version,
            "options": method_options(parts.method),
        },
        "models": {role: asdict(info) for role, info in zip(("judge", "reader"), parts.models, strict=False)},
        "exactness": _exactness(parts),
        "prompts": {role: prompt.tag for role, prompt in parts.prompts.items()},
        "statuses": dict(sorted(Counter(every["parse_status"].to_list()).items())) if every.height else {},
        "cost": cost,
        "budget": {"tokens": config.budget_tokens, "spent": cost["tokens_spent"]}
        if config.budget_tokens
        else None,
        "calibration": platt.as_dict() if platt else None,
        "positives": _positives(every),
        "agreement": _agreement(every, task.human, platt),
        "corpus": config.corpus or ", ".join(config.pools),
        "counters": counters,
    }
    view = {**record, "config": out.config, "job": "label"}
    out.write_text("report.html", label_page.render(view, seen, task))
    out.write_text("README.md", label_page.card(view))
    return out.finish(record.pop("totals"), **record)


def _rows(labels: list[list[dict[str, Any]]], platt: Platt | None, parts: Parts) -> pa.Table:
    table = pa.Table.from_pylist([row for own in labels for row in own], schema=LABEL_SCHEMA)
    if platt is None or not table.num_rows:
        return table
    done = calibrate(frame(table), platt, getattr(parts.method, "threshold", 0.5))
    return done.to_arrow().cast(LABEL_SCHEMA)


def _fit(config: LabelConfig, parts: Parts, task: Task, out: TableFolder) -> Platt:
    """Slope and bias from the pairs of this run that people labelled in `--calibrate-on`."""
    from pipelines.label import shards
    from pipelines.retrieval.inputs import read_all

    if parts.method.name not in CALIBRATES:
        raise TamisError(
            f"--calibrate-on: method {parts.method.name} gives no value to calibrate; use {', '.join(CALIBRATES)}"
        )
    assert config.calibrate_on is not None
    labels = frame(
        read_all(
            (config.calibrate_on,), corpus_source=config.corpus_source, options=config.storage_options
        ).judgments
    )
    human = labels.filter(pl.col("label_source") == "human")
    values = pl.concat(
        [
            pl.DataFrame(
                [{k: row[k] for k in ("query_id", "doc_id", "grade", "value", "rank")} for own in found for row in own],
                schema={
                    "query_id": pl.String, "doc_id": pl.String, "grade": pl.Int32, "value": pl.Float64, "rank": pl.Int32,
                },
            )
            for _, _, found, _ in shards(out.folder)
        ]
    ).filter(pl.col("value").is_not_null())  # fmt: skip
    judged = values.with_columns((pl.col("value") > 0).alias("positive"))
    pairs, _ = paired(judged, _best(human), "auto")
    return fit_platt(
        pairs["value_a"].to_numpy(),
        pairs["positive_b"].to_numpy(),
        tuple(sorted(pairs["query_id"].unique().to_list())),
    )


def _best(human: pl.DataFrame) -> pl.DataFrame:
    """One label a pair of what people said: the best."""
    return (
        human.with_columns(PositiveRule().expression())
        .filter(pl.col("positive").is_not_null())
        .group_by("query_id", "doc_id", maintain_order=True)
        .agg(pl.col("grade").max(), pl.col("value").max(), pl.col("rank").min(), pl.col("positive").max())
    )


def _dead(out: TableFolder) -> pa.Table:
    """Queries the method failed on as a whole."""
    from pipelines.label import RUN
    from pipelines.report.output import Output

    done = Output(f"{out.folder.url.rstrip('/')}/{RUN}", out.folder.options)
    rows = [
        {"query_id": row.get("id"), "stage": row.get("stage"), "error": row.get("error")}
        for name in done.files("dead")
        for batch in done.read(name)
        for row in batch.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=DEAD_SCHEMA)


def _queries(task: Task, seen: Seen) -> pa.Table:
    """The planned queries, with the readers that know them and what else was found out."""
    given = {q["query_id"]: q for q in task.data.queries.to_pylist()}
    rows = []
    for query_id in task.planned.queries:
        query = given[query_id]
        found = seen.facts.get(query_id, {"known_to": [], "facts": {}})
        extra = orjson.loads(query["extra"]) if query["extra"] else {}
        extra |= found["facts"]
        if query_id in seen.unasked:
            extra["unasked"] = len(seen.unasked[query_id])
        known = sorted({*(query["known_to"] or []), *found["known_to"]})
        rows.append(
            {
                "query_id": query_id,
                "text": query["text"],
                "known_to": known or None,
                "extra": orjson.dumps(extra, option=orjson.OPT_SORT_KEYS).decode() if extra else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)


def _pool(task: Task) -> pa.Table:
    """The pool's rows of the planned queries."""
    pool = frame(task.data.pool)
    return pool.filter(pl.col("query_id").is_in(list(task.planned.queries))).to_arrow().cast(POOL_SCHEMA)


def _cost(config: LabelConfig, counters: dict[str, int], price: Any) -> dict[str, Any]:
    """What was asked in the runs this output is made of; answers another output's cache held cost nothing here."""
    asked = counters.get("label.asked", 0)
    tokens_in, tokens_out = counters.get("label.tokens_in", 0), counters.get("label.tokens_out", 0)
    pairs = counters.get("label.pairs", 0)
    milliseconds = counters.get("LabelCandidates.ms", 0)
    paid = price(config, tokens_in, tokens_out)
    each = 1000 / pairs if pairs else 0.0
    return {
        "requests": counters.get("label.requests", 0),
        "asked": asked,
        "from_cache": counters.get("label.cache_hits", 0),
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "tokens_spent": tokens_in + tokens_out,
        "seconds": milliseconds / 1000,
        "price": paid,
        "per_1000_pairs": {
            "prompt_tokens": tokens_in * each,
            "completion_tokens": tokens_out * each,
            "seconds": milliseconds / 1000 * each,
            "price": None if paid is None else paid * each,
        },
    }


def _notes(config: LabelConfig, totals: dict[str, int], platt: Platt | None) -> list[str]:
    notes = []
    if totals["unasked"]:
        notes.append(
            f"{totals['unasked']:,} pairs were not judged: the budget of {config.budget_tokens:,} tokens is spent; the same "
            "command with a larger --budget-tokens goes on"
        )
    if totals["unreadable"]:
        notes.append(f"{totals['unreadable']:,} pairs have no label (column parse_status says why)")
    if totals["queries_failed"]:
        notes.append(f"{totals['queries_failed']:,} queries failed as a whole; see dead/")
    if platt is not None and platt.slope == 0.0:
        notes.append(
            "the judge's order is upside down on the pairs it was calibrated on: calibrated, it tells nothing; "
            "use another judge"
        )
    return notes


def _windows(seen: Seen) -> list[str]:
    """What the reader should know of lists that were too long to be shown at once."""
    shown = [n for found in seen.facts.values() if (n := found["facts"].get("windows", 1)) > 1]
    if not shown:
        return []
    return [f"{len(shown):,} lists were shown in windows (up to {max(shown)} a list; see the queries' extra)"]


def _exactness(parts: Parts) -> str:
    """What may be relied on when the same pair is judged in other company."""
    if any(m.name.startswith("openai:") for m in (parts.judge, parts.reader) if m):
        return "a server's answers: as the server gives them, kept in the request cache"
    options = dict(parts.judge.options)
    if options.get("device", "auto") in ("cpu", "auto"):
        return "on a CPU with row-independent kernels the same bit for bit in any company; else up to floating point"
    return "exact up to floating point: batching on an accelerator changes last bits"


def _positives(rows: pl.DataFrame) -> dict[str, Any] | None:
    """Positives a query, where labels say so (grade of 1 or more, yes, value above 0)."""
    if not rows.height:
        return None
    found = rows.filter(pl.col("parse_status").is_in(list(READABLE))).with_columns(
        PositiveRule().expression()
    )
    if not found["positive"].is_not_null().any():
        return None
    counts = found.group_by("query_id").agg(pl.col("positive").fill_null(False).sum().alias("n"))
    mean = mean_interval(counts.sort("query_id")["n"].cast(pl.Float64).to_list())
    return {
        "mean": mean.as_dict(),
        "queries_without": int((counts["n"] == 0).sum()),
        "by_count": {str(k): v for k, v in sorted(Counter(counts["n"].to_list()).items())},
    }


def _agreement(rows: pl.DataFrame, human: pl.DataFrame, platt: Platt | None) -> list[dict[str, Any]]:
    """How far the labels agree with people's, by signal; queries the judge was calibrated on are left out."""
    if not rows.height or not human.height:
        return []
    held = _best(human)
    if platt is not None:
        held = held.filter(~pl.col("query_id").is_in(list(platt.queries)))
    found = []
    for (signal,), own in rows.group_by(["signal"], maintain_order=True):
        readable = own.filter(pl.col("parse_status").is_in(list(READABLE)))
        labelled = readable.with_columns(PositiveRule().expression())
        if (
            not labelled.height
            or labelled["doc_id"].len() != labelled.select("query_id", "doc_id").n_unique()
        ):
            continue  # several labels a pair (contexts): `tamis judgments agree` says how they merge
        # Where a label is an order only, agreement of yes and no means nothing, and the order still does.
        says = bool(labelled["grade"].is_not_null().any() or labelled["binary"].is_not_null().any())
        pairs, as_negative = paired(labelled.with_columns(pl.col("positive").fill_null(False)), held, "auto")
        if not pairs.height:
            continue
        how = How()
        found.append(
            {
                "signal": signal,
                "pairs": pairs.height,
                "queries": pairs["query_id"].n_unique(),
                "human_positives": int(pairs["positive_b"].sum()),
                "unjudged_as_negative": as_negative,
                "order": as_json(order_figures(pairs, how)),
                "binary": as_json(binary_figures(by_query(pairs), how)) if says else None,
                "graded": as_json(graded_figures(pairs, how))
                if labelled["grade"].is_not_null().any()
                else None,
            }
        )
    return found
