"""Reading what is to be evaluated: CSV and TSV files, shards of any format, outputs of tamis.

Evaluation sets are small, so they are read whole. Every row keeps the shard and the row number it came from, which is
how the output of a job is joined with its input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from models.training.shards import ShardListing, ShardReader, list_shards
from schemas.errors import InputError
from transforms.shards.inputs import list_input


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
    from pipelines.report.output import read_batches

    given = dict(options or {})
    if separated := _separated(source, given):
        return _read_separated(source, separated)
    listing = list_input(source, given)
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


def _separated(source: str, options: dict[str, Any]) -> ShardListing | None:
    """The CSV and TSV files of a source; None where it holds shards, or nothing."""
    try:
        listing = list_shards(source, allow_poisoned=True, options=options)
    except (InputError, OSError, ValueError):
        return None  # an output, a hub id, or nothing: for the reader of shards to say
    return listing if all(shard.format == "csv" for shard in listing.shards) else None


def _read_separated(source: str, listing: ShardListing) -> Table:
    """Everything as text: a column of offsets or of numbers is read by whoever asks for it. An empty field is null."""
    reader = ShardReader(listing)
    columns: dict[str, list[Any]] = {}
    keys: list[tuple[str, int]] = []
    for number, shard in enumerate(listing.shards):
        first = len(keys)
        for batch in reader.read_shard(number):
            _append(columns, batch, len(keys))
            keys += [(shard.name, len(keys) - first + i) for i in range(batch.num_rows)]
    if not columns:
        raise InputError(f"{source}: there is not one row in it")
    cells = {name: [None if value == "" else value for value in values] for name, values in columns.items()}
    return Table(source, cells, keys, [shard.name for shard in listing.shards])


def distinct_ids(values: Sequence[Any], where: str) -> list[str]:
    """Ids as text, to join by.

    Raises:
        InputError: A row has none, or two rows have the same.
    """
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise InputError(f"{where}: {missing:,} of {len(values):,} rows have no id; pass another --id-column")
    ids = [str(value) for value in values]
    if len(set(ids)) < len(ids):
        twice, times = Counter(ids).most_common(1)[0]
        raise InputError(f"{where}: id '{twice}' stands there {times} times; pass another --id-column")
    return ids
