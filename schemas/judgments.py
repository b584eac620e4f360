"""Judgments: one row for each label somebody or something gave a pair of a query and a document.

A table of labels, not of training pairs: who judged, for which reader, seeing what, by which prompt, and how well the
reply could be read stay with every label, so that labels of different annotators or different target models can be kept
apart for as long as nobody says how to merge them. Queries stand in a table of their own, because a query all of whose
labels are negative (the model needs no document to answer it) is a finding and must not vanish with its positives.

The columns are those of a label taxonomy with four quadrants: `target_model` null or set (does the label hold for
any reader, or for one), `context_ids` empty or not (was the document judged by itself, or beside others).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError
from schemas.fingerprint import fingerprint

LABEL_SOURCES = ("human", "llm")
# What the signal is made of. A: what a judge says. B: attention, or other reader internals. C: likelihood of a gold
# answer. D: a downstream metric of the reader's answer (has_answer, exact match, F1). Null: a human label.
SIGNAL_CLASSES = ("A", "B", "C", "D")
# `ok`: the reply was read as it stands; `repaired`: read after mending or asking again. Of all others there is a row
# (it was paid for, and it says what the judge does), but never a label.
READABLE = ("ok", "repaired")
PARSE_STATUSES = (*READABLE, "unparseable", "refused", "empty", "error", "too_long")

JUDGMENT_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("grade", pa.int32()),  # graded relevance or utility, 0 = none; null where there is no grade
        pa.field("binary", pa.bool_()),  # a yes or no; null where the label is a grade or a value only
        pa.field(
            "value", pa.float64()
        ),  # the signal itself: gain, log-likelihood gain, score; may be negative
        pa.field("rank", pa.int32()),  # 1 = best, in the order the annotator gave; null where it gave none
        pa.field("label_source", pa.string(), nullable=False),  # human | llm
        pa.field(
            "annotator", pa.string(), nullable=False
        ),  # name@revision of the judge; who, where people judged
        pa.field("target_model", pa.string()),  # reader the label holds for; null = for any
        pa.field(
            "signal", pa.string(), nullable=False
        ),  # qrels, graded, relsel, utilsel, yes_no, answer_gain, ...
        pa.field("signal_class", pa.string()),  # A | B | C | D
        pa.field(
            "context_ids", pa.list_(pa.string())
        ),  # documents already in context, in order; empty = none
        pa.field("context_hash", pa.string()),  # of context_ids; null where that is empty
        pa.field("state_id", pa.string()),  # trace state the document was judged in (agents)
        pa.field("pseudo_answer_id", pa.string()),  # answer the judge was shown for reference
        pa.field("known_query", pa.bool_()),  # the target model answers the query with no document
        pa.field("pool_source", pa.string()),  # retriever that put the document up for judgment
        pa.field("pool_rank", pa.int32()),  # its rank there, 1 = best
        pa.field("parse_status", pa.string(), nullable=False),  # see PARSE_STATUSES
        pa.field("prompt_hash", pa.string()),  # name@hash of the prompt
        pa.field("votes", pa.int32()),  # readings merged into this label (permuted orders, samples)
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("split", pa.string()),  # train, dev, test: the part of the collection it belongs to
    ]
)
REQUIRED = ("query_id", "doc_id")
# What makes two rows the same label given twice, rather than two labels.
LABEL_KEY = (
    "query_id", "doc_id", "label_source", "annotator", "target_model", "signal", "context_hash", "state_id",
    "prompt_hash", "split",
)  # fmt: skip
# What makes two labels the work of the same annotator on the same question: a label set. Sets never merge unasked.
SET_KEY = ("label_source", "annotator", "target_model", "signal")

QUERY_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("known_to", pa.list_(pa.string())),  # target models that answer it with no document
        pa.field("extra", pa.string()),  # JSON object: whatever else its source said of it
    ]
)

DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field(
            "base_id", pa.string()
        ),  # shared by the copies of one document (human text and its rewrites)
        pa.field("source", pa.string()),  # who wrote this copy: human, a model's name
        pa.field("extra", pa.string()),  # JSON object: whatever else its source said of it
    ]
)


def context_hash(context_ids: Sequence[str] | None) -> str | None:
    """Name a context by its documents, in order; None where there are none (the label is independent of context)."""
    return fingerprint(*context_ids) if context_ids else None


def judgment_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a judgment table; what a row leaves out is null, an empty context, or readable (`parse_status` ok).

    Args:
        rows: At least query_id and doc_id, label_source, annotator and signal.

    Raises:
        InputError: A row names an unknown column or breaks a rule of `check_judgments`.
    """
    known = set(JUDGMENT_SCHEMA.names)
    complete = []
    for row in rows:
        strange = row.keys() - known
        if strange:
            raise InputError(f"no column '{min(strange)}' in judgments (columns: {', '.join(known)})")
        context = list(row.get("context_ids") or ())
        complete.append(
            {"parse_status": "ok", **row, "context_ids": context, "context_hash": context_hash(context)}
        )
    try:
        table = pa.Table.from_pylist(complete, schema=JUDGMENT_SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"a judgment does not fit its columns ({error})") from error
    check_judgments(table)
    return table


def conform(table: pa.Table, schema: pa.Schema = JUDGMENT_SCHEMA) -> pa.Table:
    """Bring a table to a schema: types cast, missing columns null, further columns kept behind.

    Args:
        table: As another tool wrote it (large strings, int64 grades, fewer columns).
        schema: What is wanted; the columns of it that are not nullable must be there.

    Raises:
        InputError: A column is missing that must be there, or holds something else.
    """
    columns, fields = [], []
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            if not field.nullable:
                have = ", ".join(table.schema.names) or "none"
                raise InputError(f"no column '{field.name}' (columns: {have})")
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            try:
                columns.append(table.column(index).cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                have = table.schema.field(index).type
                raise InputError(f"column '{field.name}' is {have}, not {field.type} ({error})") from error
        fields.append(field)
    for i, field in enumerate(table.schema):
        if field.name not in schema.names:
            columns.append(table.column(i))
            fields.append(field)
    return pa.table(columns, schema=pa.schema(fields))


def check_judgments(table: pa.Table, where: str = "judgments") -> None:
    """Check what types cannot say.

    Args:
        table: Of the columns of `JUDGMENT_SCHEMA`, and any others.
        where: Named in errors.

    Raises:
        InputError: A null where none may be, an unknown label source, class or status, a label on a reply that
            could not be read, no label on one that could, a rank below 1, a context that is not the one hashed.
    """
    for field in JUDGMENT_SCHEMA:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            raise InputError(f"{where}: no column '{field.name}'")
        if not field.nullable and table.column(index).null_count:
            raise InputError(
                f"{where}: column '{field.name}' may not be null (row {_first_null(table, index)})"
            )
    _among(table, "label_source", LABEL_SOURCES, where)
    _among(table, "signal_class", SIGNAL_CLASSES, where)
    _among(table, "parse_status", PARSE_STATUSES, where)
    readable = pc.is_in(table["parse_status"], pa.array(READABLE))
    labelled = pc.or_(
        pc.or_(table["grade"].is_valid(), table["binary"].is_valid()),
        pc.or_(table["value"].is_valid(), table["rank"].is_valid()),
    )
    _none(
        pc.and_(labelled, pc.invert(readable)),
        where,
        "carries a label though its reply could not be read: leave grade, binary, value and rank null",
    )
    _none(
        pc.and_(readable, pc.invert(labelled)),
        where,
        "says parse_status ok but carries no grade, binary, value or rank",
    )
    for name in ("rank", "pool_rank"):
        _none(pc.less(table[name], 1), where, f"has a {name} below 1: ranks start at 1")
    lengths = pc.fill_null(pc.list_value_length(table["context_ids"]), 0)
    _none(
        pc.not_equal(pc.greater(lengths, 0), table["context_hash"].is_valid()),
        where,
        "has a context without its hash, or a hash without a context (schemas.judgments.context_hash)",
    )


def _among(table: pa.Table, name: str, allowed: Sequence[str], where: str) -> None:
    column = table[name]
    wrong = pc.and_(column.is_valid(), pc.invert(pc.is_in(column, pa.array(allowed))))
    if (row := _first_true(wrong)) is not None:
        raise InputError(
            f"{where}, row {row}: {name} is '{column[row].as_py()}'; it may be {', '.join(allowed)}"
        )


def _none(wrong: pa.ChunkedArray, where: str, what: str) -> None:
    if (row := _first_true(wrong)) is not None:
        raise InputError(f"{where}, row {row} {what}")


def _first_true(mask: pa.ChunkedArray) -> int | None:
    row = pc.index(pc.fill_null(mask, False), True).as_py()
    return None if row < 0 else int(row)


def _first_null(table: pa.Table, index: int) -> int:
    return int(pc.index(table.column(index).is_null(), True).as_py())
