"""In-flight columns: what travels beside the text while a unit passes through the steps of a job.

A unit in flight is ONE `pa.RecordBatch`. Its first columns are those the job asked for (text, id), under the
user's own names. Behind them stand reserved columns, whose names begin with `_tamis.`, so kept, dropped and dead
rows, edits and attributes all ride row-aligned in the same batch and no second stream has to be joined:

    _tamis.row      int64            row number inside the shard
    _tamis.id       string           the row's id (its id column, or `<shard>#<row>`)
    _tamis.fate     int8             KEPT, DROPPED or DEAD; steps see only the KEPT rows
    _tamis.stage    string           the step that decided a fate other than KEPT
    _tamis.reason   string           drop reason (a short slug)
    _tamis.error    string           the error of a dead row
    _tamis.edits    list<EDIT>       every change made to the row so far (schemas.edits)
    _tamis.attr.X   any              attribute X: written as a row-aligned sidecar
    _tamis.tmp.X    any              scratch between steps; never written
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from schemas.edits import EDIT_TYPE

PREFIX = "_tamis."
ROW, ID, FATE = PREFIX + "row", PREFIX + "id", PREFIX + "fate"
STAGE, REASON, ERROR = PREFIX + "stage", PREFIX + "reason", PREFIX + "error"
EDITS = PREFIX + "edits"
ATTRIBUTE_PREFIX, SCRATCH_PREFIX = PREFIX + "attr.", PREFIX + "tmp."

KEPT, DROPPED, DEAD = 0, 1, 2

BASE_FIELDS = (
    pa.field(ROW, pa.int64(), nullable=False),
    pa.field(ID, pa.string(), nullable=False),
    pa.field(FATE, pa.int8(), nullable=False),
    pa.field(STAGE, pa.string()),
    pa.field(REASON, pa.string()),
    pa.field(ERROR, pa.string()),
    pa.field(EDITS, pa.list_(EDIT_TYPE)),
)


def launch(batch: pa.RecordBatch, *, first_row: int, ids: pa.Array) -> pa.RecordBatch:
    """Add the reserved columns to a batch fresh from its shard; every row is KEPT and unedited.

    Args:
        batch: n rows of the job's own columns (text and, if any, id).
        first_row: Row number, inside the shard, of the batch's first row.
        ids: n strings.

    Returns:
        The batch in flight.
    """
    n = batch.num_rows
    rows = pa.arange(first_row, first_row + n)
    columns = [
        rows,
        ids.cast(pa.string()),
        pa.repeat(pa.scalar(KEPT, pa.int8()), n),
        pa.nulls(n, pa.string()),
        pa.nulls(n, pa.string()),
        pa.nulls(n, pa.string()),
        pa.nulls(n, pa.list_(EDIT_TYPE)),
    ]
    schema = pa.schema([*batch.schema, *BASE_FIELDS])
    return pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema)


def set_column(
    batch: pa.RecordBatch, name: str, values: pa.Array, *, field: pa.Field | None = None
) -> pa.RecordBatch:
    """Replace a column, or append it if the batch has none of that name."""
    field = field or pa.field(name, values.type)
    index = batch.schema.get_field_index(name)
    if index < 0:
        return batch.append_column(field, values)
    return batch.set_column(index, field, values)


def attribute(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return attribute `name` of a batch in flight.

    Raises:
        KeyError: No step set that attribute.
    """
    return batch.column(ATTRIBUTE_PREFIX + name)


def set_attribute(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    """Set attribute `name`: n values of any Arrow type, written to `attributes/<name>/<shard>`."""
    return set_column(batch, ATTRIBUTE_PREFIX + name, values)


def scratch(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return scratch column `name` (KeyError if no step before set it)."""
    return batch.column(SCRATCH_PREFIX + name)


def set_scratch(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    """Set scratch column `name`, for a later step of the same job; it is never written."""
    return set_column(batch, SCRATCH_PREFIX + name, values)


def add_edits(batch: pa.RecordBatch, edits: Sequence[Sequence[Mapping[str, Any]]]) -> pa.RecordBatch:
    """Append edits to each row's record.

    Args:
        batch: n rows in flight.
        edits: For each row a list of mappings with the fields of `schemas.edits.EDIT_TYPE`; missing ones are null.
    """
    before = batch.column(EDITS).to_pylist()
    merged = [(old or []) + list(new) or None for old, new in zip(before, edits, strict=True)]
    return set_column(batch, EDITS, pa.array(merged, pa.list_(EDIT_TYPE)))


def drop_rows(batch: pa.RecordBatch, reasons: Sequence[str | None], *, stage: str) -> pa.RecordBatch:
    """Mark rows as dropped, each with a reason (a short slug such as `still_toxic`); None keeps the row.

    A dropped row leaves `data/`, stands whole in `dropped/`, and is seen by no later step.
    """
    fates = batch.column(FATE).to_pylist()
    stages, old = batch.column(STAGE).to_pylist(), batch.column(REASON).to_pylist()
    for i, reason in enumerate(reasons):
        if reason is not None:
            fates[i], stages[i], old[i] = DROPPED, stage, reason
    batch = set_column(batch, FATE, pa.array(fates, pa.int8()), field=BASE_FIELDS[2])
    batch = set_column(batch, STAGE, pa.array(stages, pa.string()))
    return set_column(batch, REASON, pa.array(old, pa.string()))


def kill_rows(batch: pa.RecordBatch, errors: Sequence[str | None], *, stage: str) -> pa.RecordBatch:
    """Mark rows as dead, each with its error; None leaves the row as it is.

    For a step that knows which of its rows failed (a server answered one request with garbage). A step that
    simply raises has its batch bisected by the engine, which then calls this for the culprits.
    """
    fates = batch.column(FATE).to_pylist()
    stages, old = batch.column(STAGE).to_pylist(), batch.column(ERROR).to_pylist()
    for i, error in enumerate(errors):
        if error is not None:
            fates[i], stages[i], old[i] = DEAD, stage, error
    batch = set_column(batch, FATE, pa.array(fates, pa.int8()), field=BASE_FIELDS[2])
    batch = set_column(batch, STAGE, pa.array(stages, pa.string()))
    return set_column(batch, ERROR, pa.array(old, pa.string()))
