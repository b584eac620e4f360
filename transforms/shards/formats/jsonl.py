"""JSON lines, plain, gzip or zstd: only the text's own literal is ever replaced, every other byte is copied.

A row's raw bytes reach from the end of the line before to its own newline, so blank lines, CRLF and a missing last
newline come back as they were.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import zstandard

from schemas.errors import InputError
from transforms.shards.deltas import DeltaCursor
from transforms.shards.files import Folder
from transforms.shards.formats.base import (
    Assembled,
    AssembleOptions,
    OnRemoved,
    ReadUnit,
    Survey,
    UnitLimits,
    UnitPlan,
)

_BOM = b"\xef\xbb\xbf"
_BLANK_LIMIT = 64  # a longer run of white space on one line is a row, and a dead one
_SAMPLE = 1000  # rows looked at before the text column is said to be missing
_BUFFER = 1 << 20
_SCAN_BYTES = 8 << 20
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.S)
_TOKEN = re.compile(_STRING.pattern + rb"|[\[\]{}]", re.S)
_ATOM = re.compile(rb"[^\s,\]}]+")
_QUOTE, _COMMA, _CLOSE = b'",}'
_SPACE = re.compile(rb"[ \t\r\n]*+")


class JsonlFormat:
    """JSON-lines shards."""

    name = "jsonl"

    def survey(
        self,
        folder: Folder,
        name: str,
        limits: UnitLimits,
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Survey:
        """Count lines and note where each unit begins; look at the first rows for the text column."""
        units: list[UnitPlan] = []
        first = rows = 0
        start = end = 0
        sample: list[bytes] = []
        with _stream(folder, name) as stream:
            for line in stream:
                end += len(line)
                if _is_blank(line):
                    continue
                rows += 1
                if len(sample) < _SAMPLE:
                    sample.append(line)
                if rows - first >= limits.rows or end - start >= limits.bytes:
                    units.append(UnitPlan(len(units), first, rows - first, end - start, start, end))
                    first, start = rows, end
        if rows > first:
            units.append(UnitPlan(len(units), first, rows - first, end - start, start, end))
        elif units and end > start:  # blank lines behind the last row
            units[-1] = units[-1]._replace(end=end)
        _check(sample, text_column, id_column, name)
        for column in extra:
            if sample and not any(column in row for row in map(line_object, sample)):
                fields = dict.fromkeys(key for row in map(line_object, sample) for key in row)
                raise InputError(f"{name}: no field '{column}' (fields: {', '.join(fields)})")
        return Survey(None, rows, tuple(units))

    def read(
        self,
        folder: Folder,
        name: str,
        units: Sequence[UnitPlan],
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Iterator[ReadUnit]:
        """Parse each line; one that cannot be parsed is a dead row with the reason."""
        for plan, raws in _raw_units(folder, name, units):
            texts: list[str | None] = []
            ids: list[str | None] = []
            errors: list[str | None] = []
            others: dict[str, list[str | None]] = {c: [] for c in extra if c not in (text_column, id_column)}
            for raw in raws:
                text, id_, error = _parse(raw, text_column, id_column)
                if others:
                    error = _parse_extra(raw, others) or error
                texts.append(text)
                ids.append(id_)
                errors.append(error)
            columns: dict[str, pa.Array] = {text_column: _text_array(texts)}
            if id_column and id_column != text_column:
                columns[id_column] = pa.array(ids, pa.string())
            columns |= {name: _text_array(values) for name, values in others.items()}
            failed = errors if any(errors) else None
            yield ReadUnit(plan, pa.RecordBatch.from_pydict(columns), failed)

    def scan(self, folder: Folder, name: str) -> Iterator[pa.Table]:
        """Read lines as they stand, as column `raw`, some megabytes at a time."""
        with _stream(folder, name) as stream:
            while lines := stream.readlines(_SCAN_BYTES):
                rows = [line for line in lines if not _is_blank(line)]
                yield pa.table({"raw": pa.array(rows, pa.binary())})

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
        """Copy lines, splicing new text into those that changed."""
        written = 0
        with _writer(target, name) as out:
            for plan, raws in _raw_units(folder, name, units):
                delta = cursor.take(plan.first_row, plan.rows)
                written += plan.rows - int(delta.removed.sum())
                if delta.is_empty:
                    out.writelines(raws)
                    continue
                if delta.removed.any():
                    rows = [int(r) for r in delta.removed.nonzero()[0]]
                    table = pa.table({"raw": pa.array([raws[r] for r in rows], pa.binary())})
                    on_removed(table, [plan.first_row + r for r in rows])
                for i, text in zip(delta.changed.tolist(), delta.texts.to_pylist(), strict=True):
                    raws[i] = splice(raws[i], text_column, text)
                out.writelines(raw for raw, gone in zip(raws, delta.removed, strict=True) if not gone)
        return Assembled(written, "")


def splice(raw: bytes, key: str, value: str | None) -> bytes:
    """Replace the value of a top-level key in one line of JSON; every other byte stays.

    Args:
        raw: The line, with whatever white space, BOM and newline it has.
        key: A key of the object (the last of equal keys, which is the one parsers keep).
        value: The new text; None writes null.

    Raises:
        KeyError: The object has no such key.
    """
    start, end = _value_span(raw, key)
    literal = json.dumps(value, ensure_ascii=raw.removeprefix(_BOM).isascii())
    return raw[:start] + literal.encode("utf-8") + raw[end:]


def _value_span(raw: bytes, key: str) -> tuple[int, int]:
    """Where the value of a top-level key stands, found without parsing (or recursing into) any other value."""
    span = None
    at = _skip(raw, raw.index(b"{") + 1)
    while raw[at] != _CLOSE:
        end = _value_end(raw, at)
        name = json.loads(raw[at:end])
        start = _skip(raw, _skip(raw, end) + 1)
        at = _value_end(raw, start)
        if name == key:
            span = (start, at)
        at = _skip(raw, at)
        if raw[at] == _COMMA:
            at = _skip(raw, at + 1)
    if span is None:
        raise KeyError(key)
    return span


def _value_end(raw: bytes, at: int) -> int:
    """Offset behind the value that begins at `at`, in a line already known to be JSON."""
    if raw[at] not in b"[{":
        return (_STRING if raw[at] == _QUOTE else _ATOM).match(raw, at).end()  # type: ignore[union-attr]
    depth = 0
    for token in _TOKEN.finditer(raw, at):
        first = raw[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth == 0:
            return token.end()
    raise ValueError(f"a bracket opened at byte {at} is not closed")


def _skip(raw: bytes, at: int) -> int:
    return _SPACE.match(raw, at).end()  # type: ignore[union-attr]


def _parse(raw: bytes, text_column: str, id_column: str | None) -> tuple[str | None, str | None, str | None]:
    """Text, id and error of one line."""
    try:
        row = orjson.loads(raw.removeprefix(_BOM) if raw[:3] == _BOM else raw)
    except orjson.JSONDecodeError as error:
        row, problem = _lenient(raw, error)
        if problem:
            return None, None, problem
    if not isinstance(row, dict):
        return None, None, f"not a JSON object but {type(row).__name__}"
    id_ = _id(row.get(id_column), raw, id_column) if id_column else None
    text = row.get(text_column)
    if text is None:
        error_text = None if text_column in row else f"no field '{text_column}' in this row"
        return None, id_, error_text
    if not isinstance(text, str):
        kind = "a number" if isinstance(text, _Number) else type(text).__name__
        return None, id_, f"field '{text_column}' is {kind}, not text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, id_, f"field '{text_column}' holds a lone surrogate, which is not text"
    return text, id_, None


def _parse_extra(raw: bytes, others: dict[str, list[str | None]]) -> str | None:
    """Append each extra field of a line as text (null where it has none); the error where one is no text."""
    row = line_object(raw)
    error = None
    for name, values in others.items():
        value = row.get(name)
        text: str | None = None
        if isinstance(value, str):
            text = value if _is_whole(value) else None
            error = error or (
                None if text is not None else f"field '{name}' holds a lone surrogate, which is not text"
            )
        elif isinstance(value, (dict, list)):
            error = error or f"field '{name}' is {type(value).__name__}, not text"
        elif value is not None:
            text = _id(value, raw, name)
        values.append(text)
    return error


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def line_object(raw: bytes) -> dict[str, Any]:
    """A line's object; an empty one where it holds none."""
    try:
        row = orjson.loads(raw.removeprefix(_BOM))
    except orjson.JSONDecodeError:
        row, _ = _lenient(raw)
    return row if isinstance(row, dict) else {}


@dataclass(frozen=True)
class _Number:
    """A number as it is written: any length, no digit lost."""

    literal: str


def _lenient(raw: bytes, error: Exception | None = None) -> tuple[Any, str | None]:
    """What Python's own parser accepts beyond the standard (NaN, lone surrogates) is not the user's loss."""
    try:
        text = raw.decode("utf-8-sig")
        return json.loads(text, parse_int=_Number, parse_float=_Number), None
    except UnicodeDecodeError as bad:
        return None, f"invalid UTF-8 at byte {bad.start} of the line"
    except RecursionError:
        return None, "JSON nested too deeply"
    except ValueError as bad:
        return None, f"invalid JSON: {error or bad}"


def _id(value: Any, raw: bytes, column: str) -> str | None:
    """A row's id as text; a number keeps its digits, which a float does not."""
    if isinstance(value, float):
        row, problem = _lenient(raw)
        value = value if problem else row[column]
    if value is None:
        return None
    if isinstance(value, _Number):
        return value.literal
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=lambda n: n.literal)
    return text.encode("utf-8", "backslashreplace").decode()


def _text_array(texts: list[str | None]) -> pa.Array:
    size = sum(len(t) for t in texts if t)
    return pa.array(texts, pa.string() if size * 4 < 2**31 else pa.large_string())


def _check(sample: list[bytes], text_column: str, id_column: str | None, name: str) -> None:
    """Say before work starts that no row looked at has the columns asked for.

    Raises:
        InputError: Rows were parsed, but none has text in the text column, or none has the id column.
        ValueError: No row could be parsed.
    """
    if not sample:
        return
    fields: dict[str, str] = {}
    lengths: dict[str, int] = {}
    usable = False
    for raw in sample:
        text, _, error = _parse(raw, text_column, None)
        usable = usable or text is not None or error is None
        if usable and (id_column is None or id_column in fields):
            return
        try:
            row = orjson.loads(raw.removeprefix(_BOM))
        except orjson.JSONDecodeError:
            row, _ = _lenient(raw)
        if isinstance(row, dict):
            for key, value in row.items():
                fields.setdefault(key, type(value).__name__)
                lengths[key] = lengths.get(key, 0) + (len(value) if isinstance(value, str) else 0)
    if usable and (id_column is None or id_column in fields):
        return
    if not fields:
        raise ValueError(f"none of the first {len(sample)} lines is a JSON object")
    if usable:
        raise InputError(
            f"{name}: no field '{id_column}' (fields: {', '.join(fields)}); pass another --id-column or none"
        )
    if text_column in fields:
        raise InputError(
            f"{name}: field '{text_column}' is {fields[text_column]}, not text; pass another --text-column"
        )
    # The longest strings are the likeliest text: the first field is more often an id.
    likeliest = max(lengths, key=lambda name: lengths[name], default=None)
    hint = (
        f"pass --text-column {likeliest}"
        if likeliest and lengths[likeliest]
        else "it has no text field at all"
    )
    raise InputError(f"{name}: no field '{text_column}' (fields: {', '.join(fields)}); {hint}")


def _is_blank(line: bytes) -> bool:
    return len(line) <= _BLANK_LIMIT and not line.strip()


def _rows(data: bytes) -> list[bytes]:
    """Split a unit's bytes into rows; blank lines go with the row behind them, the last ones with the row before."""
    rows: list[bytes] = []
    pending = b""
    for line in io.BytesIO(data):
        if _is_blank(line):
            pending += line
        else:
            rows.append(pending + line if pending else line)
            pending = b""
    if pending and rows:
        rows[-1] += pending
    return rows


def _raw_units(
    folder: Folder, name: str, units: Sequence[UnitPlan]
) -> Iterator[tuple[UnitPlan, list[bytes]]]:
    if not units:
        return
    with _stream(folder, name) as stream:
        _advance(stream, units[0].start, seekable=_codec(name) is None)
        for unit in units:
            data = stream.read(unit.end - unit.start)
            rows = _rows(data)
            if len(data) != unit.end - unit.start or len(rows) != unit.rows:
                raise InputError(
                    f"{name}: {len(rows)} rows where {unit.rows} were planned: it changed while the job ran; "
                    "run the same command again"
                )
            yield unit, rows


def _advance(stream: IO[bytes], count: int, *, seekable: bool) -> None:
    if seekable:
        stream.seek(count)
        return
    while count > 0:
        block = stream.read(min(count, _BUFFER))
        if not block:
            return
        count -= len(block)


def _codec(name: str) -> str | None:
    suffix = name.rpartition(".")[2].lower()
    return suffix if suffix in ("gz", "zst") else None


@contextmanager
def _stream(folder: Folder, name: str) -> Iterator[IO[bytes]]:
    with folder.open(name) as file:
        codec = _codec(name)
        if codec == "gz":
            with gzip.open(file) as unzipped:
                yield io.BufferedReader(unzipped, _BUFFER)  # type: ignore[type-var,arg-type]
        elif codec == "zst":
            # Arrow's reader, because zstandard's takes a truncated file for a short one.
            reader = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
            yield io.BufferedReader(reader, _BUFFER)  # type: ignore[arg-type]
        elif folder.is_local:
            yield file
        else:
            yield io.BufferedReader(file, _BUFFER)  # type: ignore[type-var]  # its own lines are slow, and not all there


@contextmanager
def _writer(target: Path, name: str) -> Iterator[IO[bytes]]:
    with target.open("wb") as file:
        codec = _codec(name)
        if codec == "gz":
            # No time stamp and no file name inside: the same rows give the same bytes.
            with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as zipped:
                yield zipped  # type: ignore[misc]
        elif codec == "zst":
            packed = zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
            with io.BufferedWriter(packed, _BUFFER) as buffered:  # type: ignore[type-var]
                yield buffered
        else:
            yield file
