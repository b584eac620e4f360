"""sentence-transformers: columns of texts, told by their order; label and score columns, told by their names.

The layouts are those its hard-negative miner writes: pair (anchor, positive), triplet, n-tuple (anchor, positive,
negative_1 ... negative_n), labeled-pair (anchor, passage, label) and labeled-list (anchor, passages, labels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.training.shards import ShardListing, ShardReader, list_shards
from schemas.columns import is_text
from schemas.errors import InputError
from transforms.retrieval.collection import DeadLine, RetrievalData
from transforms.retrieval.formats.base import (
    ExportData,
    Exported,
    ExportOptions,
    Format,
    ImportOptions,
    Source,
)
from transforms.retrieval.formats.rows import GivenDocument, GivenRow, OutRow, collect, out_rows
from transforms.shards.files import Folder

LAYOUTS = ("pair", "triplet", "n-tuple", "labeled-pair", "labeled-list")
LABELS = ("label", "labels", "score", "scores")
_ANCHORS = ("anchor", "query", "question", "sentence1", "premise")
_SECONDS = ("positive", "answer", "sentence2", "passage", "passages", "docs", "documents", "hypothesis")
_BATCH = 1024


def recognises(source: Source) -> bool:
    """Files whose first two columns have names such data often have; any others need `--format`."""
    try:
        listing = list_shards(source.url, options=dict(source.folder.options))
        schema = _schema(listing)
    except InputError:
        return False
    if schema is None or len(schema.names) < 2:
        return False
    texts = [n for n in schema.names if n not in LABELS]
    return len(texts) >= 2 and texts[0] in _ANCHORS and texts[1] in _SECONDS


def read(source: Source, options: ImportOptions) -> RetrievalData:
    """Read columns.

    Raises:
        InputError: Fewer than two columns of text, or a label column that does not fit them.
    """
    listing = list_shards(source.url, options=dict(source.folder.options))
    schema = _schema(listing)
    if schema is None:
        raise InputError(f"{source.url} holds no rows")
    columns = [n for n in schema.names if n not in LABELS]
    label = next((n for n in schema.names if n in LABELS), None)
    _check(schema, columns, label, source.url)
    lists = not is_text(schema.field(columns[1]).type)

    def rows(dead: list[DeadLine] | None) -> Iterator[GivenRow]:
        for batch in ShardReader(listing, batch_rows=_BATCH):
            for row in batch.to_pylist():
                yield _row(row, columns, label, lists)

    data = collect(rows, options, signal="given_positive" if label is None or not lists else "teacher_score")
    return data


def _row(row: dict[str, Any], columns: Sequence[str], label: str | None, lists: bool) -> GivenRow:
    anchor = row[columns[0]]
    if lists:
        values = row[label] if label is not None else [None] * len(row[columns[1]])
        judged = [_judged(t, v) for t, v in zip(row[columns[1]], values, strict=True)]
        return GivenRow(anchor, judged=judged)
    texts = [row[c] for c in columns[1:] if row[c] is not None]
    value = row[label] if label is not None else None
    if label is not None and len(columns) == 2 and not isinstance(value, list):
        return GivenRow(anchor, judged=[_judged(texts[0], value)])
    scores = value if isinstance(value, list) and len(value) == len(texts) else [None] * len(texts)
    documents = [GivenDocument(None, t, score=s) for t, s in zip(texts, scores, strict=True)]
    return GivenRow(anchor, documents[:1], documents[1:])


def _judged(text: str, value: Any) -> GivenDocument:
    """A whole number is a grade; any other a value."""
    if value is None or isinstance(value, bool | int):
        return GivenDocument(None, text, grade=None if value is None else int(value))
    return GivenDocument(None, text, score=float(value))


def write(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """train.parquet in a layout; default n-tuple where there are negatives, else pair.

    Raises:
        InputError: No such layout, or one that needs negatives and finds none.
    """
    done = Exported()
    layout = options.layout
    rows = list(out_rows(export, options, done))
    if layout is None:
        layout = "n-tuple" if any(r.negatives for r in rows) else "pair"
    if layout not in LAYOUTS:
        raise InputError(f"no layout '{layout}'; there are {', '.join(LAYOUTS)}")
    table, lost = _LAYOUTS[layout](rows, options)
    if not table.num_rows:
        raise InputError(
            f"layout '{layout}' needs a negative for each positive: pass --pool, or --layout pair"
        )
    done.lost += lost
    with folder.publish("train.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")
    done.files["train.parquet"] = table.num_rows
    return done


def _pairs(rows: Sequence[OutRow], options: ExportOptions) -> tuple[pa.Table, list[str]]:
    found = [(r.query, p.joined) for r in rows for p in r.positives]
    lost = ["all negatives"] if any(r.negatives for r in rows) else []
    return _texts(found, ["anchor", "positive"]), lost


def _triplets(rows: Sequence[OutRow], options: ExportOptions) -> tuple[pa.Table, list[str]]:
    found = [(r.query, p.joined, n.joined) for r in rows for p in r.positives for n in r.negatives]
    return _texts(found, ["anchor", "positive", "negative"]), _unpaired(rows, 1)


def _tuples(rows: Sequence[OutRow], options: ExportOptions) -> tuple[pa.Table, list[str]]:
    """Every row has the same number of negatives, as its readers want: that of the poorest query, or as asked."""
    some = [len(r.negatives) for r in rows if r.negatives]
    width = options.negatives or (min(some) if some else 0)
    if not width:
        return _texts([], ["anchor", "positive"]), []
    found = [
        (r.query, p.joined, *(n.joined for n in r.negatives[:width]))
        for r in rows
        if len(r.negatives) >= width
        for p in r.positives
    ]
    lost = _unpaired(rows, width)
    if over := sum(max(0, len(r.negatives) - width) for r in rows if len(r.negatives) >= width):
        lost.append(f"{over:,} negatives beyond the {width} every row has")
    return _texts(found, ["anchor", "positive", *(f"negative_{i}" for i in range(1, width + 1))]), lost


def _labeled_pairs(rows: Sequence[OutRow], options: ExportOptions) -> tuple[pa.Table, list[str]]:
    found = [(r.query, d.joined, g) for r in rows for d, g in _graded(r)]
    table = pa.table(
        {
            "anchor": pa.array([f[0] for f in found], pa.string()),
            "passage": pa.array([f[1] for f in found], pa.string()),
            "label": pa.array([f[2] for f in found], pa.int64()),
        }
    )
    return table, _unjudged(rows)


def _labeled_lists(rows: Sequence[OutRow], options: ExportOptions) -> tuple[pa.Table, list[str]]:
    graded = [(r.query, list(_graded(r))) for r in rows]
    table = pa.table(
        {
            "anchor": pa.array([q for q, _ in graded], pa.string()),
            "passages": pa.array([[d.joined for d, _ in g] for _, g in graded], pa.list_(pa.string())),
            "labels": pa.array([[x for _, x in g] for _, g in graded], pa.list_(pa.int64())),
        }
    )
    return table, _unjudged(rows)


_LAYOUTS = {
    "pair": _pairs,
    "triplet": _triplets,
    "n-tuple": _tuples,
    "labeled-pair": _labeled_pairs,
    "labeled-list": _labeled_lists,
}


def _graded(row: OutRow) -> Iterator[tuple[Any, int]]:
    for document in row.positives:
        yield document, 1 if document.grade is None else document.grade
    for document in row.negatives:
        yield document, 0 if document.grade is None else document.grade


def _texts(found: Sequence[tuple[Any, ...]], names: Sequence[str]) -> pa.Table:
    return pa.table({n: pa.array([f[i] for f in found], pa.string()) for i, n in enumerate(names)})


def _unpaired(rows: Sequence[OutRow], width: int) -> list[str]:
    few = sum(len(r.negatives) < width for r in rows)
    return [f"{few:,} queries with fewer than {width} negatives"] if few else []


def _unjudged(rows: Sequence[OutRow]) -> list[str]:
    n = sum(d.grade is None for r in rows for d in r.negatives)
    return [f"that {n:,} candidates were never judged: they are labelled 0"] if n else []


def _schema(listing: ShardListing) -> pa.Schema | None:
    batch = next(iter(ShardReader(listing, batch_rows=1)), None)
    return batch.schema if batch is not None else None


def _check(schema: pa.Schema, columns: Sequence[str], label: str | None, where: str) -> None:
    if len(columns) < 2 or not is_text(schema.field(columns[0]).type):
        raise InputError(f"{where}: not columns of texts (columns: {', '.join(schema.names)})")
    second = schema.field(columns[1]).type
    if is_text(second):
        bad = next((c for c in columns[2:] if not is_text(schema.field(c).type)), None)
        if bad is not None:
            raise InputError(f"{where}: column '{bad}' is {schema.field(bad).type}, not text")
        return
    if not (pa.types.is_list(second) or pa.types.is_large_list(second)) or not is_text(second.value_type):
        raise InputError(f"{where}: column '{columns[1]}' is {second}, neither text nor lists of texts")
    if label is None:
        raise InputError(f"{where}: lists of texts need a column labels or scores")


FORMAT = Format(
    "sentence-transformers",
    "sentence-transformers columns",
    recognises,
    read,
    write,
    frozenset({"positives", "rank", "pool", "queries", "documents"}),
    True,
)
