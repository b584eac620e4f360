"""Commit: a unit's result is written once, atomically, and then its receipt. No receipt, no unit.

    _tamis/units/<shard>/<unit>.arrow      the delta (transforms.shards.deltas)
    _tamis/receipts/<shard>/<unit>.json    counts, plan key, digest of the delta

Both are written under a temporary name and renamed. A kill between the two leaves a delta without receipt, which is
written again; a bundle retried by the runner writes the same bytes again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from schemas import flight
from schemas.errors import OutputError
from transforms.shards.deltas import CHANGED, unit_file
from transforms.shards.files import Folder
from transforms.shards.keys import ShardKey
from transforms.shards.plan import Plan, plan_key

UNITS, RECEIPTS, SHARDS = "_tamis/units", "_tamis/receipts", "_tamis/shards"
COUNTERS = b"tamis.counters"
ORIGINAL = "original"  # scratch column: the text as it was read


class Receipt(NamedTuple):
    """Proof that a unit is done."""

    shard: str
    unit: int
    first_row: int
    rows: int
    kept: int
    dropped: int
    dead: int
    changed: int
    edits: int
    key: str
    digest: str
    text_bytes: int
    counters: dict[str, int]

    def dumps(self) -> bytes:
        """As JSON."""
        return orjson.dumps(self._asdict())

    @classmethod
    def loads(cls, content: bytes) -> Receipt:
        """From JSON."""
        return cls(**orjson.loads(content))


def counters_of(batch: pa.RecordBatch) -> Counter[str]:
    """Counters that ride in a batch's schema metadata."""
    raw = (batch.schema.metadata or {}).get(COUNTERS)
    return Counter(orjson.loads(raw)) if raw else Counter()


def with_counters(batch: pa.RecordBatch, counters: Counter[str]) -> pa.RecordBatch:
    """The batch with these counters riding along."""
    metadata = {**(batch.schema.metadata or {}), COUNTERS: orjson.dumps(dict(counters))}
    return batch.replace_schema_metadata(metadata)


def unit_name(shard: str, unit: int) -> str:
    """Path of a unit's delta inside the output folder."""
    return f"{UNITS}/{shard}/{unit:06d}.arrow"


def receipt_name(shard: str, unit: int) -> str:
    """Path of a unit's receipt inside the output folder."""
    return f"{RECEIPTS}/{shard}/{unit:06d}.json"


def commit_unit(
    output: Folder, key: ShardKey, batch: pa.RecordBatch, text_column: str, plan_key: str
) -> Receipt:
    """Write a finished unit and its receipt.

    Raises:
        OSError: The disk is full, or the store cannot be written.
    """
    original = flight.scratch(batch, ORIGINAL)
    delta = unit_file(batch, text_column, original)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, delta.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_batch(delta)
    content = sink.getvalue().to_pybytes()  # S3's client takes no other buffer
    output.write(unit_name(key.shard, key.unit), content)
    row_fates = batch.column(flight.FATE).to_numpy(zero_copy_only=False)
    changed = delta.column(CHANGED).to_numpy(zero_copy_only=False) & (row_fates == flight.KEPT)
    fates = np.bincount(row_fates, minlength=3)
    receipt = Receipt(
        shard=key.shard,
        unit=key.unit,
        first_row=key.first_row,
        rows=batch.num_rows,
        kept=int(fates[flight.KEPT]),
        dropped=int(fates[flight.DROPPED]),
        dead=int(fates[flight.DEAD]),
        changed=int(changed.sum()),
        edits=int(pc.sum(pc.list_value_length(delta.column(flight.EDITS))).as_py() or 0),
        key=plan_key,
        digest=xxhash.xxh3_64_hexdigest(content),
        text_bytes=original.nbytes,
        counters=dict(counters_of(batch)),
    )
    output.write(receipt_name(key.shard, key.unit), receipt.dumps())
    return receipt


def load_unit(output: Folder, receipt: Receipt) -> pa.RecordBatch:
    """Read a committed delta back.

    Raises:
        OutputError: Its bytes are not those the receipt was written for. The receipt is gone then, so that the next
            run does the unit again.
    """
    content = output.read(unit_name(receipt.shard, receipt.unit))
    if xxhash.xxh3_64_hexdigest(content) != receipt.digest:
        remove_receipts(output, [receipt])
        raise OutputError(
            f"{unit_name(receipt.shard, receipt.unit)} is damaged (it does not match its receipt); "
            "run the same command again: the unit will be done again"
        )
    return pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)


def read_receipts(output: Folder, plan: Plan, config_hash: str) -> dict[tuple[str, int], Receipt]:
    """Receipts of this plan and configuration; any other, or a damaged one, is passed over: its unit is done again."""
    keys = {s.name: plan_key(s, config_hash) for s in plan.shards}
    units = {s.name: len(s.units) for s in plan.shards}
    deltas = set(output.find(UNITS))
    found: dict[tuple[str, int], Receipt] = {}
    for content in output.read_many(output.find(RECEIPTS)).values():
        try:
            receipt = Receipt.loads(content)
        except (ValueError, TypeError):  # damaged: a power cut may leave an empty file
            continue
        good = keys.get(receipt.shard) == receipt.key and receipt.unit < units[receipt.shard]
        if good and unit_name(receipt.shard, receipt.unit) in deltas:
            found[receipt.shard, receipt.unit] = receipt
    return found


def remove_receipts(output: Folder, receipts: Iterable[Receipt]) -> None:
    """Forget units, so that the next run does them again."""
    for receipt in receipts:
        output.remove(receipt_name(receipt.shard, receipt.unit))


def total(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """Sums over receipts: rows, kept, dropped, dead, changed, edits, and the counters."""
    sums: Counter[str] = Counter()
    counters: Counter[str] = Counter()
    for receipt in receipts:
        for name in ("rows", "kept", "dropped", "dead", "changed", "edits"):
            sums[name] += getattr(receipt, name)
        counters.update(receipt.counters)
    return {**sums, "counters": dict(counters)}
