"""A collection in memory: judgments, queries and pool whole; documents as a stream that can be read again.

Judgments of the largest public sets are some ten million short rows; their documents are not, and nothing here holds
more of them than it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Collection as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError
from schemas.judgments import DOCUMENT_SCHEMA, JUDGMENT_SCHEMA, QUERY_SCHEMA
from schemas.pools import POOL_SCHEMA

if TYPE_CHECKING:
    import polars as pl

DOCUMENT_ROWS = 4096
Documents = Callable[[], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class DeadLine:
    """A line of the input that could not be used.

    Attributes:
        file: Where it stands.
        line: Its number, from 1.
        error: Why.
        content: The line as it was.
    """

    file: str
    line: int
    error: str
    content: str


DEAD_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
    ]
)


@dataclass
class RetrievalData:
    """What a source holds.

    Attributes:
        judgments: Of `JUDGMENT_SCHEMA`, perhaps with further columns.
        queries: Of `QUERY_SCHEMA`; empty where the source names queries by id only.
        pool: Of `POOL_SCHEMA`: candidates and given negatives; empty where there are none.
        documents: Streams the documents (`DOCUMENT_SCHEMA`) from the start; None where there are none.
        dead: Lines that could not be read.
        notes: What the reader should know, a line each.
    """

    judgments: pa.Table = field(default_factory=JUDGMENT_SCHEMA.empty_table)
    queries: pa.Table = field(default_factory=QUERY_SCHEMA.empty_table)
    pool: pa.Table = field(default_factory=POOL_SCHEMA.empty_table)
    documents: Documents | None = None
    dead: list[DeadLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def labels(self) -> pl.DataFrame:
        """The judgments as a polars frame."""
        return frame(self.judgments)

    def queries_with_labels_first(self) -> list[str]:
        """Every query id, in the order of the queries table, then of first appearance in judgments and pool."""
        ids = dict.fromkeys(self.queries["query_id"].to_pylist())
        for table in (self.judgments, self.pool):
            ids.update(dict.fromkeys(pc.unique(table["query_id"]).to_pylist()))
        return list(ids)

    def dead_table(self) -> pa.Table:
        """Dead lines as a table."""
        rows = [{"file": d.file, "line": d.line, "error": d.error, "content": d.content} for d in self.dead]
        return pa.Table.from_pylist(rows, schema=DEAD_SCHEMA)


def frame(table: pa.Table) -> pl.DataFrame:
    """A table as a polars frame."""
    import polars as pl

    found = pl.from_arrow(table)
    assert isinstance(found, pl.DataFrame)
    return found


def document_batches(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Documents as batches of `DOCUMENT_SCHEMA`; a row may leave out all but doc_id."""
    block: list[dict[str, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) == DOCUMENT_ROWS:
            yield pa.RecordBatch.from_pylist(block, schema=DOCUMENT_SCHEMA)
            block = []
    if block:
        yield pa.RecordBatch.from_pylist(block, schema=DOCUMENT_SCHEMA)


def pick_documents(documents: Documents, ids: Ids[str]) -> pl.DataFrame:
    """The documents of some ids, by one pass over all of them.

    Args:
        documents: Where they are.
        ids: Which are wanted; those not found are simply not there.

    Returns:
        doc_id, title, text, base_id, source, extra; the first of several of one id.
    """
    wanted = pa.array(sorted(ids), pa.string())
    kept = []
    for batch in documents():
        mask = pc.is_in(batch.column("doc_id"), wanted)
        if pc.any(mask).as_py():
            kept.append(batch.filter(mask))
    table = pa.Table.from_batches(kept, schema=DOCUMENT_SCHEMA) if kept else DOCUMENT_SCHEMA.empty_table()
    return frame(table).unique("doc_id", keep="first", maintain_order=True)


def document_ids(documents: Documents) -> list[str]:
    """Every document id, in order."""
    ids: dict[str, None] = {}
    for batch in documents():
        ids.update(dict.fromkeys(batch.column("doc_id").to_pylist()))
    return list(ids)


def without_repeats(table: pa.Table, key: tuple[str, ...], what: str, where: str) -> tuple[pa.Table, int]:
    """Drop rows that say the same thing again.

    Args:
        table: Judgments, or a pool.
        key: What makes two rows the same label (candidate).
        what: Named in errors: judgment, candidate.
        where: Named in errors: file or folder.

    Returns:
        The table without repeats, and how many there were.

    Raises:
        InputError: Two rows of one key say different things: nobody may choose silently between them.
    """
    rows = frame(table)
    # Rows of different hashes are different: the exact and costly look is for the rare rest (repeats, collisions).
    hashes = rows.select(key).hash_rows()
    if hashes.n_unique() == rows.height:
        return table, 0
    whole = rows.unique(maintain_order=True)
    twice = whole.filter(whole.select(key).is_duplicated())
    if twice.height:
        first = twice.row(0, named=True)
        raise InputError(
            f"{where}: {twice.height:,} {what}s contradict one another, the first about query '{first['query_id']}', "
            f"document '{first['doc_id']}'; remove one of each, or name who said which (--annotator, one import a "
            "file)"
        )
    keep = rows.with_row_index("_row").unique(rows.columns, keep="first", maintain_order=True)["_row"]
    return table.take(pa.array(keep.to_list())), rows.height - whole.height
