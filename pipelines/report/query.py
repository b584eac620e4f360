"""Picking rows of any table by a SQL condition, streaming, with errors a person can act on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError

if TYPE_CHECKING:
    import polars as pl

_SINGLE_EQUALS = re.compile(r"==")


def pick(batches: Iterable[pa.RecordBatch], where: str | None) -> Iterator[pa.RecordBatch]:
    """Keep the rows for which a condition holds.

    Args:
        batches: Of one table.
        where: A SQL condition over its columns, as polars understands it (`toxicity_after > 0.3 AND action = 'flag'`,
            `value.score >= 0.5`, `text ILIKE '%refund%'`); None keeps all.

    Raises:
        InputError: The condition is not one, or names a column there is not.
    """
    if where is None:
        yield from batches
        return
    keep = condition(where)
    for batch in batches:
        kept = batch.filter(keep(batch))
        if kept.num_rows:
            yield kept


def condition(where: str) -> Callable[[pa.RecordBatch], pa.Array]:
    """Compile a condition to a function from a batch of n rows to n booleans.

    Raises:
        InputError: It is not a condition; the function raises it for a column there is not.
    """
    import polars as pl

    text = _SINGLE_EQUALS.sub("=", where)
    try:
        expression = pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"not a condition: {where} ({_line(error)}); quote text with '...'") from error

    def keep(batch: pa.RecordBatch) -> pa.Array:
        frame = _frame(batch)
        try:
            mask = frame.select(expression.alias("keep")).get_column("keep")
        except pl.exceptions.ColumnNotFoundError as error:
            what = _line(error).partition(";")[0].replace("unable to find", "there is no")
            raise InputError(f"{what}; columns: {', '.join(batch.schema.names)}") from error
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise InputError(f"the condition {where} cannot be applied: {_line(error)}") from error
        if mask.dtype != pl.Boolean:
            raise InputError(f"{where} gives {mask.dtype}, not true or false; compare it with something")
        if len(mask) == 1 and len(frame) != 1:  # a condition over no column at all
            mask = mask.new_from_index(0, len(frame))
        return pc.fill_null(pa.array(mask.to_list(), pa.bool_()), False)

    return keep


def _frame(batch: pa.RecordBatch) -> pl.DataFrame:
    import polars as pl

    columns: dict[str, pa.Array] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        # Dictionary columns are compared as the text they stand for.
        values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        columns.setdefault(name, values)
    frame = pl.from_arrow(pa.table(columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
