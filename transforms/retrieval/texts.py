"""Texts of documents and queries from any shards: which column is the id, which the text, is told by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pyarrow as pa

from models.training.shards import ShardListing, ShardReader, list_shards
from schemas.columns import has_text_form, to_text
from schemas.errors import InputError
from schemas.judgments import DOCUMENT_SCHEMA, QUERY_SCHEMA
from transforms.retrieval.collection import Documents

DOCUMENT_IDS = ("doc_id", "_id", "docid", "document_id", "corpus-id", "corpus_id", "pid", "id", "docno")
QUERY_IDS = ("query_id", "_id", "qid", "query-id", "id")
DOCUMENT_TEXTS = ("text", "contents", "content", "passage", "document", "body")
QUERY_TEXTS = ("text", "query", "query_text", "question")
BATCH_ROWS = 4096


def open_documents(url: str, options: dict[str, Any] | None = None) -> Documents:
    """Documents of any shards: Parquet, JSONL, Arrow, CSV, a `datasets` folder, the output of a job.

    Args:
        url: File, folder, glob or URL.
        options: fsspec options of its filesystem.

    Returns:
        A function that streams them (`DOCUMENT_SCHEMA`) from the start.

    Raises:
        InputError: Nothing there, or no column that names documents; also while streaming.
    """
    listing = list_shards(url, options=options)
    next(_documents(listing), None)  # a wrong file is refused now, not after the labels were read

    def documents() -> Iterator[pa.RecordBatch]:
        return _documents(listing)

    return documents


def read_queries(url: str, options: dict[str, Any] | None = None) -> pa.Table:
    """Queries of any shards, whole.

    Raises:
        InputError: Nothing there, or no column that names queries.
    """
    listing = list_shards(url, options=options)
    parts = []
    for batch in ShardReader(listing, batch_rows=BATCH_ROWS):
        key = first_of(batch.schema, QUERY_IDS, f"{url}: which column names the query?")
        text = first_of(
            batch.schema, [c for c in QUERY_TEXTS if c != key], f"{url}: which column is the query?"
        )
        taken = {key, text, "known_to", "extra"}
        known = (
            _column(batch, "known_to").cast(pa.list_(pa.string()))
            if "known_to" in batch.schema.names
            else None
        )
        columns = {
            "query_id": to_text(_column(batch, key)).cast(pa.string()),
            "text": to_text(_column(batch, text)).cast(pa.string()),
            "known_to": known if known is not None else pa.nulls(batch.num_rows, pa.list_(pa.string())),
            "extra": _extra(batch, taken),
        }
        parts.append(pa.table([columns[f.name] for f in QUERY_SCHEMA], schema=QUERY_SCHEMA))
    return pa.concat_tables(parts) if parts else QUERY_SCHEMA.empty_table()


def _documents(listing: ShardListing) -> Iterator[pa.RecordBatch]:
    for batch in ShardReader(listing, batch_rows=BATCH_ROWS):
        key = first_of(batch.schema, DOCUMENT_IDS, f"{listing.source}: which column names the document?")
        text = first_of(batch.schema, DOCUMENT_TEXTS, f"{listing.source}: which column is the text?")
        taken = {key, text, *DOCUMENT_SCHEMA.names}
        columns: dict[str, pa.Array] = {
            "doc_id": to_text(_column(batch, key)).cast(pa.string()),
            "text": to_text(_column(batch, text)).cast(pa.string()),
            "extra": _extra(batch, taken),
        }
        for name in ("title", "base_id", "source"):
            have = name in batch.schema.names and name not in (key, text)
            columns[name] = (
                to_text(_column(batch, name)).cast(pa.string())
                if have
                else pa.nulls(batch.num_rows, pa.string())
            )
        yield pa.RecordBatch.from_arrays([columns[f.name] for f in DOCUMENT_SCHEMA], schema=DOCUMENT_SCHEMA)


def first_of(schema: pa.Schema, names: Sequence[str], question: str) -> str:
    """The first of these columns that is there and has a text form.

    Raises:
        InputError: None is.
    """
    for name in names:
        index = schema.get_field_index(name)
        if index >= 0 and has_text_form(schema.field(index).type):
            return name
    have = ", ".join(schema.names) or "none"
    raise InputError(f"{question} Looked for {', '.join(names)}; columns are {have}")


def _extra(batch: pa.RecordBatch, taken: set[str]) -> pa.Array:
    """Further columns as JSON objects, so that they come back on export; what was kept so before is kept."""
    if "extra" in batch.schema.names and _is_json_text(_column(batch, "extra")):
        return _column(batch, "extra").cast(pa.string())
    rest = [n for n in batch.schema.names if n not in taken]
    if not rest:
        return pa.nulls(batch.num_rows, pa.string())
    rows = batch.select(rest).to_pylist()
    made = [
        orjson.dumps(
            {k: v for k, v in row.items() if v is not None}, default=str, option=orjson.OPT_SORT_KEYS
        ).decode()
        for row in rows
    ]
    return pa.array([None if m == "{}" else m for m in made], pa.string())


def _is_json_text(column: pa.Array) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_null(column.type))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))
