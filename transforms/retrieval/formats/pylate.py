"""PyLate's distillation data: rows {query_id, document_ids, scores}, and two tables of texts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from models.training.shards import ShardListing, ShardReader, list_shards
from schemas.columns import to_text
from schemas.errors import InputError
from schemas.judgments import QUERY_SCHEMA
from transforms.retrieval.collection import RetrievalData, frame
from transforms.retrieval.formats.base import (
    ExportData,
    Exported,
    ExportOptions,
    Format,
    ImportOptions,
    Source,
)
from transforms.retrieval.formats.rows import OutDocument
from transforms.retrieval.texts import open_documents, read_queries
from transforms.shards.files import Folder

_ROW = {"query_id", "document_ids", "scores"}


def recognises(source: Source) -> bool:
    """Shards with columns query_id, document_ids, scores."""
    return bool(_by_columns(source)[0])


def read(source: Source, options: ImportOptions) -> RetrievalData:
    """Read teacher scores as values; the teacher is an annotator as any.

    Raises:
        InputError: No rows of that form, or lists of different lengths.
    """
    rows, queries, documents = _by_columns(source)
    if not rows:
        raise InputError(f"{source.url}: no columns query_id, document_ids and scores")
    columns: dict[str, list[Any]] = {"query_id": [], "doc_id": [], "value": []}
    for url in rows:
        for batch in ShardReader(list_shards(url, options=dict(source.folder.options))):
            ids = to_text(batch.column(batch.schema.get_field_index("query_id"))).to_pylist()
            lists = batch.column(batch.schema.get_field_index("document_ids")).to_pylist()
            scores = batch.column(batch.schema.get_field_index("scores")).to_pylist()
            for query, documents_, values in zip(ids, lists, scores, strict=True):
                docs, numbers = _list(documents_), _list(values)
                if len(docs) != len(numbers):
                    raise InputError(
                        f"{url}: query '{query}' has {len(docs)} documents but {len(numbers)} scores"
                    )
                columns["query_id"] += [query] * len(docs)
                columns["doc_id"] += [str(d) for d in docs]
                columns["value"] += [float(v) for v in numbers]
    data = RetrievalData(judgments=options.judgments(columns, "teacher_score", "llm"))
    if queries:
        data.queries = pa.concat_tables(
            [read_queries(u, dict(source.folder.options)) for u in queries]
        ).select(QUERY_SCHEMA.names)
    if documents:
        streams = [open_documents(u, dict(source.folder.options)) for u in documents]

        def all_documents() -> Iterator[pa.RecordBatch]:
            for stream in streams:
                yield from stream()

        data.documents = all_documents
    return data


def write(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """train.parquet, queries.parquet, documents.parquet; a label without a value is scored by its grade."""
    done = Exported()
    labels = export.labels.with_columns(
        pl.coalesce(pl.col("value"), pl.col("grade").cast(pl.Float64)).alias("score")
    )
    graded = labels.filter(pl.col("value").is_null()).height
    if graded:
        done.lost.append(f"that {graded:,} scores are grades, not values")
    rows = labels.group_by("query_id", maintain_order=True).agg(
        pl.col("doc_id").alias("document_ids"), pl.col("score").alias("scores")
    )
    schema = pa.schema(
        [
            ("query_id", pa.string()),
            ("document_ids", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float64())),
        ]
    )
    _put(folder, "train.parquet", rows.to_arrow().cast(schema), done)
    texts = export.query_texts()
    judged = rows["query_id"].to_list()
    rest = [q for q in frame(export.data.queries)["query_id"] if q in texts and q not in set(judged)]
    names = [*judged, *rest]
    _put(folder, "queries.parquet", pa.table({"query_id": names, "text": [texts[q] for q in names]}), done)
    if export.data.documents is not None:
        schema = pa.schema([("document_id", pa.string()), ("text", pa.string())])
        count, titles = 0, False
        with (
            folder.publish("documents.parquet") as temporary,
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ):
            for batch in export.data.documents():
                found = [
                    OutDocument(r["doc_id"], r["title"], r["text"], None, None) for r in batch.to_pylist()
                ]
                titles = titles or any(d.title for d in found)
                block = {"document_id": [d.doc_id for d in found], "text": [d.joined for d in found]}
                writer.write_table(pa.table(block, schema=schema))
                count += len(found)
        done.files["documents.parquet"] = count
        if titles:
            done.lost.append("titles as such: they are joined to the texts by one space")
    return done


def _put(folder: Folder, name: str, table: pa.Table, done: Exported) -> None:
    with folder.publish(name) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    done.files[name] = table.num_rows


def _list(value: Any) -> list[Any]:
    """A list, also where it was stored as its text."""
    return list(ast.literal_eval(value)) if isinstance(value, str) else list(value)


def _by_columns(source: Source) -> tuple[list[str], list[str], list[str]]:
    """URLs of files with rows, with queries and with documents."""
    rows: list[str] = []
    queries: list[str] = []
    documents: list[str] = []
    for name in source.files():
        url = f"{source.folder.url.rstrip('/')}/{name}"
        try:
            listing = list_shards(url, options=dict(source.folder.options))
        except InputError:
            continue
        names = _names(listing)
        if names >= _ROW:
            rows.append(url)
        elif "document_id" in names and "text" in names:
            documents.append(url)
        elif "query_id" in names and names & {"text", "query"}:
            queries.append(url)
    return rows, queries, documents


def _names(listing: ShardListing) -> set[str]:
    try:
        batch = next(iter(ShardReader(listing, batch_rows=1)), None)
    except InputError:
        return set()
    return set(batch.schema.names) if batch is not None else set()


FORMAT = Format(
    "pylate",
    "PyLate distillation rows",
    recognises,
    read,
    write,
    frozenset({"value", "queries", "documents", "ids"}),
    True,
)
