"""Opening what a job left behind: the manifest, the tables of an output folder, and shards in any format.

Everything streams: a table is read batch by batch, and only the columns (or nested leaves) that are asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import InputError, OutputError
from transforms.shards.files import Folder, sidecar_name
from transforms.shards.formats import format_of
from transforms.shards.formats.jsonl import line_object

BATCH_ROWS = 16_384  # of numbers
TEXT_ROWS = 512  # of texts, which may be long
_JSON_CHUNK = 2_048


class Output:
    """An output folder, local or at any fsspec URL, read through its manifest.

    Args:
        out: The folder, as the user named it.
        options: fsspec options of its filesystem.

    Raises:
        OutputError: There is no such folder.
    """

    def __init__(self, out: str, options: Mapping[str, Any] | None = None) -> None:
        self.folder = Folder(out, **(options or {}))
        if not self.folder.exists():
            raise OutputError(f"{out}: no such folder; pass the --output of a tamis job")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest; empty where the run has not finished."""
        return self.read_json("manifest.json") or {}

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The plan; empty where no job ever started here."""
        return self.read_json("_tamis/plan.json") or {}

    @property
    def finished(self) -> bool:
        """Whether `_SUCCESS` stands there."""
        return self.folder.exists("_SUCCESS")

    def require_manifest(self) -> dict[str, Any]:
        """The manifest, or one line on what to do where there is none.

        Raises:
            OutputError: The folder has no manifest.
        """
        if not self.manifest:
            url = self.folder.url
            what = "the run has not finished" if self.plan else "this is not the output of a tamis job"
            todo = f"see `tamis status {url}`" if self.plan else "pass the --output of one"
            raise OutputError(f"{url}: no manifest.json, so {what}; {todo}")
        return self.manifest

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the folder, None where there is no such file.

        Raises:
            OutputError: The file is not JSON.
        """
        if not self.folder.exists(name):
            return None
        try:
            value = orjson.loads(self.folder.read(name))
        except orjson.JSONDecodeError as error:
            raise OutputError(
                f"{self.folder.url}/{name}: not valid JSON ({error}); run the job again"
            ) from error
        return value if isinstance(value, dict) else None

    @cached_property
    def _listing(self) -> list[str]:
        # Not the whole folder: `_tamis` may hold a file for every unit.
        tables = ("data", "edits", "dropped", "dead", "attributes")
        return [n for t in tables for n in self.folder.find(t) if not _is_hidden(n)]

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes that were written."""
        return sorted(
            {n.split("/")[1] for n in self._listing if n.startswith("attributes/") and n.count("/") > 1}
        )

    @property
    def tables(self) -> list[str]:
        """Tables that hold at least one file: `data`, `edits`, `dropped`, `dead`, `attributes/<name>`."""
        plain = [t for t in ("data", "edits", "dropped", "dead") if self.files(t)]
        return plain + [f"attributes/{n}" for n in self.attributes]

    def files(self, table: str) -> list[str]:
        """Files of a table, relative to the folder; only those of shards the manifest names, where there is one."""
        prefix = table.rstrip("/") + "/"
        found = [n for n in self._listing if n.startswith(prefix) and format_of(n)]
        shards = [s["path"] for s in self.manifest.get("shards", []) if "path" in s]
        if not shards:
            return found
        known = {*shards, *map(sidecar_name, shards)}
        return [n for n in found if n[len(prefix) :] in known]

    def sidecar(self, table: str, shard_file: str) -> str | None:
        """The file of `table` that belongs to the same shard as `shard_file`, a file of another table."""
        parts = shard_file.split("/")
        rest = parts[2:] if parts[0] == "attributes" else parts[1:]
        name = f"{table}/{sidecar_name('/'.join(rest))}"
        return name if name in self._listing else None

    def batches(
        self, table: str, columns: Sequence[str] | None = None, *, batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Stream a table as (file, batch); `columns` may name nested leaves (`value.segments.list.element.score`)."""
        for name in self.files(table):
            for batch in read_batches(self.folder, name, columns, batch_rows=batch_rows):
                yield name, batch

    def read(
        self, name: str, columns: Sequence[str] | None = None, *, batch_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Stream one file of the folder."""
        return read_batches(self.folder, name, columns, batch_rows=batch_rows)

    def leaves(self, table: str) -> list[str]:
        """Dotted leaf columns of a Parquet table (its first file); empty where there is none."""
        for name in self.files(table):
            if format_of(name) == "parquet":
                with _parquet(self.folder, name) as file:
                    return [file.schema.column(i).path for i in range(len(file.schema))]
        return []

    def rows(self, table: str) -> int:
        """Number of rows of a Parquet table, from the footers."""
        total = 0
        for name in self.files(table):
            with _parquet(self.folder, name) as file:
                total += file.metadata.num_rows
        return total


def read_batches(
    folder: Folder, name: str, columns: Sequence[str] | None = None, *, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Stream one file as record batches, whatever its format.

    Args:
        folder: Where it lies.
        name: Its name there.
        columns: Columns or nested leaves to read; None reads all.
        batch_rows: Rows a batch, at most (JSONL: chunks of 2,048 lines).

    Raises:
        InputError: The file is not Parquet, Arrow IPC or JSONL, or is damaged.
    """
    format_ = format_of(name)
    if format_ is None:
        raise InputError(f"{name}: neither Parquet, Arrow IPC nor JSONL by its name; pass one of those")
    try:
        if format_ == "parquet":
            with _parquet(folder, name) as file:
                yield from file.iter_batches(
                    batch_size=batch_rows, columns=list(columns) if columns else None
                )
        elif format_ == "arrow":
            yield from _read_ipc(folder, name, columns)
        else:
            for rows in read_json_rows(folder, name):
                yield json_batch(rows, columns)
    except (pa.ArrowException, EOFError, OSError) as error:
        raise _unreadable(name, error) from error


def read_schema(folder: Folder, name: str) -> pa.Schema:
    """Arrow schema of one file (for JSONL, as inferred from its first lines)."""
    format_ = format_of(name)
    if format_ == "parquet":
        with _parquet(folder, name) as file:
            return file.schema_arrow
    for batch in read_batches(folder, name):
        return batch.schema
    return pa.schema([])


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


@contextmanager
def _parquet(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    with ExitStack() as stack:
        try:
            if folder.is_local:
                # No pre-buffering: a row group may be large, and pages are wanted one after the other.
                opened = pq.ParquetFile(folder.local(name), pre_buffer=False, buffer_size=1 << 20)
            else:
                opened = pq.ParquetFile(stack.enter_context(folder.open(name)))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(name, error) from error
        yield stack.enter_context(opened)


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: cannot be read ({' '.join(str(error).split())})")


def _read_ipc(folder: Folder, name: str, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with folder.open(name) as raw:
        magic = raw.read(6)
        raw.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(raw)
            batches: Iterator[pa.RecordBatch] = (
                reader.get_batch(i) for i in range(reader.num_record_batches)
            )
        else:
            batches = iter(pa.ipc.open_stream(raw))
        for batch in batches:
            yield batch.select(list(columns)) if columns else batch


def read_json_rows(folder: Folder, name: str) -> Iterator[list[dict[str, Any]]]:
    """Stream a JSONL file as chunks of its own objects, each with just the fields its line has.

    A line that is not a JSON object becomes one with the single field `_unreadable` or `_value`.
    """
    with folder.open(name) as raw, _unpacked(raw, name) as lines:
        chunk: list[dict[str, Any]] = []
        for line in lines:
            if line.strip():
                chunk.append(_json_row(line))
            if len(chunk) == _JSON_CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        if row := line_object(line):  # with a byte order mark, or numbers that JSON does not know
            return row
        return {"_unreadable": line.decode("utf-8", "replace").rstrip("\n")}
    return row if isinstance(row, dict) else {"_value": row}


def json_batch(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> pa.RecordBatch:
    """JSON objects as a batch; a field whose type differs between them is text, the JSON it was."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    if columns:
        names = [n for n in names if n in columns]
    arrays = []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays.append(pa.array(values))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            arrays.append(pa.array([None if v is None else orjson.dumps(v).decode() for v in values]))
    return pa.RecordBatch.from_arrays(arrays, names=names)


@contextmanager
def _unpacked(raw: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    if name.lower().endswith(".gz"):
        import gzip

        with gzip.open(raw, "rb") as lines:
            yield cast("IO[bytes]", lines)
    elif name.lower().endswith(".zst"):
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
            yield io.BufferedReader(reader)
    else:
        yield raw
