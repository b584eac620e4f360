"""JSON lines, plain, gzip or zstd: only the text's own literal is ever replaced, every other byte is copied.

A row's raw bytes reach from the end of the line before to its own newline, so blank lines, CRLF and a missing last
newline come back as they were.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
_LOOSE = json.JSONDecoder(strict=False)


class JsonlFormat:
    """JSON-lines shards."""

    name = "jsonl"

    def survey(
        self, folder: Folder, name: str, limits: UnitLimits, text_column: str, id_column: str | None
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
        _check(sample, text_column, name)
        return Survey(None, rows, tuple(units))

    def read(
        self, folder: Folder, name: str, units: Sequence[UnitPlan], text_column: str, id_column: str | None
    ) -> Iterator[ReadUnit]:
        """Parse each line; one that cannot be parsed is a dead row with the reason."""
        for plan, raws in _raw_units(folder, name, units):
            texts: list[str | None] = []
            ids: list[str | None] = []
            errors: list[str | None] = []
            for raw in raws:
                text, id_, error = _parse(raw, text_column, id_column)
                texts.append(text)
                ids.append(id_)
                errors.append(error)
            columns: dict[str, pa.Array] = {text_column: _text_array(texts)}
            if id_column and id_column != text_column:
                columns[id_column] = pa.array(ids, pa.string())
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
    line = raw.decode("utf-8")
    start, end = _value_span(line, key)
    literal = json.dumps(value, ensure_ascii=raw.removeprefix(_BOM).isascii())
    return (line[:start] + literal + line[end:]).encode("utf-8")


def _value_span(line: str, key: str) -> tuple[int, int]:
    span = None
    at = _skip(line, line.index("{") + 1)
    while line[at] != "}":
        name, at = _LOOSE.raw_decode(line, at)
        at = _skip(line, _skip(line, at) + 1)
        start = at
        _, at = _LOOSE.raw_decode(line, at)
        if name == key:
            span = (start, at)
        at = _skip(line, at)
        if line[at] == ",":
            at = _skip(line, at + 1)
    if span is None:
        raise KeyError(key)
    return span


def _skip(line: str, at: int) -> int:
    while line[at] in " \t\r\n":
        at += 1
    return at


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
    id_ = _scalar(row.get(id_column)) if id_column else None
    text = row.get(text_column)
    if text is None:
        error_text = None if text_column in row else f"no field '{text_column}' in this row"
        return None, id_, error_text
    if not isinstance(text, str):
        return None, id_, f"field '{text_column}' is {type(text).__name__}, not text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, id_, f"field '{text_column}' holds a lone surrogate, which is not text"
    return text, id_, None


def _lenient(raw: bytes, error: Exception) -> tuple[Any, str | None]:
    """What Python's own parser accepts beyond the standard (NaN, lone surrogates) is not the user's loss."""
    try:
        return json.loads(raw.decode("utf-8-sig")), None
    except UnicodeDecodeError as bad:
        return None, f"invalid UTF-8 at byte {bad.start} of the line"
    except ValueError:
        return None, f"invalid JSON: {error}"


def _scalar(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True)


def _text_array(texts: list[str | None]) -> pa.Array:
    size = sum(len(t) for t in texts if t)
    return pa.array(texts, pa.string() if size * 4 < 2**31 else pa.large_string())


def _check(sample: list[bytes], text_column: str, name: str) -> None:
    if not sample:
        return
    parsed = [_parse(raw, text_column, None) for raw in sample]
    if any(text is not None or error is None for text, _, error in parsed):
        return
    fields: dict[str, str] = {}
    for raw in sample:
        try:
            row = orjson.loads(raw.removeprefix(_BOM))
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            for key, value in row.items():
                fields.setdefault(key, type(value).__name__)
    if not fields:
        raise ValueError(f"none of the first {len(sample)} lines is a JSON object")
    if text_column in fields:
        raise InputError(
            f"{name}: field '{text_column}' is {fields[text_column]}, not text; pass another --text-column"
        )
    texts = [k for k, v in fields.items() if v == "str"]
    hint = f"pass --text-column {texts[0]}" if texts else "it has no text field at all"
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
                raise EOFError(
                    f"{name}: {len(rows)} rows where {unit.rows} were planned: it changed under the job"
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
    return "gz" if name.endswith(".gz") else "zst" if name.endswith(".zst") else None


@contextmanager
def _stream(folder: Folder, name: str) -> Iterator[IO[bytes]]:
    with folder.open(name) as file:
        codec = _codec(name)
        if codec == "gz":
            with gzip.open(file) as unzipped:
                yield io.BufferedReader(unzipped, _BUFFER)  # type: ignore[type-var,arg-type]
        elif codec == "zst":
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            yield io.BufferedReader(reader, _BUFFER)
        else:
            yield file


@contextmanager
def _writer(target: Path, name: str) -> Iterator[IO[bytes]]:
    with target.open("wb") as file:
        codec = _codec(name)
        if codec == "gz":
            # No time stamp and no file name inside: the same rows give the same bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped:
                yield zipped  # type: ignore[misc]
        elif codec == "zst":
            with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield file
