"""Parquet: rows are read by row group, and written with the source's row groups, codecs and encodings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.columns import check_extra_columns, check_id_column, check_text_column
from schemas.fingerprint import schema_fingerprint
from transforms.shards.deltas import DeltaCursor, apply_delta, pick_rows
from transforms.shards.files import Folder
from transforms.shards.formats.base import (
    Assembled,
    AssembleOptions,
    OnRemoved,
    ReadUnit,
    Survey,
    UnitLimits,
    UnitPlan,
    pack,
    projection,
    regroup,
)

_BATCH_ROWS = 65_536


class ParquetFormat:
    """Parquet shards."""

    name = "parquet"

    def survey(
        self,
        folder: Folder,
        name: str,
        limits: UnitLimits,
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Survey:
        """Plan from the footer alone."""
        with _open(folder, name) as file:
            schema = file.schema_arrow
            check_text_column(schema, text_column, shard=name)
            check_id_column(schema, id_column, shard=name)
            check_extra_columns(schema, extra, shard=name)
            meta = file.metadata
            leaf = _leaf(meta, text_column)
            chunks = []
            for i in range(meta.num_row_groups):
                group = meta.row_group(i)
                column = group.column(leaf)
                # A dictionary page hides repeats; rows * 32 keeps the guess from being absurd.
                chunks.append((group.num_rows, max(column.total_uncompressed_size, group.num_rows * 32)))
            return Survey(schema, meta.num_rows, tuple(pack(chunks, limits)))

    def read(
        self,
        folder: Folder,
        name: str,
        units: Sequence[UnitPlan],
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Iterator[ReadUnit]:
        """Decode only the row groups the units touch and only the columns asked for."""
        if not units:
            return
        first, end = units[0].first_row, units[-1].first_row + units[-1].rows
        columns = projection(text_column, id_column, extra)
        with _open(folder, name) as file:
            groups: list[int] = []
            start = row = 0
            for i in range(file.metadata.num_row_groups):
                n = file.metadata.row_group(i).num_rows
                if row + n > first and row < end:
                    if not groups:
                        start = row
                    groups.append(i)
                row += n
            size = max(1, min(_BATCH_ROWS, max(u.rows for u in units)))
            batches = file.iter_batches(
                batch_size=size, row_groups=groups, columns=columns, use_threads=False
            )
            for plan, batch in regroup(batches, start, units):
                yield ReadUnit(plan, batch)

    def scan(self, folder: Folder, name: str) -> Iterator[pa.Table]:
        """Read all columns, some rows at a time."""
        with _open(folder, name) as file:
            for batch in file.iter_batches(batch_size=8192, use_threads=False):
                yield pa.Table.from_batches([batch], file.schema_arrow)

    def assemble(
        self,
        folder: Folder,
        name: str,
        units: Sequence[UnitPlan],
        cursor: DeltaCursor,
        target: Path,
        text_column: str,
        options: AssembleOptions,
        on_removed: OnRemoved,
    ) -> Assembled:
        """Write row group by row group: one source row group is one output row group unless asked otherwise."""
        size = options.row_group_rows
        with _open(folder, name) as file:
            schema = file.schema_arrow
            written = 0
            held: list[pa.Table] = []
            with pq.ParquetWriter(target, schema, **writer_settings(file.metadata, options)) as writer:
                row = 0
                for i in range(file.metadata.num_row_groups):
                    chunk = file.read_row_group(i, use_threads=False)
                    delta = cursor.take(row, chunk.num_rows)
                    if delta.removed.any():
                        rows = [row + int(r) for r in delta.removed.nonzero()[0]]
                        on_removed(pick_rows(chunk, delta.removed), rows)
                    row += chunk.num_rows
                    chunk = apply_delta(chunk, delta, text_column)
                    written += chunk.num_rows
                    if size is None:
                        if chunk.num_rows:
                            writer.write_table(chunk, row_group_size=chunk.num_rows)
                        continue
                    held = [pa.concat_tables([*held, chunk])]
                    full = held[0].num_rows // size * size
                    if full:
                        writer.write_table(held[0].slice(0, full), row_group_size=size)
                        held = [held[0].slice(full)]
                if held and held[0].num_rows:
                    writer.write_table(held[0])
            return Assembled(written, schema_fingerprint(schema))


def _open(folder: Folder, name: str) -> pq.ParquetFile:
    if folder.is_local:
        return pq.ParquetFile(folder.path(name), memory_map=True, pre_buffer=False)
    return pq.ParquetFile(folder.open(name), pre_buffer=True)


def _leaf(meta: pq.FileMetaData, column: str) -> int:
    for i in range(meta.num_columns):
        if meta.schema.column(i).path == column:
            return i
    raise KeyError(column)


def writer_settings(meta: pq.FileMetaData, options: AssembleOptions) -> dict[str, Any]:
    """How a file was written, as far as its footer tells: codecs, dictionaries and statistics per column."""
    # Not the source's version: an older one cannot hold nanoseconds, and polars and Spark write "1.0" over them.
    # Values of lists keep the name they have; the standard's (`element`) would be another schema.
    settings: dict[str, Any] = {"version": "2.6", "use_compliant_nested_type": False}
    if meta.num_row_groups == 0:
        settings["compression"] = options.compression or "snappy"
        return settings
    group = meta.row_group(0)
    columns = [group.column(i) for i in range(meta.num_columns)]
    # Some writers' names of what lies within lists are not those pyarrow writes: columns are told by their order.
    paths = _paths(meta.schema.to_arrow_schema())
    codecs = ["none" if c.compression == "UNCOMPRESSED" else c.compression.lower() for c in columns]
    settings["compression"] = options.compression or dict(zip(paths, codecs, strict=True))
    encoded = [
        p
        for p, c in zip(paths, columns, strict=True)
        if c.has_dictionary_page or "DICTIONARY" in str(c.encodings)
    ]
    settings["use_dictionary"] = encoded or False
    settings["write_statistics"] = [p for p, c in zip(paths, columns, strict=True) if c.is_stats_set] or False
    return settings


def _paths(schema: pa.Schema) -> list[str]:
    """The columns' paths as they will be written."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, use_compliant_nested_type=False):
        pass
    written = pq.read_metadata(pa.BufferReader(sink.getvalue()))
    return [written.schema.column(i).path for i in range(written.num_columns)]
