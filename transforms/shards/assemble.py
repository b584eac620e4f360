"""Assemble: the units of a shard become that shard again, under the same name, with its sidecars."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas import flight
from schemas.columns import is_text, to_plain_text
from schemas.edits import EDIT_SCHEMA
from schemas.errors import InputError
from schemas.fingerprint import fingerprint
from transforms.shards.deltas import DeltaCursor, pick_rows
from transforms.shards.files import TEMPORARY, Folder, copy_file, is_unchanged, sidecar_name
from transforms.shards.formats import Assembled, AssembleOptions, get_format
from transforms.shards.plan import ShardPlan
from transforms.shards.receipts import SHARDS, Receipt, load_unit, total

_REMOVED_HEAD = ("shard", "row", "id", "stage", "reason", "error")
_BLOCK = 8 << 20


def shard_receipt_name(shard: str) -> str:
    """Path of an assembled shard's receipt inside the output folder."""
    return f"{SHARDS}/{shard}.json"


def assemble_shard(
    source: Folder,
    output: Folder,
    shard: ShardPlan,
    receipts: Sequence[Receipt],
    text_column: str,
    options: AssembleOptions,
) -> dict[str, Any]:
    """Write `data/<shard>` and its sidecars; returns the shard's entry of the manifest.

    An assembled shard carries a receipt too, so a resumed run leaves it alone when its units are the same.

    Raises:
        InputError: The source is not what was planned and read, or changed while it was written out.
    """
    receipts = sorted(receipts, key=lambda r: r.unit)
    mark = fingerprint(*(f"{r.key}:{r.digest}" for r in receipts), shard.fingerprint, repr(options))
    done = _done(output, shard.name, mark)
    if done is not None:
        return done
    sums = total(receipts)
    entry: dict[str, Any] = {
        "path": shard.name,
        "rows_in": shard.rows,
        "rows_kept": sums.get("kept", 0),
        "rows_dropped": sums.get("dropped", 0),
        "rows_dead": sums.get("dead", 0),
        "rows_changed": sums.get("changed", 0),
        "edits": sums.get("edits", 0),
        "schema_fingerprint": shard.schema,
        "source_fingerprint": shard.fingerprint,
    }
    if shard.error:
        entry |= {"rows_dead": 1, "error": shard.error, "bytes": 0, "sha256": "", "copied": False}
        _write_unreadable(output, shard)
        _forget_data(output, shard.name)
    else:
        _check_unchanged(source, shard)
        sidecars = _write_sidecars(output, shard, receipts)
        entry |= _write_data(source, output, shard, receipts, text_column, options)
        try:
            _check_unchanged(source, shard)
        except InputError:
            _forget_data(output, shard.name)
            raise
        entry |= sidecars
    output.write(shard_receipt_name(shard.name), orjson.dumps({"mark": mark, "entry": entry}))
    return entry


def _check_unchanged(source: Folder, shard: ShardPlan) -> None:
    # Rows added behind the planned ones, or texts changed in place, would show nowhere else.
    if not is_unchanged(source, shard.name, shard.size, shard.stamp, shard.fingerprint):
        raise InputError(f"{shard.name}: it changed while the job ran; run the same command again")


def _done(output: Folder, name: str, mark: str) -> dict[str, Any] | None:
    path = shard_receipt_name(name)
    if not output.exists(path):
        return None
    saved = orjson.loads(output.read(path))
    entry: dict[str, Any] = saved["entry"]
    whole = entry.get("error") or output.exists(f"data/{name}")
    return entry if saved["mark"] == mark and whole else None


def _write_data(
    source: Folder,
    output: Folder,
    shard: ShardPlan,
    receipts: Sequence[Receipt],
    text_column: str,
    options: AssembleOptions,
) -> dict[str, Any]:
    target = f"data/{shard.name}"
    untouched = all(r.changed == r.dropped == r.dead == 0 for r in receipts)
    removed: dict[str, list[pa.Table]] = {}
    if untouched and options.keeps_source:
        copy_file(source, shard.name, output, target)
        assembled = Assembled(shard.rows, shard.schema)
    else:
        by_unit = {r.unit: r for r in receipts}
        cursor = DeltaCursor(
            [u.first_row for u in shard.units],
            [u.rows for u in shard.units],
            lambda i: load_unit(output, by_unit[shard.units[i].unit]),
        )

        def on_removed(table: pa.Table, rows: Sequence[int]) -> None:
            removed.setdefault("rows", []).append(table.append_column(flight.ROW, pa.array(rows, pa.int64())))

        with output.publish(target) as path:
            assembled = get_format(shard.format).assemble(
                source, shard.name, shard.units, cursor, path, text_column, options, on_removed
            )
    _write_removed(output, shard, receipts, removed.get("rows", []))
    size, sha = _sha256(output, target)
    return {
        "rows_kept": assembled.rows,
        "schema_fingerprint": assembled.schema_fingerprint,
        "bytes": size,
        "sha256": sha,
        "copied": untouched and options.keeps_source,
    }


def _write_sidecars(output: Folder, shard: ShardPlan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Edits, and every attribute (aligned with the rows of `data/`), streamed unit by unit."""
    side = sidecar_name(shard.name)
    names: set[str] = set()
    ids: set[int] = set()
    duplicates = 0
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}

        def write(name: str, table: pa.Table) -> None:
            if name not in writers:
                path = stack.enter_context(output.publish(f"{name}/{side}"))
                writers[name] = stack.enter_context(
                    pq.ParquetWriter(path, table.schema, **_sidecar_settings(table.schema))
                )
            if table.num_rows:
                writers[name].write_table(table.cast(writers[name].schema))

        for receipt in receipts:
            unit = load_unit(output, receipt)
            for id_ in unit.column(flight.ID).to_pylist():
                key = hash(id_)  # 8 bytes an id, whatever its length
                duplicates += key in ids
                ids.add(key)
            if receipt.edits:
                write("edits", _edit_rows(unit, shard.name))
            kept = unit
            if receipt.dropped or receipt.dead:
                kept = unit.filter(pc.equal(unit.column(flight.FATE), flight.KEPT))
            for column in unit.schema.names:
                if column.startswith(flight.ATTRIBUTE_PREFIX):
                    name = column.removeprefix(flight.ATTRIBUTE_PREFIX)
                    names.add(name)
                    write(
                        f"attributes/{name}",
                        pa.table(
                            {
                                "id": kept.column(flight.ID),
                                "row": kept.column(flight.ROW),
                                "value": kept.column(column),
                            }
                        ),
                    )
    if not any(r.edits for r in receipts):
        output.remove(f"edits/{side}")
    return {"attributes": sorted(names), "duplicate_ids": duplicates}


def _sidecar_settings(schema: pa.Schema) -> dict[str, Any]:
    """How a sidecar is written: zstd, but vectors of floats as they are.

    They hardly compress (measured on 384 float32: 7 %), and unpacking them would take eight times as long as reading.
    """
    plain = [
        f.name
        for f in schema
        if pa.types.is_fixed_size_list(f.type) and pa.types.is_floating(f.type.value_type)
    ]
    if not plain:
        return {"compression": "zstd"}
    others = [f.name for f in schema if f.name not in plain]
    codecs = dict.fromkeys(others, "zstd") | {f"{name}.list.element": "none" for name in plain}
    return {"compression": codecs, "use_dictionary": others}


def _edit_rows(unit: pa.RecordBatch, shard: str) -> pa.Table:
    """Explode the edits of a unit to one row per edit."""
    lists = unit.column(flight.EDITS)
    parents = pc.list_parent_indices(lists)
    flat = pc.list_flatten(lists)
    columns: list[pa.Array] = [
        pa.repeat(pa.scalar(shard), len(flat)),
        unit.column(flight.ROW).take(parents),
        unit.column(flight.ID).take(parents),
        *(pc.struct_field(flat, f.name) for f in flat.type),
    ]
    return pa.Table.from_arrays(columns, schema=EDIT_SCHEMA)


def _write_removed(
    output: Folder, shard: ShardPlan, receipts: Sequence[Receipt], sources: list[pa.Table]
) -> None:
    """Dropped and dead rows, whole, with their reasons and whatever attributes they had."""
    side = sidecar_name(shard.name)
    if not sources:
        output.remove(f"dropped/{side}")
        output.remove(f"dead/{side}")
        return
    facts = pa.concat_tables(
        [pa.Table.from_batches([u]) for u in _removed_facts(output, receipts)], promote_options="default"
    )
    whole = pa.concat_tables(sources)
    # Units and source chunks both run in row order, so the facts and the rows stand in the same order.
    fates = facts.column(flight.FATE).to_numpy()
    for folder, fate in (("dropped", flight.DROPPED), ("dead", flight.DEAD)):
        some = pick_rows(facts, fates == fate)
        if some.num_rows == 0:
            output.remove(f"{folder}/{side}")
            continue
        rows = pick_rows(whole, fates == fate)
        columns: dict[str, Any] = {"shard": pa.repeat(pa.scalar(shard.name), some.num_rows)}
        for name in _REMOVED_HEAD[1:]:
            columns[name] = some.column(flight.PREFIX + name)
        for name in rows.schema.names:
            if name != flight.ROW:
                columns[name if name not in columns else f"source.{name}"] = rows.column(name)
        for name in some.schema.names:
            if name.startswith(flight.ATTRIBUTE_PREFIX):
                columns["attribute." + name.removeprefix(flight.ATTRIBUTE_PREFIX)] = some.column(name)
        with output.publish(f"{folder}/{side}") as path:
            pq.write_table(_storable(pa.table(columns)), path, compression="zstd")


def _storable(table: pa.Table) -> pa.Table:
    """The table as any reader can take it.

    Columns of types Parquet does not know (unions, run-end encoding, intervals) become text; text that is not UTF-8,
    for which a row may well have died, becomes bytes.
    """
    for i, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type) and table.column(i).null_count:
            # pyarrow writes null lists of a fixed size, but cannot read them back before version 26.
            table = table.set_column(i, field.name, table.column(i).cast(pa.list_(field.type.value_field)))
            continue
        if is_text(field.type):
            try:
                table.column(i).validate(full=True)
            except pa.ArrowInvalid:
                raw = to_plain_text(table.column(i)).cast(pa.large_binary())
                table = table.set_column(i, field.name, raw)
            continue
        try:
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            values = [None if v is None else str(v) for v in table.column(i).to_pylist()]
            table = table.set_column(i, field.name, pa.array(values, pa.string()))
    return table


def _removed_facts(output: Folder, receipts: Sequence[Receipt]) -> Iterator[pa.RecordBatch]:
    for receipt in receipts:
        if receipt.dropped or receipt.dead:
            unit = load_unit(output, receipt)
            yield unit.filter(pc.not_equal(unit.column(flight.FATE), flight.KEPT))


def _write_unreadable(output: Folder, shard: ShardPlan) -> None:
    """A shard nothing can be read of: one dead entry, row -1, that names the file."""
    table = pa.table(
        {
            "shard": [shard.name],
            "row": pa.array([-1], pa.int64()),
            "id": [f"{shard.name}#-1"],
            "stage": ["ReadShard"],
            "reason": pa.nulls(1, pa.string()),
            "error": [shard.error],
        }
    )
    with output.publish(f"dead/{sidecar_name(shard.name)}") as path:
        pq.write_table(table, path)


def _forget_data(output: Folder, shard: str) -> None:
    side = sidecar_name(shard)
    for name in (f"data/{shard}", f"edits/{side}", f"dropped/{side}"):
        output.remove(name)


def _sha256(output: Folder, name: str) -> tuple[int, str]:
    state, size = hashlib.sha256(), 0
    with output.open(name) as file:
        while block := file.read(_BLOCK):
            state.update(block)
            size += len(block)
    return size, state.hexdigest()


def remove_stale(output: Folder, entries: Sequence[Mapping[str, Any]], companions: Sequence[str]) -> None:
    """Remove all the manifest does not name, so that readers that list folders see only what counts.

    What is left over: outputs of shards the input no longer has, attributes no step makes any more, and the parts a
    killed run was writing.
    """
    named = {f"data/{c}" for c in companions}
    for entry in entries:
        side = sidecar_name(entry["path"])
        named |= {f"dropped/{side}", f"dead/{side}"}
        if not entry.get("error"):
            named |= {f"data/{entry['path']}", f"edits/{side}"}
            named |= {f"attributes/{name}/{side}" for name in entry["attributes"]}
    for folder in ("data", "edits", "attributes", "dropped", "dead"):
        for path in output.find(folder):
            if path not in named:
                output.remove(path)
    output.remove(TEMPORARY)


__all__ = ["assemble_shard", "remove_stale", "shard_receipt_name"]
