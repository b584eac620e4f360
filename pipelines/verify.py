"""`tamis verify`: is an output what its manifest says, and is every byte outside the recorded edits the input's?"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.columns import to_plain_text
from schemas.errors import OutputError
from transforms.edits import apply_edits
from transforms.shards.deltas import pick_rows
from transforms.shards.files import Folder, file_fingerprint, sidecar_name
from transforms.shards.finish import MANIFEST, SUCCESS
from transforms.shards.formats import format_of, get_format
from transforms.shards.formats.jsonl import line_object, splice
from transforms.shards.steps import describe

_BLOCK = 8 << 20


@dataclass
class Verdict:
    """What a verification found.

    Attributes:
        shards: Shards looked at.
        rows: Rows compared with the input.
        edited_rows: Rows whose text differs from the input's, each explained by its edits.
        bytes_outside_edits: Bytes of text outside edits, all equal to the input's when `problems` is empty.
        problems: One line each; empty = the output is sound.
        compared: Whether the input was at hand.
    """

    shards: int = 0
    rows: int = 0
    edited_rows: int = 0
    bytes_outside_edits: int = 0
    problems: list[str] = field(default_factory=list)
    compared: bool = False


def verify_output(url: str, *, compare: bool = True, options: dict[str, Any] | None = None) -> Verdict:
    """Check an output folder.

    Args:
        url: The output folder.
        compare: Also replay the edits over the input and compare every row.
        options: fsspec options, used for both.

    Raises:
        OutputError: The folder is not a finished output.
    """
    output = Folder(url, **(options or {}))
    if not output.exists(MANIFEST) or not output.exists(SUCCESS):
        raise OutputError(
            f"{url} is not a finished tamis output (manifest.json and _SUCCESS are not both there)"
        )
    manifest = orjson.loads(output.read(MANIFEST))
    verdict = Verdict()
    named = {s["path"] for s in manifest["shards"] if not s.get("error")} | set(
        manifest.get("companions", ())
    )
    for path in output.find("data"):
        if path.removeprefix("data/") not in named:
            verdict.problems.append(f"{path}: not named by the manifest")
    for entry in manifest.get("tables", ()):  # side tables of a job that rewrites no corpus
        problem = _check_bytes(output, entry["path"], entry["bytes"], entry["sha256"])
        verdict.problems += [problem] if problem else []
    compare = compare and "input" in manifest  # what was not made of one corpus is not compared with one
    source = Folder(manifest["input"]["root"] if "input" in manifest else url, **(options or {}))
    verdict.compared = compare and source.exists()
    if compare and not verdict.compared:
        verdict.problems.append(
            f"the input {source.url} is not there to compare with (pass --no-input to leave it out)"
        )
    for entry in manifest["shards"]:
        if entry.get("error"):
            continue
        verdict.shards += 1
        problem = _check_file(output, entry)
        if problem:
            verdict.problems.append(problem)
        elif verdict.compared:
            try:
                _compare(source, output, entry, manifest["input"]["text_column"], verdict)
            except (ValueError, KeyError, pa.ArrowException) as error:
                verdict.problems.append(f"{entry['path']}: {error}")
            except OSError as error:
                verdict.problems.append(
                    f"{entry['path']}: cannot be compared with the input: {describe(error)}"
                )
    verdict.problems += _check_index(output, manifest.get("index"))
    return verdict


def _check_index(output: Folder, entry: dict[str, Any] | None) -> list[str]:
    """The files of an index against their hashes."""
    problems = []
    for part in [*entry["parts"], entry["ids"]] if entry else []:
        name = f"{entry['folder']}/{part['file']}" if entry else ""
        problems.append(_check_bytes(output, name, part["bytes"], part["sha256"]))
    return [p for p in problems if p]


def _check_file(output: Folder, entry: dict[str, Any]) -> str | None:
    return _check_bytes(output, f"data/{entry['path']}", entry["bytes"], entry["sha256"])


def _check_bytes(output: Folder, name: str, bytes_: int, sha256: str) -> str | None:
    if not output.exists(name):
        return f"{name}: missing"
    state, size = hashlib.sha256(), 0
    with output.open(name) as file:
        while block := file.read(_BLOCK):
            state.update(block)
            size += len(block)
    if size != bytes_:
        return f"{name}: {size} bytes, the manifest says {bytes_}"
    if state.hexdigest() != sha256:
        return f"{name}: its sha256 is not the manifest's"
    return None


def _compare(
    source: Folder, output: Folder, entry: dict[str, Any], text_column: str, verdict: Verdict
) -> None:
    name = entry["path"]
    if file_fingerprint(source, name) != entry["source_fingerprint"]:
        raise ValueError("the input has changed since the run; nothing can be said about this shard")
    format_ = get_format(str(format_of(name)))
    side = sidecar_name(name)
    removed = {int(r) for folder in ("dropped", "dead") for r in _column(output, f"{folder}/{side}", "row")}
    edits: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for edit in _rows(output, f"edits/{side}", ["row", "start", "end", "before", "after"]):
        edits[edit["row"]].append(edit)
    written = _Rows(format_.scan(output.child("data"), name))
    row = 0
    for chunk in format_.scan(source, name):
        keep = np.array([row + i not in removed for i in range(chunk.num_rows)], bool)
        numbers = np.arange(row, row + chunk.num_rows)[keep]
        row += chunk.num_rows
        before = pick_rows(chunk, keep)
        if not before.num_rows:  # all of it was dropped; there may not even be anything to take from
            continue
        after = written.take(before.num_rows)
        if format_.name == "jsonl":
            _compare_lines(before, after, numbers, edits, text_column, verdict)
        else:
            _compare_columns(before, after, numbers, edits, text_column, verdict)
    if written.take(1).num_rows:
        raise ValueError("it has more rows than the input less what was dropped")
    for folder in output.find("attributes"):
        if folder.endswith(f"/{side}"):
            rows = len(_column(output, folder, "row"))
            if rows != entry["rows_kept"]:
                raise ValueError(f"{folder} has {rows} rows, data has {entry['rows_kept']}")


def _compare_lines(
    before: pa.Table,
    after: pa.Table,
    numbers: np.ndarray,
    edits: dict[int, list[dict[str, Any]]],
    text_column: str,
    verdict: Verdict,
) -> None:
    pairs = zip(
        numbers.tolist(), before.column("raw").to_pylist(), after.column("raw").to_pylist(), strict=True
    )
    for number, old, new in pairs:
        verdict.rows += 1
        changes = [e for e in edits.get(number, ()) if e["before"] != e["after"]]
        expected = old
        outside = len(old)
        if changes:
            text = line_object(old)[text_column]
            expected = splice(old, text_column, apply_edits(text, changes))
            outside = len(old) - sum(len(e["before"].encode()) for e in changes)
            verdict.edited_rows += 1
        if expected.strip() != new.strip():
            raise ValueError(f"row {number} differs from the input outside its recorded edits")
        verdict.bytes_outside_edits += outside


def _compare_columns(
    before: pa.Table,
    after: pa.Table,
    numbers: np.ndarray,
    edits: dict[int, list[dict[str, Any]]],
    text_column: str,
    verdict: Verdict,
) -> None:
    if before.num_rows != after.num_rows:
        raise ValueError(f"{after.num_rows} rows where {before.num_rows} were expected")
    if not before.schema.equals(after.schema, check_metadata=True):
        raise ValueError("its schema is not the input's")
    for column in before.schema.names:
        if column != text_column and not _equal(before.column(column), after.column(column)):
            raise ValueError(f"column '{column}' differs from the input's")
    old, new = to_plain_text(before.column(text_column)), to_plain_text(after.column(text_column))
    same = pc.or_(pc.fill_null(pc.equal(old, new), False), pc.and_(pc.is_null(old), pc.is_null(new)))
    different = np.flatnonzero(~same.to_numpy(zero_copy_only=False))
    outside = int(pc.sum(pc.binary_length(old)).as_py() or 0)
    for i in different.tolist():
        number = int(numbers[i])
        changes = edits.get(number, [])
        if not changes or apply_edits(old[i].as_py(), changes) != new[i].as_py():
            raise ValueError(f"row {number} differs from the input outside its recorded edits")
        outside -= sum(len(e["before"].encode()) for e in changes if e["before"] != e["after"])
        verdict.edited_rows += 1
    verdict.rows += before.num_rows
    verdict.bytes_outside_edits += outside


def _equal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    """Whether two columns hold the same, what is no number being the same as itself."""
    if a.equals(b):
        return True
    one, other = (pa.concat_arrays(c.chunks) if c.num_chunks else pa.array([], c.type) for c in (a, b))
    return _same(one, other)


def _same(a: pa.Array, b: pa.Array) -> bool:
    if a.type != b.type or len(a) != len(b):
        return False
    if a.equals(b):
        return True
    if isinstance(a, pa.ExtensionArray):
        return _same(a.storage, b.storage)
    if not a.is_null().equals(b.is_null()):
        return False
    type_ = a.type
    if pa.types.is_floating(type_):
        x, y = (v.cast(pa.float64()).to_numpy(zero_copy_only=False) for v in (a, b))
        return bool(np.array_equal(x, y, equal_nan=True))
    if pa.types.is_struct(type_):
        return all(_same(x, y) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    if pa.types.is_map(type_):
        pairs = pa.list_(pa.struct([type_.key_field, type_.item_field]))
        return _same(a.cast(pairs), b.cast(pairs))
    if pa.types.is_dictionary(type_):
        return _same(a.dictionary_decode(), b.dictionary_decode())
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        lengths = (pc.list_value_length(v) for v in (a, b))
        return next(lengths).equals(next(lengths)) and _same(a.flatten(), b.flatten())
    return False


class _Rows:
    """Rows of a stream of tables, taken a number at a time."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: pa.Table | None = None

    def take(self, count: int) -> pa.Table:
        while self._rest is None or self._rest.num_rows < count:
            table = next(self._tables, None)
            if table is None:
                break
            self._rest = table if self._rest is None else pa.concat_tables([self._rest, table])
        if self._rest is None:
            return pa.table({})
        out, self._rest = self._rest.slice(0, count), self._rest.slice(count)
        return out


def _rows(output: Folder, name: str, columns: list[str]) -> list[dict[str, Any]]:
    if not output.exists(name):
        return []
    with output.open(name) as file:
        return pl.read_parquet(file, columns=columns).to_dicts()


def _column(output: Folder, name: str, column: str) -> list[Any]:
    return [r[column] for r in _rows(output, name, [column])]
