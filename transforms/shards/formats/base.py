"""What a shard format must offer, and the helpers all of them share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa

from schemas.errors import InputError
from transforms.shards.deltas import DeltaCursor
from transforms.shards.files import Folder


class UnitPlan(NamedTuple):
    """One unit of a shard, as planned.

    Attributes:
        unit: Index inside the shard.
        first_row: Row number of its first row.
        rows: Its number of rows.
        bytes: Estimated bytes of text (for load balancing and progress).
        start: JSONL only: byte offset of its first line in the uncompressed stream.
        end: JSONL only: byte offset behind its last line.
    """

    unit: int
    first_row: int
    rows: int
    bytes: int = 0
    start: int = -1
    end: int = -1


@dataclass(frozen=True)
class UnitLimits:
    """How large a unit may be: what one commit, one retry and one element in flight hold.

    Attributes:
        rows: At most so many rows.
        bytes: About so many bytes of text (a single larger row still is one unit).
    """

    rows: int = 65_536
    bytes: int = 16 << 20

    def parts(self, rows: int, size: int) -> int:
        """Into how many units a stretch of rows has to be cut."""
        return max(1, -(-rows // self.rows), -(-size // self.bytes))


class Survey(NamedTuple):
    """What planning learns of a shard: its schema (None for JSONL), its rows, its units."""

    schema: pa.Schema | None
    rows: int
    units: tuple[UnitPlan, ...]


class ReadUnit(NamedTuple):
    """A unit as read: the asked-for columns, and for each row an error where it could not be read."""

    plan: UnitPlan
    batch: pa.RecordBatch
    errors: list[str | None] | None = None


@dataclass(frozen=True)
class AssembleOptions:
    """How output shards are written; None keeps what the source has.

    Attributes:
        compression: Parquet codec (`zstd`, `snappy`, ...), by name.
        row_group_rows: Rows per Parquet row group.
    """

    compression: str | None = None
    row_group_rows: int | None = None

    @property
    def keeps_source(self) -> bool:
        """Whether an unchanged shard may be copied as it stands."""
        return self.compression is None and self.row_group_rows is None


class Assembled(NamedTuple):
    """What assembling a shard produced: rows written and the fingerprint of its schema (empty for JSONL)."""

    rows: int
    schema_fingerprint: str


OnRemoved = Callable[[pa.Table, Sequence[int]], None]
"""Called with removed source rows (original columns, or `raw`) and their row numbers in the shard."""


def projection(text_column: str, id_column: str | None, extra: Sequence[str] = ()) -> list[str]:
    """The columns to read, each once, the text first."""
    return list(dict.fromkeys([text_column, *([id_column] if id_column else []), *extra]))


class ShardFormat(Protocol):
    """One file format."""

    name: str

    def survey(
        self,
        folder: Folder,
        name: str,
        limits: UnitLimits,
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Survey:
        """Plan a shard: check its columns, count its rows, cut it into units.

        Raises:
            InputError: The text column is missing or is not text; one of the extra columns is missing or nested.
            Exception: Whatever the reader raises on a file that is damaged.
        """
        ...

    def read(
        self,
        folder: Folder,
        name: str,
        units: Sequence[UnitPlan],
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Iterator[ReadUnit]:
        """Read consecutive units, projected to the text, id and extra columns, one at a time."""
        ...

    def scan(self, folder: Folder, name: str) -> Iterator[pa.Table]:
        """Read a shard whole and in order, a piece at a time: all its columns, or `raw` for JSONL."""
        ...

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
        """Write the shard again to a local path with the units' deltas applied, all else kept."""
        ...


def cut(rows: int, size: int, first_row: int, first_unit: int, limits: UnitLimits) -> list[UnitPlan]:
    """Cut a stretch of rows into units of even size; a row is never cut, however large it is."""
    parts = min(limits.parts(rows, size), rows)
    bounds = [rows * i // parts for i in range(parts + 1)] if rows else []
    return [
        UnitPlan(first_unit + i, first_row + a, b - a, size * (b - a) // rows)
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


def pack(chunks: Iterable[tuple[int, int]], limits: UnitLimits) -> list[UnitPlan]:
    """Plan units over natural chunks (row groups, IPC batches): small ones are joined, large ones cut.

    Args:
        chunks: (rows, bytes of text) of each chunk, in order.
        limits: Largest unit.
    """
    units: list[UnitPlan] = []
    first, rows, size = 0, 0, 0
    for chunk_rows, chunk_bytes in chunks:
        if rows and limits.parts(rows + chunk_rows, size + chunk_bytes) > 1:
            units += cut(rows, size, first, len(units), limits)
            first, rows, size = first + rows, 0, 0
        rows, size = rows + chunk_rows, size + chunk_bytes
    if rows:
        units += cut(rows, size, first, len(units), limits)
    return units


def regroup(
    batches: Iterable[pa.RecordBatch], first_row: int, units: Sequence[UnitPlan]
) -> Iterator[tuple[UnitPlan, pa.RecordBatch]]:
    """Cut a stream of batches, whose first row is row `first_row` of the shard, at unit boundaries.

    Raises:
        InputError: The stream ends before the units do.
    """
    stream = iter(batches)
    held: list[pa.RecordBatch] = []
    at = first_row  # row number of the first row held
    have = 0
    for unit in units:
        end = unit.first_row + unit.rows
        while at + have < end:
            batch = next(stream, None)
            if batch is None:
                raise InputError(
                    f"the shard ended at row {at + have} where {end} were planned: it changed while the job ran; "
                    "run the same command again"
                )
            held.append(batch)
            have += batch.num_rows
        while held and at + held[0].num_rows <= unit.first_row:
            at, have = at + held[0].num_rows, have - held[0].num_rows
            held.pop(0)
        if unit.rows == 0:
            continue
        pieces, position = [], at
        for batch in held:
            a, b = max(unit.first_row, position), min(end, position + batch.num_rows)
            if b > a:
                pieces.append(batch.slice(a - position, b - a))
            position += batch.num_rows
        yield unit, pieces[0] if len(pieces) == 1 else pa.concat_batches(pieces)
