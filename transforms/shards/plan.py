"""The plan: the input listed once; every shard's rows, bytes, fingerprint and units, kept on disk for resuming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from schemas.errors import InputError
from schemas.fingerprint import fingerprint, schema_fingerprint
from transforms.shards.files import Folder, file_fingerprint, sidecar_name
from transforms.shards.formats import UnitLimits, UnitPlan, get_format
from transforms.shards.inputs import InputListing, ShardFile
from transforms.shards.steps import describe

PLAN = "_tamis/plan.json"
UNITS_PER_TASK = 16


class ReadTask(NamedTuple):
    """A run of consecutive units of one shard, read in one go."""

    shard: str
    first_unit: int
    units: int


@dataclass(frozen=True)
class ShardPlan:
    """What is to be done for one shard.

    Attributes:
        name: Path relative to the input root.
        format: Shard format.
        rows: Number of rows.
        size: Bytes of the file.
        stamp: Modification time at planning.
        fingerprint: Of its content.
        schema: Fingerprint of its Arrow schema, empty for JSONL.
        units: Its units, in row order.
        error: Why it cannot be read; such a shard has no units and ends in dead/.
    """

    name: str
    format: str
    rows: int
    size: int
    stamp: str
    fingerprint: str
    schema: str
    units: tuple[UnitPlan, ...]
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """All work of a run.

    Attributes:
        input_url: Input root.
        text_column: Column with the text.
        id_column: Column with ids, if any.
        limits: Largest unit.
        shards: What is to be done for each shard, in order.
        companions: Files copied along unchanged.
        ignored: Number of the input's files that are no shards and are left out.
        ignored_examples: Names of a few of these.
    """

    input_url: str
    text_column: str
    id_column: str | None
    limits: UnitLimits
    shards: tuple[ShardPlan, ...]
    companions: tuple[str, ...] = ()
    ignored: int = 0
    ignored_examples: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all readable shards."""
        return sum(s.rows for s in self.shards)

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(len(s.units) for s in self.shards)

    def tasks(self, done: set[tuple[str, int]], at_least: int = 1) -> Iterator[ReadTask]:
        """Read tasks for the units not done, at least so many where there are enough units."""
        todo = {s.name: [u.unit for u in s.units if (s.name, u.unit) not in done] for s in self.shards}
        count = sum(map(len, todo.values()))
        size = max(1, min(UNITS_PER_TASK, count // max(at_least, 1)))
        for shard, units in todo.items():
            start = 0
            while start < len(units):
                end = start + 1
                while end < len(units) and end - start < size and units[end] == units[end - 1] + 1:
                    end += 1
                yield ReadTask(shard, units[start], end - start)
                start = end

    def dumps(self) -> bytes:
        """As JSON."""
        shards = [
            {
                "path": s.name, "format": s.format, "rows": s.rows, "bytes": s.size, "stamp": s.stamp,
                "fingerprint": s.fingerprint, "schema": s.schema, "error": s.error,
                "units": [u._asdict() for u in s.units],
            }
            for s in self.shards
        ]  # fmt: skip
        return orjson.dumps(
            {
                "version": 1,
                "input": self.input_url,
                "text_column": self.text_column,
                "id_column": self.id_column,
                "unit_rows": self.limits.rows,
                "unit_bytes": self.limits.bytes,
                "companions": self.companions,
                "ignored": self.ignored,
                "ignored_examples": self.ignored_examples,
                "shards": shards,
            },
            option=orjson.OPT_INDENT_2,
        )

    @classmethod
    def loads(cls, content: bytes) -> Plan:
        """From JSON."""
        data: dict[str, Any] = orjson.loads(content)
        shards = tuple(
            ShardPlan(
                s["path"], s["format"], s["rows"], s["bytes"], s["stamp"], s["fingerprint"], s["schema"],
                tuple(UnitPlan(**u) for u in s["units"]), s["error"],
            )
            for s in data["shards"]
        )  # fmt: skip
        return cls(
            data["input"],
            data["text_column"],
            data["id_column"],
            UnitLimits(data["unit_rows"], data["unit_bytes"]),
            shards,
            tuple(data["companions"]),
            data.get("ignored", 0),
            tuple(data.get("ignored_examples", ())),
        )


def make_plan(
    listing: InputListing,
    text_column: str,
    id_column: str | None,
    limits: UnitLimits,
    previous: Plan | None = None,
    max_units: int | None = None,
    extra: Sequence[str] = (),
) -> Plan:
    """Survey every shard; one that cannot be read becomes a shard with an error, the others go on.

    A shard that a previous plan of the same folder already holds, and that has not changed, keeps its units, so
    what is committed stays usable even if unit sizes were set otherwise this time.

    Args:
        listing: The input.
        text_column: Column with the text.
        id_column: Column with ids, if any.
        limits: Largest unit.
        previous: Plan of an earlier run.
        max_units: Join neighbouring units of a shard until there are about so many, so that a job with small units
            does not write a hundred thousand receipts over a large corpus.
        extra: Columns the job reads beside its text.

    Raises:
        InputError: A readable shard lacks the text column, two shards would share a sidecar, or none can be read.
    """
    known = {s.name: s for s in previous.shards} if previous else {}

    def survey(file: ShardFile) -> ShardPlan:
        old = known.get(file.name)
        if old and not old.error and (old.size, old.stamp) == (file.size, file.stamp) and file.stamp:
            return old
        mark = ""
        try:
            mark = file_fingerprint(listing.root, file.name)
            if old and not old.error and old.fingerprint == mark:
                return replace(old, size=file.size, stamp=file.stamp)
            found = get_format(file.format).survey(
                listing.root, file.name, limits, text_column, id_column, extra
            )
        except InputError:
            raise
        except Exception as error:
            return ShardPlan(file.name, file.format, 0, file.size, file.stamp, mark, "", (), describe(error))
        schema = schema_fingerprint(found.schema) if found.schema is not None else ""
        return ShardPlan(file.name, file.format, found.rows, file.size, file.stamp, mark, schema, found.units)

    _check_sidecars(listing)
    workers = 1 if listing.root.is_local else 8
    with ThreadPoolExecutor(workers) as pool:
        shards = tuple(pool.map(survey, listing.shards))
    if all(s.error for s in shards):
        raise InputError(f"no shard can be read; the first, {shards[0].name}: {shards[0].error}")
    if max_units is not None:
        count = sum(len(s.units) for s in shards)
        factor = -(-count // max_units)
        shards = tuple(s if _kept(s, known.get(s.name)) else coarsen(s, factor) for s in shards)
    return Plan(
        listing.root.url,
        text_column,
        id_column,
        limits,
        shards,
        listing.companions,
        listing.ignored,
        listing.examples,
    )


def _kept(shard: ShardPlan, old: ShardPlan | None) -> bool:
    return old is not None and not old.error and shard.fingerprint == old.fingerprint


def coarsen(shard: ShardPlan, factor: int) -> ShardPlan:
    """Join every `factor` neighbouring units of a shard into one."""
    if factor <= 1:
        return shard
    joined: list[UnitPlan] = []
    for i in range(0, len(shard.units), factor):
        part = shard.units[i : i + factor]
        joined.append(
            UnitPlan(
                unit=len(joined),
                first_row=part[0].first_row,
                rows=sum(u.rows for u in part),
                bytes=sum(u.bytes for u in part),
                start=part[0].start,
                end=part[-1].end,
            )
        )
    return replace(shard, units=tuple(joined))


def _check_sidecars(listing: InputListing) -> None:
    seen: dict[str, str] = {}
    for shard in listing.shards:
        side = sidecar_name(shard.name)
        if side in seen:
            raise InputError(
                f"{seen[side]} and {shard.name} would share the sidecar {side}; rename one of them"
            )
        seen[side] = shard.name


def plan_key(shard: ShardPlan, config_hash: str) -> str:
    """What a unit's receipt must carry to be good: the job's configuration, the shard's content and its units."""
    cuts = ",".join(f"{u.first_row}+{u.rows}" for u in shard.units)
    return fingerprint(config_hash, shard.fingerprint, cuts)


def save_plan(plan: Plan, output: Folder) -> None:
    """Write the plan into the output folder."""
    output.write(PLAN, plan.dumps())


def load_plan(output: Folder) -> Plan | None:
    """The plan of an earlier run; None if there is none, or only a damaged one."""
    if not output.exists(PLAN):
        return None
    try:
        return Plan.loads(output.read(PLAN))
    except (ValueError, KeyError, TypeError):
        return None
