"""`tamis inspect`: schema and rows of any shard, folder of shards or output, in a terminal or as JSON lines."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.output import TEXT_ROWS, Output, json_batch, read_batches, read_json_rows, read_schema
from pipelines.report.query import condition
from schemas.columns import is_text
from schemas.errors import InputError
from schemas.fingerprint import schema_fingerprint
from transforms.shards.deltas import pick_rows
from transforms.shards.files import Folder
from transforms.shards.formats import format_of

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 7  # columns from which rows are shown as records, one field a line
_CELL = 300  # characters of a value shown in a table
_FIELD = 1_200  # characters of a value shown in a record
_COMPARED = 200  # shards whose schemas are compared


@dataclass(frozen=True)
class Files:
    """The files of one table.

    Attributes:
        folder: Where they lie.
        names: Their names there, in order.
        title: What to call the table.
        output: The output it belongs to, if it is part of one.
    """

    folder: Folder
    names: tuple[str, ...]
    title: str
    output: Output | None = None


def inspect_path(
    path: str,
    *,
    what: str = "head",
    where: str | None = None,
    table: str = "data",
    limit: int = 10,
    as_json: bool = False,
    options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> int:
    """Show the schema of a table, its first rows, or the rows for which a condition holds.

    Args:
        path: A shard, a folder of shards, a glob, or an output of tamis; local or any fsspec URL.
        what: `head`, `schema` or `where`.
        where: A SQL condition over the columns; needed for `where`, allowed with `head`.
        table: Of an output: `data`, `edits`, `dropped`, `dead` or `attributes/<name>`.
        limit: Rows to show at most.
        as_json: Print JSON lines with whole values.
        options: fsspec options of the filesystem.
        console: Where to print.

    Returns:
        Number of rows shown (`schema`: of columns).

    Raises:
        InputError: There is nothing there, no such table, or the condition cannot be applied.
    """
    from rich.console import Console

    console = console or Console()
    if what not in ("head", "schema", "where"):
        raise InputError(f"cannot inspect '{what}'; say head, schema or where")
    if what == "where" and not where:
        raise InputError("where needs a condition, for example: where \"text ILIKE '%refund%'\"")
    files = find_files(path, table, options)
    if what == "schema":
        return _show_schema(files, console, as_json=as_json)
    rows = list(iter_rows(files, where=where, limit=limit))
    if as_json:
        for row in rows:
            console.file.write(to_json(row).decode() + "\n")
    elif rows:
        _show_rows(rows, files.title, console)
    else:
        console.print("no rows" if where is None else "no row fulfils the condition", style="dim")
    return len(rows)


def find_files(path: str, table: str = "data", options: Mapping[str, Any] | None = None) -> Files:
    """The files of a table of an output, or of whatever else `path` names.

    Raises:
        InputError: There is nothing there, or no such table.
    """
    folder = Folder(path, **(options or {}))
    if folder.exists("_tamis") or (folder.exists("manifest.json") and folder.exists("data")):
        output = Output(path, options)
        names = output.files(table)
        if not names:
            tables = ", ".join(output.tables) or "none yet"
            raise InputError(f"{path} holds no table '{table}'; tables: {tables}")
        return Files(output.folder, tuple(names), table, output)
    if table != "data":
        raise InputError(f"{path} is not an output of tamis, so it has no table '{table}'; leave --table out")
    from transforms.shards.inputs import list_input

    listing = list_input(path, dict(options or {}))
    return Files(listing.root, tuple(s.name for s in listing.shards), path)


def iter_rows(
    files: Files, *, where: str | None = None, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a table as mappings, streamed; reading stops when the limit is reached.

    Raises:
        InputError: The condition cannot be applied, or a file cannot be read.
    """
    keep = condition(where) if where else None
    yield from itertools.islice(itertools.chain.from_iterable(_chunks(files, keep)), limit)


def _chunks(
    files: Files, keep: Callable[[pa.RecordBatch], pa.Array] | None
) -> Iterator[list[dict[str, Any]]]:
    for name in files.names:
        if format_of(name) == "jsonl":
            # The lines' own objects: in a batch every row would get every field of its neighbours.
            for rows in read_json_rows(files.folder, name):
                chosen = keep(json_batch(rows)).to_pylist() if keep else [True] * len(rows)
                yield [row for row, good in zip(rows, chosen, strict=True) if good]
        else:
            for batch in read_batches(files.folder, name, batch_rows=TEXT_ROWS):
                yield _to_rows(_chosen(batch, keep(batch)) if keep else batch)


def to_json(row: Mapping[str, Any]) -> bytes:
    """One row as one line of JSON: dates in ISO form, bytes as text where they are UTF-8, else as base64."""
    return orjson.dumps(
        dict(row), default=_plain, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    )


def _chosen(batch: pa.RecordBatch, wanted: pa.Array) -> pa.Table:
    mask = pc.fill_null(wanted, False).to_numpy(zero_copy_only=False)
    return pick_rows(pa.Table.from_batches([batch]), mask)


def _to_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    names = batch.schema.names
    columns = [column.to_pylist() for column in batch.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def _show_rows(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    names = list(dict.fromkeys(k for row in rows for k in row))
    nested = any(isinstance(v, dict | list) for row in rows for v in row.values())
    if len(names) >= _WIDE or (nested and len(names) > 3):
        _show_records(rows, names, console)
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", title_style="dim", show_edge=False, pad_edge=False)
    for name in names:
        long = any(len(_cell(row.get(name))) > 30 for row in rows)
        grid.add_column(Text(name), overflow="fold", ratio=1 if long else None, no_wrap=not long)
    for row in rows:
        grid.add_row(*(Text(_cut(_cell(row.get(n)), _CELL)) for n in names))
    console.print(grid)


def _show_records(rows: list[dict[str, Any]], names: list[str], console: Console) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for i, row in enumerate(rows):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name in names:
            if row.get(name) is not None:
                grid.add_row(Text(name), Text(_cut(_cell(row[name]), _FIELD)))
        console.rule(Text(f"{i + 1}"), align="left", style="dim")
        console.print(Padding(grid, (0, 0, 0, 1)))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return orjson.dumps(_rounded(value), default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()
    return str(_plain(value))


def _rounded(value: Any) -> Any:
    """Floats to four digits, for the eye only: float32 scores are full of noise digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _show_schema(files: Files, console: Console, *, as_json: bool) -> int:
    schema = read_schema(files.folder, files.names[0])
    facts = _facts(files, schema)
    if as_json:
        columns = [{"name": f.name, "type": str(f.type), "nullable": f.nullable} for f in schema]
        line = {"table": files.title, "columns": columns, "metadata": _metadata(schema), **facts}
        console.file.write(to_json(line).decode() + "\n")
        return len(schema)
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_edge=False, pad_edge=False, title=files.title, title_justify="left", title_style="dim")
    for name in ("column", "type", "null", ""):
        grid.add_column(name, overflow="fold")
    contract = (files.output.plan if files.output else {}) or {}
    for f in schema:
        notes = []
        if files.title == "data" and f.name == contract.get("text_column"):
            notes.append("text of the job")
        if files.title == "data" and f.name == contract.get("id_column"):
            notes.append("id")
        if not files.output and is_text(f.type):
            notes.append("text")
        grid.add_row(Text(f.name), Text(str(f.type)), "yes" if f.nullable else "no", ", ".join(notes))
    console.print(grid)
    for key, value in _metadata(schema).items():
        console.print(Text(f"metadata {key} = {_cut(value, _CELL)}", style="dim"))
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        console.print(Text(f"{key.replace('_', ' ')}: {shown}"))
    return len(schema)


def _facts(files: Files, schema: pa.Schema) -> dict[str, Any]:
    """Files, bytes, rows where footers tell, fingerprint, and the first shard whose schema is another."""
    facts: dict[str, Any] = {"files": len(files.names)}
    facts["bytes"] = sum(int(files.folder.fs.size(files.folder.path(n)) or 0) for n in files.names)
    formats = sorted({format_of(n) or "?" for n in files.names})
    facts["format"] = ", ".join(formats)
    if formats == ["parquet"]:
        facts["rows"] = sum(_parquet_rows(files.folder, n) for n in files.names)
    if "jsonl" in formats:
        facts["note"] = "JSONL has no schema of its own: types are read off the first lines"
        return facts
    mark = schema_fingerprint(schema)
    facts["schema_fingerprint"] = mark
    for name in files.names[1:_COMPARED]:
        other = read_schema(files.folder, name)
        if schema_fingerprint(other) != mark:
            facts["differs"] = f"{name}: {_difference(schema, other)}"
            break
    return facts


def _parquet_rows(folder: Folder, name: str) -> int:
    import pyarrow.parquet as pq

    try:
        with folder.open(name) as raw:
            return int(pq.read_metadata(raw).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: cannot be read ({' '.join(str(error).split())})") from error


def _difference(a: pa.Schema, b: pa.Schema) -> str:
    types = {f.name: str(f.type) for f in a}
    others = {f.name: str(f.type) for f in b}
    for name in [*types, *others]:
        if types.get(name) != others.get(name):
            return f"column '{name}' is {others.get(name, 'absent')}, not {types.get(name, 'absent')}"
    return "same columns, other metadata, order or nullability"


def _metadata(schema: pa.Schema) -> dict[str, str]:
    pairs = (schema.metadata or {}).items()
    return {
        k.decode("utf-8", "replace"): v.decode("utf-8", "replace") for k, v in pairs if k != b"ARROW:schema"
    }
