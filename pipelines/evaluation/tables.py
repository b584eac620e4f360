"""Reading what is to be evaluated: CSV and TSV files, shards of any format, outputs of tamis.

Evaluation sets are small, so they are read whole. Every row keeps the shard and the row number it came from, which is
how the output of a job is joined with its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from schemas.errors import InputError
from transforms.shards.files import Folder
from transforms.shards.inputs import list_input

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Table:
    """Rows read whole.

    Attributes:
        source: What the user named.
        columns: Name -> n values.
        keys: n pairs (shard, row number in it).
        shards: Names of the shards, in order.
    """

    source: str
    columns: dict[str, list[Any]]
    keys: list[tuple[str, int]]
    shards: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def column(self, name: str) -> list[Any]:
        """A column's values.

        Raises:
            InputError: There is none of that name.
        """
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise InputError(f"{self.source}: no column '{name}' (columns: {known})")
        return self.columns[name]

    def texts(self, name: str) -> list[str | None]:
        """A column of text; null stays None.

        Raises:
            InputError: There is no such column, or it holds something else.
        """
        values = self.column(name)
        for i, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                raise InputError(
                    f"{self.source}: column '{name}' holds {type(value).__name__} (row {i}), not text"
                )
        return values

    def first_of(self, names: Sequence[str], what: str) -> str:
        """The first of these columns that is there.

        Raises:
            InputError: None is.
        """
        for name in names:
            if name in self.columns:
                return name
        known = ", ".join(self.columns) or "none"
        raise InputError(f"{self.source}: which column is {what}? (columns: {known})")


def read_table(source: str, options: Mapping[str, Any] | None = None) -> Table:
    """Read a file, folder, glob, URL or output of tamis whole.

    Args:
        source: CSV, TSV, Parquet, JSONL or Arrow, by its name.
        options: fsspec options of its filesystem.

    Raises:
        InputError: Nothing there, or not readable.
    """
    suffix = PurePosixPath(source).suffix.lower()
    if suffix in _SEPARATORS:
        return _read_separated(source, _SEPARATORS[suffix], dict(options or {}))
    from pipelines.report.output import read_batches

    listing = list_input(source, dict(options or {}))
    columns: dict[str, list[Any]] = {}
    keys: list[tuple[str, int]] = []
    for shard in listing.shards:
        row = 0
        for batch in read_batches(listing.root, shard.name):
            _append(columns, batch, len(keys))
            keys += [(shard.name, row + i) for i in range(batch.num_rows)]
            row += batch.num_rows
    return Table(source, columns, keys, [s.name for s in listing.shards])


def read_tables(sources: Sequence[str], options: Mapping[str, Any] | None = None) -> Table:
    """Several sources as one table, one below the other.

    Raises:
        InputError: As `read_table`; or there is no source.
    """
    if not sources:
        raise InputError("nothing to read: name a file or a folder")
    tables = [read_table(s, options) for s in sources]
    if len(tables) == 1:
        return tables[0]
    columns: dict[str, list[Any]] = {}
    done = 0
    for table in tables:
        for name in dict.fromkeys([*columns, *table.columns]):
            have = columns.setdefault(name, [None] * done)
            have += table.columns.get(name, [None] * len(table))
        done += len(table)
    return Table(
        ", ".join(sources),
        columns,
        [k for t in tables for k in t.keys],
        [s for t in tables for s in t.shards],
    )


def _append(columns: dict[str, list[Any]], batch: pa.RecordBatch, done: int) -> None:
    """Add a batch's rows; a column some shards lack is null there."""
    for name in dict.fromkeys([*columns, *batch.schema.names]):
        have = columns.setdefault(name, [None] * done)
        index = batch.schema.get_field_index(name)
        have += batch.column(index).to_pylist() if index >= 0 else [None] * batch.num_rows


def _read_separated(source: str, separator: str, options: dict[str, Any]) -> Table:
    import polars as pl

    parent, _, name = source.rpartition("/")
    folder = Folder(parent or ("/" if source.startswith("/") else "."), **options)
    if not folder.exists(name):
        raise InputError(f"no such input: {source}")
    try:
        # Everything as text: a column of offsets or of numbers is read by whoever asks for it.
        frame = pl.read_csv(folder.read(name), separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{source}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    columns = {str(c): frame.get_column(c).to_list() for c in frame.columns}
    return Table(source, columns, [(name, i) for i in range(frame.height)], [name])
