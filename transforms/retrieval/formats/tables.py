"""tamis' own folders, and bare tables (Parquet, JSONL, Arrow, CSV) of judgments or candidates."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from models.training.shards import ShardReader, list_shards
from schemas.errors import InputError
from schemas.fingerprint import fingerprint
from schemas.judgments import (
    DOCUMENT_SCHEMA,
    JUDGMENT_SCHEMA,
    LABEL_KEY,
    QUERY_SCHEMA,
    check_judgments,
    conform,
)
from schemas.pools import POOL_KEY, POOL_SCHEMA, check_pool
from transforms.retrieval.collection import Documents, RetrievalData, without_repeats
from transforms.retrieval.formats.base import Format, ImportOptions, Source
from transforms.shards.files import Folder

LABELS, QUERIES, POOL, CORPUS = "data", "queries", "pool", "corpus"
_LABEL_COLUMNS = ("grade", "binary", "value", "label", "relevance")


def recognises_folder(source: Source) -> bool:
    """A finished folder of `tamis judgments import`, `tamis label` or `tamis pool`."""
    return source.file is None and source.folder.exists("manifest.json") and source.folder.exists(LABELS)


def read_folder(source: Source, options: ImportOptions) -> RetrievalData:
    """Read a folder tamis wrote. Everything a label says of its origin is in its row; the options change none of it.

    Raises:
        InputError: The folder is not finished, or holds neither judgments nor candidates.
    """
    data = RetrievalData()
    listing = list_shards(source.url, options=dict(source.folder.options))
    _sort_in(
        pa.concat_tables(
            [pa.Table.from_batches([b]) for b in ShardReader(listing, batch_rows=1 << 16)],
            promote_options="permissive",
        )
        if any(s.size for s in listing.shards)
        else JUDGMENT_SCHEMA.empty_table(),
        data,
        options,
        source.url,
    )
    if options.splits:
        keep = pa.compute.is_in(data.judgments["split"], pa.array(list(options.splits)))
        data.judgments = data.judgments.filter(keep)
    data.queries = _side_table(source.folder, QUERIES, QUERY_SCHEMA)
    side = _side_table(source.folder, POOL, POOL_SCHEMA)
    data.pool = pa.concat_tables([data.pool, side]) if side.num_rows else data.pool
    files = [n for n in source.folder.find(CORPUS) if n.endswith(".parquet")]
    if files:
        data.documents = parquet_documents(source.folder, files)
    return data


def recognises_table(source: Source) -> bool:
    """A file, or folder of files, whose columns are query_id, doc_id and a label or a candidate's rank."""
    try:
        names = columns_of(source)
    except InputError:
        return False
    return {"query_id", "doc_id"} <= names and bool(names & {*_LABEL_COLUMNS, "rank", "score"})


def read_table(source: Source, options: ImportOptions) -> RetrievalData:
    """Read bare tables; what they do not say of who judged, the options say."""
    listing = list_shards(source.url, options=dict(source.folder.options))
    parts = [pa.Table.from_batches([b]) for b in ShardReader(listing, batch_rows=1 << 16)]
    data = RetrievalData()
    if parts:
        _sort_in(pa.concat_tables(parts, promote_options="permissive"), data, options, source.url)
    return data


def parquet_documents(folder: Folder, files: list[str]) -> Documents:
    """Documents of Parquet files of `DOCUMENT_SCHEMA`."""

    def documents() -> Iterator[pa.RecordBatch]:
        for name in files:
            with folder.open(name) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(4096):
                    yield pa.RecordBatch.from_arrays(
                        [batch.column(batch.schema.get_field_index(f.name)) for f in DOCUMENT_SCHEMA],
                        schema=DOCUMENT_SCHEMA,
                    )

    return documents


def _sort_in(table: pa.Table, data: RetrievalData, options: ImportOptions, where: str) -> None:
    """Judgments or candidates, by the columns a table has."""
    names = set(table.schema.names)
    if not {"query_id", "doc_id"} <= names:
        raise InputError(f"{where}: no columns query_id and doc_id (columns: {', '.join(names) or 'none'})")
    for alias in ("label", "relevance"):
        if alias in names and "grade" not in names:
            table = table.rename_columns(["grade" if n == alias else n for n in table.schema.names])
            names = set(table.schema.names)
    if not names & {"grade", "binary", "value"}:
        if "source" not in names:
            table = table.append_column("source", pa.repeat(pa.scalar(options.run_tag), table.num_rows))
        pool = conform(table, POOL_SCHEMA).select(POOL_SCHEMA.names)
        data.pool, repeats = without_repeats(pool, POOL_KEY, "candidate", where)
        check_pool(data.pool, where)
    else:
        data.judgments, repeats = without_repeats(
            _with_defaults(table, options), LABEL_KEY, "judgment", where
        )
        check_judgments(data.judgments, where)
    if repeats:
        data.notes.append(f"{repeats:,} rows said the same again and were left out")


def _with_defaults(table: pa.Table, options: ImportOptions) -> pa.Table:
    source = options.label_source or "human"
    given = {
        "label_source": source,
        "annotator": options.annotator or source,
        "signal": options.signal or "qrels",
        "parse_status": "ok",
        "target_model": options.target_model,
    }
    for name, value in given.items():
        if name not in table.schema.names and value is not None:
            table = table.append_column(name, pa.repeat(pa.scalar(value), table.num_rows))
    table = conform(table, JUDGMENT_SCHEMA)
    index = table.schema.get_field_index("context_ids")
    contexts = table["context_ids"].to_pylist() if table["context_ids"].null_count else None
    if contexts is not None:
        empty = pa.array([c or [] for c in contexts], pa.list_(pa.string()))
        table = table.set_column(index, table.schema.field(index), empty)
    hashes = table["context_hash"]
    if hashes.null_count and (contexts is None or any(contexts)):
        whole = [fingerprint(*c) if c else None for c in table["context_ids"].to_pylist()]
        index = table.schema.get_field_index("context_hash")
        table = table.set_column(index, table.schema.field(index), pa.array(whole, pa.string()))
    return table


def _side_table(folder: Folder, name: str, schema: pa.Schema) -> pa.Table:
    parts = []
    for file in folder.find(name):
        if file.endswith(".parquet"):
            with folder.open(file) as stream:
                parts.append(conform(pq.read_table(stream), schema).select(schema.names))
    return pa.concat_tables(parts) if parts else schema.empty_table()


def columns_of(source: Source) -> set[str]:
    """Columns of the first rows of a file, or of a folder's first file.

    Raises:
        InputError: It holds no table, or one that cannot be read.
    """
    listing = list_shards(source.url, options=dict(source.folder.options))
    batch = next(iter(ShardReader(listing, batch_rows=8)), None)
    return set(batch.schema.names) if batch is not None else set()


FOLDER = Format("tamis", "folder of tamis", recognises_folder, read_folder, None)
TABLE = Format("table", "table of judgments or candidates", recognises_table, read_table, None)
