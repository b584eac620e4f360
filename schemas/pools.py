"""Candidate pools: which documents were put up for a query, by which retriever, at which rank.

One row for each pair and source: a document that BM25 and a dense retriever both found has two rows. A pool says
nothing about relevance; labels are in judgments.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError

POOL_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field(
            "source", pa.string(), nullable=False
        ),  # bm25, minilm, human, random, ...; the pool's manifest says how each worked
        pa.field(
            "rank", pa.int32()
        ),  # 1 = best in that source; null where it gave no order (human positives)
        pa.field("score", pa.float64()),  # as that source computes it; null where it gave none
    ]
)
POOL_KEY = ("query_id", "doc_id", "source")


def check_pool(table: pa.Table, where: str = "pool") -> None:
    """Check what types cannot say.

    Raises:
        InputError: A column is missing, a null where none may be, a rank below 1, a score that is not a number.
    """
    for field in POOL_SCHEMA:
        if table.schema.get_field_index(field.name) < 0:
            have = ", ".join(table.schema.names) or "none"
            raise InputError(f"{where}: no column '{field.name}' (columns: {have})")
        if not field.nullable and table[field.name].null_count:
            raise InputError(f"{where}: column '{field.name}' may not be null")
    if pc.any(pc.less(table["rank"], 1)).as_py():
        raise InputError(f"{where}: a rank is below 1: ranks start at 1")
    if pc.any(pc.is_nan(table["score"])).as_py():
        raise InputError(f"{where}: a score is not a number")
