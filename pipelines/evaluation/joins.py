"""Joining what a job made with the rows it was made from: by id, by row, or by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.evaluation.tables import Table, distinct_ids, read_table
from pipelines.report.output import TEXT_ROWS, Output, read_schema
from schemas.errors import InputError, OutputError
from transforms.shards.files import Folder


@dataclass(frozen=True)
class JobRow:
    """What a job left of one input row.

    Attributes:
        text: Its text now; None where it was dropped or died.
        value: The attribute asked for; None where there is none.
        fate: kept | dropped | dead.
        edited: Whether its text was changed.
    """

    text: str | None
    value: Any
    fate: str
    edited: bool


@dataclass(frozen=True)
class JobRows:
    """Everything a finished job left, by input row.

    Attributes:
        url: The output folder.
        manifest: Its manifest.
        by_key: (shard, row) -> what is left of it.
        by_id: Row id -> the same.
        rows_in: Rows of its input, by shard, in order.
        twice: Ids that more than one row has.
    """

    url: str
    manifest: dict[str, Any]
    by_key: dict[tuple[str, int], JobRow]
    by_id: dict[str, JobRow]
    rows_in: dict[str, int]
    twice: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def align(
        self, table: Table, *, texts: Sequence[str | None], id_column: str | None
    ) -> list[JobRow | None]:
        """What the job left of each row of a table.

        By id where an id column is named; else by row, where the table holds as many rows as the job's input; else by
        text, where the job's input is still there to be read. Texts the job left alone are checked in any case.

        Args:
            table: n rows.
            texts: The n texts the job was given.
            id_column: A column of the table with the ids the job knows its rows by.

        Raises:
            InputError: The rows are not the job's.
        """
        if id_column is not None:
            ids = distinct_ids(table.column(id_column), table.source)
            twice = next((i for i in ids if i in self.twice), None)
            if twice is not None:
                raise InputError(
                    f"{self.url}: id '{twice}' stands there twice; leave --id-column out to join by row"
                )
            found: list[JobRow | None] = [self.by_id.get(i) for i in ids]
            if not any(found):
                raise InputError(
                    f"{self.url}: none of its ids is in column '{id_column}' of {table.source}; "
                    "was the job run with that --id-column?"
                )
        else:
            total = sum(self.rows_in.values())
            keys = [(shard, i) for shard, n in self.rows_in.items() for i in range(n)]
            if total == len(table):
                keys = table.keys if set(table.shards) == set(self.rows_in) else keys
                found = [self.by_key.get(k) for k in keys]
            else:
                where = self._places(table)
                found = [self.by_key.get(where[t]) if t and t in where else None for t in texts]
        for i, (row, text) in enumerate(zip(found, texts, strict=True)):
            if row is not None and row.fate == "kept" and not row.edited and (row.text or "") != (text or ""):
                raise InputError(
                    f"{self.url}: row {i} is not the text it was made from in {table.source}; "
                    "pass the job's own input, or --id-column"
                )
        return found

    def _places(self, table: Table) -> dict[str, tuple[str, int]]:
        """Where each text stood in the job's input.

        Raises:
            InputError: The input is gone.
        """
        problem = (
            f"{self.url} was made from {sum(self.rows_in.values()):,} rows, {table.source} has {len(table):,}; "
            "pass the job's own input, or --id-column"
        )
        root = Folder(self.manifest["input"]["root"], **self.options)
        column = str(self.manifest["input"]["text_column"])
        places: dict[str, tuple[str, int]] = {}
        for shard in self.rows_in:
            if not root.exists(shard):
                raise InputError(problem)
            for i, text in enumerate(read_table(root.path(shard), self.options).texts(column)):
                places.setdefault(text or "", (shard, i))
        return places


def read_job(url: str, *, attribute: str | None = None, options: Mapping[str, Any] | None = None) -> JobRows:
    """Read a finished output of tamis whole: texts, one attribute, and what was dropped or died.

    Args:
        url: The output folder.
        attribute: Name of an attribute to bring along.
        options: fsspec options of its filesystem.

    Raises:
        InputError: It has no such attribute.
        OutputError: It is not a finished output.
    """
    output = Output(url, options)
    manifest = output.require_manifest()
    if not output.finished:
        raise OutputError(f"{url} is not finished (no _SUCCESS); run its job again to finish it")
    if attribute is not None and not output.files(f"attributes/{attribute}"):
        known = ", ".join(output.attributes) or "none"
        raise InputError(f"{url} has no attribute '{attribute}' (attributes: {known})")
    column = str(manifest["input"]["text_column"])
    edited = _edited_rows(output)
    by_key: dict[tuple[str, int], JobRow] = {}
    by_id: dict[str, JobRow] = {}
    rows_in: dict[str, int] = {}
    twice: set[str] = set()
    for entry in manifest["shards"]:
        shard = str(entry["path"])
        rows_in[shard] = int(entry["rows_in"])
        for row, id_, made in _kept(output, shard, column, attribute, edited.get(shard, set()), entry):
            by_key[shard, row] = made
            if by_id.setdefault(id_, made) is not made:
                twice.add(id_)
        for fate in ("dropped", "dead"):
            for row, id_, made in _lost(output, shard, fate, attribute):
                by_key[shard, row] = made
                if by_id.setdefault(id_, made) is not made:
                    twice.add(id_)
    return JobRows(url, manifest, by_key, by_id, rows_in, frozenset(twice), dict(options or {}))


def is_output(url: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder is the output of a job (finished or not)."""
    folder = Folder(url, **(options or {}))
    return folder.exists("_tamis/plan.json") or (folder.exists("manifest.json") and folder.exists("data"))


def _edited_rows(output: Output) -> dict[str, set[int]]:
    """By shard, the rows whose text was changed."""
    found: dict[str, set[int]] = {}
    for _, batch in output.batches("edits", ["shard", "row", "action"]):
        for shard, row, action in zip(
            *(batch.column(c).to_pylist() for c in ("shard", "row", "action")), strict=True
        ):
            if action != "flag":
                found.setdefault(shard, set()).add(row)
    return found


def _kept(
    output: Output,
    shard: str,
    column: str,
    attribute: str | None,
    edited: set[int],
    entry: Mapping[str, Any],
) -> list[tuple[int, str, JobRow]]:
    texts: list[str | None] = []
    for batch in output.read(f"data/{shard}", batch_rows=TEXT_ROWS):
        index = batch.schema.get_field_index(column)
        texts += batch.column(index).to_pylist() if index >= 0 else [None] * batch.num_rows
    sidecar = _any_sidecar(output, shard, attribute)
    if sidecar is None:
        if len(texts) != int(entry["rows_in"]):
            raise InputError(
                f"{output.folder.url}: rows of {shard} were dropped and no attribute says which; run the job again"
            )
        rows, ids, values = (
            list(range(len(texts))),
            [f"{shard}#{i}" for i in range(len(texts))],
            [None] * len(texts),
        )
    else:
        rows, ids, values = [], [], []
        for batch in output.read(sidecar):
            rows += batch.column("row").to_pylist()
            ids += [str(x) for x in batch.column("id").to_pylist()]
            values += batch.column("value").to_pylist() if attribute else [None] * batch.num_rows
    return [
        (row, id_, JobRow(text, value, "kept", row in edited))
        for row, id_, text, value in zip(rows, ids, texts, values, strict=True)
    ]


def _any_sidecar(output: Output, shard: str, attribute: str | None) -> str | None:
    """A row-aligned file of the shard: of the attribute asked for, or of any."""
    for name in [attribute] if attribute else output.attributes:
        found = output.sidecar(f"attributes/{name}", f"data/{shard}")
        if found is not None:
            return found
    return None


def _lost(output: Output, shard: str, fate: str, attribute: str | None) -> list[tuple[int, str, JobRow]]:
    name = output.sidecar(fate, f"data/{shard}")
    if name is None:
        return []
    out: list[tuple[int, str, JobRow]] = []
    travelling = f"attribute.{attribute}" if attribute else ""
    index = read_schema(output.folder, name).get_field_index(travelling) if travelling else -1
    for batch in output.read(name, batch_rows=TEXT_ROWS):
        values: list[Any] = [None] * batch.num_rows
        if index >= 0 and not pa.types.is_null(batch.column(index).type):
            values = batch.column(index).to_pylist()
        for row, id_, value in zip(
            batch.column("row").to_pylist(), batch.column("id").to_pylist(), values, strict=True
        ):
            out.append((int(row), str(id_), JobRow(None, value, fate, True)))
    return out
