"""What the training formats share: rows of a query with its positives and negatives, in and out.

Their negatives are mostly mined, seldom judged, so they come in as candidates; their texts stand in the rows, so that a
document is known by its id where it has one, else by its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.judgments import QUERY_SCHEMA
from transforms.retrieval.collection import (
    DeadLine,
    RetrievalData,
    document_batches,
    frame,
    pick_documents,
)
from transforms.retrieval.formats.base import ExportData, Exported, ExportOptions, ImportOptions, pool_table
from transforms.retrieval.formats.lines import text_id

QUERIES_AT_ONCE = 20_000


@dataclass(frozen=True)
class GivenDocument:
    """A document of a row; `text` None where the row names it by id only."""

    doc_id: str | None
    text: str | None
    title: str | None = None
    score: float | None = None
    grade: int | None = None

    @property
    def key(self) -> str:
        """Its id, or one made of its text."""
        return self.doc_id or text_id(self.text or "", self.title or "", kind="d")


@dataclass(frozen=True)
class GivenRow:
    """A row of a training file.

    Attributes:
        query: Its text.
        query_id: Its id; None: one made of its text.
        positives: Best first.
        negatives: Hardest first.
        judged: Documents with a grade or value of their own, neither positive nor negative by their place.
        extra: What else the row said, for the query.
    """

    query: str | None
    positives: Sequence[GivenDocument] = ()
    negatives: Sequence[GivenDocument] = ()
    judged: Sequence[GivenDocument] = ()
    query_id: str | None = None
    extra: str | None = None

    @property
    def key(self) -> str:
        """The query's id, or one made of its text."""
        return self.query_id or text_id(self.query or "", kind="q")


Rows = Callable[[list[DeadLine] | None], Iterator[GivenRow]]


def collect(rows: Rows, options: ImportOptions, *, signal: str, label_source: str = "human") -> RetrievalData:
    """Rows as a collection.

    Args:
        rows: Gives them, as often as asked; unreadable lines go to the list, the first time.
        options: What they cannot say of themselves.
        signal: What their labels are.
        label_source: Who gave them, where the options do not say.
    """
    data = RetrievalData()
    labels: dict[str, list[Any]] = {
        k: [] for k in ("query_id", "doc_id", "grade", "binary", "value", "rank", "split")
    }
    pool: dict[str, list[Any]] = {k: [] for k in ("query_id", "doc_id", "source", "rank", "score")}
    queries: dict[str, dict[str, Any]] = {}
    places: Counter[tuple[str, str]] = Counter()
    seen: set[tuple[str, str]] = set()
    has_texts = False
    split = options.splits[0] if len(options.splits) == 1 else None

    def label(query: str, document: GivenDocument, grade: int | None, rank: int | None) -> None:
        if (query, document.key) in seen:
            return
        seen.add((query, document.key))
        values = (query, document.key, grade, None, document.score, rank, split)
        for name, value in zip(labels, values, strict=True):
            labels[name].append(value)

    for row in rows(data.dead):
        query = row.key
        known = queries.get(query)
        if known is None or known["text"] is None:
            queries[query] = {"query_id": query, "text": row.query, "known_to": None, "extra": row.extra}
        has_texts = has_texts or any(
            d.text is not None for d in (*row.positives, *row.negatives, *row.judged)
        )
        for document in row.positives:
            if (query, document.key) not in seen:
                places[query, "+"] += 1
            label(query, document, 1 if document.grade is None else document.grade, places[query, "+"])
        for document in row.judged:
            label(query, document, document.grade, None)
        for document in row.negatives:
            if options.negatives == "judged":
                label(query, document, 0, None)
                continue
            if (query, f"-{document.key}") in seen:
                continue
            seen.add((query, f"-{document.key}"))
            places[query, "-"] += 1
            values = (query, document.key, options.run_tag, places[query, "-"], document.score)
            for name, value in zip(pool, values, strict=True):
                pool[name].append(value)
    data.judgments = options.judgments(labels, signal, label_source)
    data.pool = pool_table(pool)
    data.queries = pa.Table.from_pylist(list(queries.values()), schema=QUERY_SCHEMA)
    if has_texts:

        def documents() -> Iterator[pa.RecordBatch]:
            yield from document_batches(_distinct(rows))

        data.documents = documents
    return data


def _distinct(rows: Rows) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for row in rows(None):
        for document in (*row.positives, *row.negatives, *row.judged):
            if document.text is not None and document.key not in seen:
                seen.add(document.key)
                yield {"doc_id": document.key, "title": document.title, "text": document.text}


@dataclass(frozen=True)
class OutDocument:
    """A document of a row to be written."""

    doc_id: str
    title: str | None
    text: str | None
    score: float | None
    grade: int | None

    @property
    def joined(self) -> str:
        """Title and text with one space between."""
        return f"{self.title} {self.text}" if self.title else self.text or ""


@dataclass
class OutRow:
    """A query to be written: positives best first, negatives hardest first."""

    query_id: str
    query: str | None
    extra: str | None
    positives: list[OutDocument] = field(default_factory=list)
    negatives: list[OutDocument] = field(default_factory=list)


def out_rows(
    export: ExportData, options: ExportOptions, done: Exported, *, texts: bool = True
) -> Iterator[OutRow]:
    """Rows to be written, queries without a positive left out and counted.

    Args:
        export: What is to be written.
        options: How.
        done: Where what was lost is said.
        texts: Whether texts are needed; documents without are then left out, and counted.
    """
    query_texts = export.query_texts() if texts else {}
    extras = dict(
        zip(
            export.data.queries["query_id"].to_pylist(),
            export.data.queries["extra"].to_pylist(),
            strict=True,
        )
    )
    order = export.labels["query_id"].unique(maintain_order=True).to_list()
    negatives = _negatives(export, options)
    without = unread = 0
    for start in range(0, len(order), QUERIES_AT_ONCE):
        block = pl.DataFrame({"query_id": order[start : start + QUERIES_AT_ONCE]})
        own = export.labels.filter(pl.col("positive").fill_null(False)).join(block, on="query_id", how="semi")
        against = negatives.join(block, on="query_id", how="semi")
        found: dict[str, tuple[str | None, str | None]] = {}
        if texts and export.data.documents is not None:
            ids = set(own["doc_id"]) | set(against["doc_id"])
            picked = pick_documents(export.data.documents, ids).select("doc_id", "title", "text")
            found = {d: (title, text) for d, title, text in picked.iter_rows()}
        rows = {q: OutRow(q, query_texts.get(q), extras.get(q)) for q in block["query_id"]}
        for part, name, score in ((own, "positives", "value"), (against, "negatives", "score")):
            for query, doc, value, grade in part.select("query_id", "doc_id", score, "grade").iter_rows():
                title, text = found.get(doc, (None, None))
                if texts and text is None:
                    unread += 1
                    continue
                getattr(rows[query], name).append(OutDocument(doc, title, text, value, grade))
        for row in rows.values():
            if row.positives:
                yield row
            else:
                without += 1
    if without:
        done.lost.append(f"{without:,} queries without a positive")
    if unread:
        done.lost.append(f"{unread:,} documents without a text")


def _negatives(export: ExportData, options: ExportOptions) -> pl.DataFrame:
    """Judged negatives and candidates that are no positives, by rank; one row a document."""
    labels = export.labels
    judged = labels.filter(pl.col("positive").not_().fill_null(False) & (pl.col("grade") <= 0)).select(
        "query_id",
        "doc_id",
        pl.col("pool_rank").cast(pl.Int32).alias("rank"),
        pl.col("value").alias("score"),
        "grade",
    )
    pool = frame(export.data.pool).join(
        labels.select("query_id", "doc_id"), on=["query_id", "doc_id"], how="anti"
    )
    found = pool.select("query_id", "doc_id", "rank", "score", pl.lit(None, pl.Int32).alias("grade"))
    both = pl.concat([judged, found]).with_row_index("_row")
    both = both.sort("query_id", "rank", "_row", nulls_last=True, maintain_order=True)
    both = both.unique(["query_id", "doc_id"], keep="first", maintain_order=True)
    if options.negatives is not None:
        both = both.filter(pl.int_range(pl.len()).over("query_id") < options.negatives)
    return both
