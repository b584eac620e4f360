"""CSV and TSV as labelled sets come in: their rows as text, and one line for a file that cannot be read as such.

Read by Python's own reader: Arrow's takes a quote that is never closed for a field that holds the rest of the file, and
refuses a field longer than its block.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import pyarrow as pa

from schemas.errors import InputError

# A line put behind the last one. If it does not come back as a row of its own, it lies within quotes that are open.
_END = "\0tamis end of file\0"


def read_csv(
    stream: IO[str],
    name: str,
    wanted: Callable[[Sequence[str]], list[str]],
    *,
    delimiter: str = ",",
    first_row: int = 0,
    batch_rows: int = 1024,
) -> Iterator[pa.RecordBatch]:
    """Batches of rows, all columns text; an empty field is an empty text.

    Args:
        stream: The file, opened with `newline=""`.
        name: For messages.
        wanted: Chooses among the header's columns, or refuses them.
        delimiter: Between fields.
        first_row: Rows to leave out.
        batch_rows: Rows per batch, at most.

    Raises:
        InputError: It is not UTF-8, a row has not as many fields as the header, or a quote is never closed.
    """
    csv.field_size_limit(sys.maxsize)  # of the whole process, and by default too small for a long document
    reader = csv.reader(itertools.chain(stream, (_END,)), delimiter=delimiter)
    try:
        header = next((row for row in reader if row), [])
        header = [] if header == [_END] else header
        columns = wanted(header)
        twice = [c for c in columns if header.count(c) > 1]
        if twice:
            raise InputError(f"{name}: {header.count(twice[0])} columns are named '{twice[0]}'; rename one")
        schema = pa.schema([(c, pa.string()) for c in columns])
        places = [header.index(c) for c in columns]
        rows = itertools.islice(_rows(reader, len(header), name), first_row, None)
        while batch := list(itertools.islice(rows, batch_rows)):
            yield pa.RecordBatch.from_arrays([[row[i] for row in batch] for i in places], schema=schema)
    except UnicodeDecodeError as error:
        # All lines before the block that is decoded now have been read.
        line = reader.line_num + error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file first, such as: "
            "iconv -f latin1 -t utf-8 OLD > NEW"
        ) from error
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: no CSV ({error})") from error


def _rows(reader: Iterator[list[str]], width: int, name: str) -> Iterator[list[str]]:
    """The rows behind the header, each of the header's width; empty lines are none."""
    line = reader.line_num  # type: ignore[attr-defined]
    for row in reader:
        if row == [_END]:
            return
        began, line = line + 1, reader.line_num  # type: ignore[attr-defined]
        if row and row[-1].endswith(_END):
            raise InputError(
                f'{name}, line {began}: a quote is opened and never closed; close it, or double it ("") where it belongs '
                "to the text"
            )
        if row and len(row) != width:
            raise InputError(
                f"{name}, line {began}: {len(row)} fields, where the header has {width}; quote fields that hold a "
                "delimiter or a line break"
            )
        if row:
            yield row
