"""Rows of labels: what the engine fills in, and the columns a labelling run has beside those of every judgment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from schemas.errors import InputError
from schemas.judgments import JUDGMENT_SCHEMA, judgment_table
from transforms.retrieval.labelling.queries import PoolDocument, PooledQuery

if TYPE_CHECKING:
    from transforms.retrieval.labelling.method import Method

EXTRA_SCHEMA = pa.schema(
    [
        pa.field(
            "probability", pa.float64()
        ),  # of the label, where the judge gives one (P(yes) after calibration)
        pa.field("truncated", pa.bool_()),  # the passage was cut to fit the judge's context
        pa.field("error", pa.string()),  # why there is no label, where there is none
        pa.field(
            "reply", pa.string()
        ),  # what the judge said, where it says something (cut to REPLY characters)
    ]
)
LABEL_SCHEMA = pa.schema([*JUDGMENT_SCHEMA, *EXTRA_SCHEMA])
REPLY = 2000


def complete_row(
    row: Mapping[str, Any],
    query: PooledQuery,
    documents: Mapping[str, PoolDocument],
    method: Method,
    annotator: str,
) -> dict[str, Any]:
    """A method's row with what the engine knows filled in.

    Args:
        row: What the method gives.
        query: The query it is about.
        documents: The query's candidates by id.
        method: Who gives it.
        annotator: Tag of the judge.

    Raises:
        InputError: It names a document that is not among the query's candidates, or an unknown column.
    """
    document = documents.get(row.get("doc_id", ""))
    if document is None:
        raise InputError(
            f"{method.name}: a label for '{row.get('doc_id')}', which is no candidate of '{query.query_id}'"
        )
    strange = row.keys() - set(LABEL_SCHEMA.names)
    if strange:
        raise InputError(f"{method.name}: a label with an unknown column '{min(strange)}'")
    whole: dict[str, Any] = {
        "query_id": query.query_id,
        "label_source": "llm",
        "annotator": annotator,
        "signal": method.name,
        "signal_class": method.signal_class,
        "split": query.split,
        "pool_source": document.pool_source,
        "pool_rank": document.pool_rank,
        **row,
    }
    for name in ("reply", "error"):
        if whole.get(name):
            whole[name] = str(whole[name])[:REPLY]
    return whole


def label_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Complete rows as a table of `LABEL_SCHEMA`, checked.

    Raises:
        InputError: As `schemas.judgments.judgment_table`.
    """
    extra = set(EXTRA_SCHEMA.names)
    table = judgment_table({k: v for k, v in row.items() if k not in extra} for row in rows)
    for field in EXTRA_SCHEMA:
        table = table.append_column(field, pa.array([row.get(field.name) for row in rows], field.type))
    return table
