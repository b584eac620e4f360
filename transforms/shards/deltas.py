"""Deltas: what a job changed in a shard, and nothing else.

A committed unit holds fates, edits, attributes and the new text of the rows that changed. Untouched text is never
written twice: a shard no row of which changed is copied byte for byte, the others are streamed from their source
with the delta laid over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas import flight
from schemas.columns import to_original_type, to_plain_text

NEW_TEXT = flight.PREFIX + "text"  # in a unit file: the row's new text, null where it is unchanged
CHANGED = flight.PREFIX + "changed"  # bool


@dataclass(frozen=True)
class Delta:
    """What happened to a range of rows.

    Attributes:
        removed: bool array over the range: dropped or dead.
        changed: Offsets into the range of rows whose text changed (ascending).
        texts: Their new texts, in that order.
    """

    removed: npt.NDArray[np.bool_]
    changed: npt.NDArray[np.int64]
    texts: pa.Array

    @property
    def is_empty(self) -> bool:
        """Whether the rows come out as they went in."""
        return len(self.changed) == 0 and not self.removed.any()


class DeltaCursor:
    """Gives the delta of any row range of a shard, going forward, holding one or two unit files at a time.

    Args:
        starts: First row of each unit, ascending.
        rows: Rows of each unit.
        load: Reads the unit file of unit i.
    """

    def __init__(
        self, starts: Sequence[int], rows: Sequence[int], load: Callable[[int], pa.RecordBatch]
    ) -> None:
        self._starts, self._rows, self._load = starts, rows, load
        self._unit = 0
        self._current: tuple[int, pa.RecordBatch] | None = None

    def take(self, first: int, count: int) -> Delta:
        """Delta of rows [first, first + count); ranges must be asked for in ascending order."""
        pieces: list[pa.RecordBatch] = []
        end = first + count
        while self._unit < len(self._starts) and self._starts[self._unit] < end:
            start, n = self._starts[self._unit], self._rows[self._unit]
            batch = self._batch(self._unit)
            a, b = max(first, start), min(end, start + n)
            if b > a:
                pieces.append(batch.slice(a - start, b - a))
            if start + n > end:
                break
            self._unit += 1
        if sum(p.num_rows for p in pieces) != count:
            raise ValueError(f"units cover {sum(p.num_rows for p in pieces)} of rows {first}..{end}")
        if not pieces:
            return Delta(np.zeros(0, bool), np.zeros(0, np.int64), pa.array([], pa.string()))
        table = pa.Table.from_batches([p.select([flight.FATE, CHANGED, NEW_TEXT]) for p in pieces])
        removed = table.column(flight.FATE).to_numpy() != flight.KEPT
        changed = np.flatnonzero(table.column(CHANGED).to_numpy() & ~removed)
        texts = to_plain_text(table.column(NEW_TEXT).take(pa.array(changed)))
        return Delta(removed, changed.astype(np.int64), texts)

    def _batch(self, unit: int) -> pa.RecordBatch:
        if self._current is None or self._current[0] != unit:
            self._current = (unit, self._load(unit))
        return self._current[1]


def apply_delta(chunk: pa.Table, delta: Delta, text_column: str) -> pa.Table:
    """Lay a delta over source rows: changed texts in their original type, removed rows gone, all else as it was."""
    if len(delta.changed):
        index = chunk.schema.get_field_index(text_column)
        field = chunk.schema.field(index)
        source = to_plain_text(chunk.column(index))
        texts = delta.texts.cast(source.type)
        order = np.arange(chunk.num_rows)
        order[delta.changed] = chunk.num_rows + np.arange(len(delta.changed))
        values = pa.concat_arrays([source, texts]).take(pa.array(order))
        chunk = chunk.set_column(index, field, to_original_type(values, field.type))
    return pick_rows(chunk, ~delta.removed) if delta.removed.any() else chunk


def pick_rows(table: pa.Table, wanted: npt.NDArray[np.bool_]) -> pa.Table:
    """The rows where the mask is true, in order, of columns of any type."""
    try:
        return table.filter(pa.array(wanted))
    except pa.ArrowNotImplementedError:
        # Arrow cannot filter string views (nor what holds them), but it can slice and concatenate anything.
        edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0)).reshape(-1, 2).tolist()
        runs = [table.slice(start, end - start) for start, end in edges]
        return pa.concat_tables(runs).combine_chunks() if runs else table.slice(0, 0)


def unit_file(batch: pa.RecordBatch, text_column: str, original: pa.Array) -> pa.RecordBatch:
    """Reduce a batch that has passed every step to what its unit file holds.

    Args:
        batch: n rows at the end of the job.
        text_column: Its text column.
        original: The n texts as they were read.

    Returns:
        Fates, stage, reason, error, edits, attributes, and the new text of the rows that changed.
    """
    text = batch.column(text_column)
    if text is original or text.equals(original):
        changed = pa.repeat(pa.scalar(False), batch.num_rows)
        new = pa.nulls(batch.num_rows, pa.string())
    else:
        same = pc.fill_null(pc.equal(text, original), False)
        both_null = pc.and_(pc.is_null(text), pc.is_null(original))
        changed = pc.invert(pc.or_(same, both_null))
        new = pc.if_else(changed, text, pa.scalar(None, text.type))
    columns = {
        name: batch.column(name)
        for name in batch.schema.names
        if name.startswith(flight.PREFIX) and not name.startswith(flight.SCRATCH_PREFIX)
    }
    return pa.RecordBatch.from_pydict(
        {**columns, CHANGED: changed, NEW_TEXT: new},
    ).replace_schema_metadata(batch.schema.metadata)
