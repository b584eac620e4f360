"""Retrieval sets as `datasets` holds them on a hub (MTEB, NanoBEIR): subsets corpus, queries and default."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from models.training.shards import ShardReader, list_shards
from schemas.columns import to_text
from schemas.errors import InputError
from transforms.retrieval.collection import RetrievalData, frame
from transforms.retrieval.formats.base import (
    ExportData,
    Exported,
    ExportOptions,
    Format,
    ImportOptions,
    Source,
)
from transforms.retrieval.texts import open_documents, read_queries
from transforms.shards.files import Folder

_LABELS = ("default", "qrels")
_PAIR = ({"query-id", "corpus-id"}, {"query_id", "corpus_id"})


def recognises(source: Source) -> bool:
    """A folder with subsets corpus, queries, and default or qrels, as Parquet (or other shards `datasets` reads)."""
    if source.file is not None:
        return False
    tops = {n.split("/")[0] for n in source.files() if n.endswith((".parquet", ".arrow", ".jsonl"))}
    return "queries" in tops and bool(tops & set(_LABELS))


def read(source: Source, options: ImportOptions) -> RetrievalData:
    """Read the subsets; a file of the labels' subset is a split, by its name.

    Raises:
        InputError: A subset lacks its columns, or no split is wanted.
    """
    storage = dict(source.folder.options)
    base = source.folder.url.rstrip("/")
    tops = {n.split("/")[0] for n in source.files()}
    label_folder = next(t for t in _LABELS if t in tops)
    columns: dict[str, list[Any]] = {"query_id": [], "doc_id": [], "grade": [], "split": []}
    splits: dict[str, None] = {}
    for shard in list_shards(f"{base}/{label_folder}", options=storage).shards:
        split = shard.name.split("/")[0].rpartition(".")[0].partition("-0")[0] or shard.name
        splits[split] = None
        if not options.wants(split):
            continue
        for batch in ShardReader(list_shards(shard.url, options=storage)):
            names = set(batch.schema.names)
            pair = next((p for p in _PAIR if p <= names), None)
            if pair is None:
                raise InputError(f"{label_folder}/{shard.name}: no columns query-id and corpus-id")
            query, doc = ("query-id", "corpus-id") if "query-id" in pair else ("query_id", "corpus_id")
            columns["query_id"] += to_text(_column(batch, query)).to_pylist()
            columns["doc_id"] += to_text(_column(batch, doc)).to_pylist()
            score = "score" if "score" in names else None
            grades = [1] * batch.num_rows if score is None else _column(batch, score).to_pylist()
            columns["grade"] += [_grade(g, f"{label_folder}/{shard.name}") for g in grades]
            columns["split"] += [split] * batch.num_rows
    if not columns["query_id"]:
        raise InputError(
            f"{source.url}: no labels of split {', '.join(options.splits)} (there are: {', '.join(splits)})"
        )
    data = RetrievalData(judgments=options.judgments(columns))
    data.queries = read_queries(f"{base}/queries", storage)
    if "corpus" in tops:
        data.documents = open_documents(f"{base}/corpus", storage)
    return data


def write(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """Three subsets as Parquet, and the card that tells `datasets` of them."""
    done = Exported()
    labels = export.labels.with_columns(pl.col("split").fill_null(options.split))
    splits = []
    for key, part in labels.sort("place").group_by("split", maintain_order=True):
        splits.append(str(key[0]))
        table = pa.table(
            {
                "query-id": pa.array(part["query_id"].to_list(), pa.string()),
                "corpus-id": pa.array(part["doc_id"].to_list(), pa.string()),
                "score": pa.array(part["grade"].to_list(), pa.int64()),
            }
        )
        _put(folder, f"default/{key[0]}.parquet", table, done)
    queries = frame(export.data.queries).select(pl.col("query_id").alias("_id"), "text", "known_to", "extra")
    spare = [c for c in ("known_to", "extra") if queries[c].null_count() == queries.height]
    queries = queries.drop(spare)
    _put(folder, "queries/queries.parquet", queries.to_arrow().cast(_plain(queries.to_arrow().schema)), done)
    configs = ["- config_name: default", "  data_files:"]
    for split in splits:
        configs += [f"  - split: {split}", f"    path: default/{split}.parquet"]
    configs += [
        "- config_name: queries",
        "  data_files:",
        "  - split: queries",
        "    path: queries/queries.parquet",
    ]
    if export.data.documents is not None:
        _write_corpus(export, folder, done)
        configs += [
            "- config_name: corpus",
            "  data_files:",
            "  - split: corpus",
            "    path: corpus/corpus.parquet",
        ]
    card = "\n".join(
        ["---", "configs:", *configs, "---", "", "Retrieval set: subsets corpus, queries and default.", ""]
    )
    folder.write("README.md", card.encode())
    return done


def _write_corpus(export: ExportData, folder: Folder, done: Exported) -> None:
    assert export.data.documents is not None
    names = {"doc_id": "_id", "title": "title", "text": "text", "base_id": "base_id", "source": "source"}
    names["extra"] = "extra"
    schema = pa.schema([(new, pa.string()) for new in names.values()])
    count = 0
    with (
        folder.publish("corpus/corpus.parquet") as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for batch in export.data.documents():
            writer.write_batch(pa.RecordBatch.from_arrays([batch.column(n) for n in names], schema=schema))
            count += batch.num_rows
    done.files["corpus/corpus.parquet"] = count


def _plain(schema: pa.Schema) -> pa.Schema:
    """Without the views and large strings polars prefers, which older readers do not know."""
    return pa.schema(
        [(f.name, pa.list_(pa.string()) if f.name == "known_to" else pa.string()) for f in schema]
    )


def _put(folder: Folder, name: str, table: pa.Table, done: Exported) -> None:
    with folder.publish(name) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    done.files[name] = table.num_rows


def _grade(value: Any, where: str) -> int:
    if value is None or float(value) != int(value):
        raise InputError(f"{where}: score {value!r} is no grade (a whole number)")
    return int(value)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))


FORMAT = Format(
    "datasets",
    "`datasets` subsets (MTEB)",
    recognises,
    read,
    write,
    frozenset({"grade", "split", "queries", "documents", "titles", "ids", "known_to", "extra"}),
)
