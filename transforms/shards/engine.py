"""The engine's PTransforms, and the graph of every job: plan -> read -> steps -> commit -> assemble -> finish.

`expand` only wires; what happens to a batch lives in the pure functions of this package. Reading, the steps and the
commit have no shuffle between them, so the runner fuses them: a unit is read, worked on and committed by one worker
before the next is read, and no document text crosses a shuffle. What is shuffled is read tasks and receipts.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics import Metrics

from schemas import flight
from schemas.columns import to_plain_text, to_text
from schemas.errors import FatalStepError, InputError, TamisError, TooManyDeadError
from schemas.fingerprint import config_hash
from transforms.shards.assemble import assemble_shard
from transforms.shards.cache import RequestCache
from transforms.shards.coders import KeyedBatch, typed
from transforms.shards.events import EventLog
from transforms.shards.files import Folder
from transforms.shards.finish import finish_output
from transforms.shards.formats import AssembleOptions, ReadUnit, UnitLimits, get_format
from transforms.shards.keys import ShardKey
from transforms.shards.plan import Plan, ReadTask, ShardPlan, load_plan, plan_key
from transforms.shards.receipts import (
    ORIGINAL,
    Receipt,
    commit_unit,
    counters_of,
    read_receipts,
    with_counters,
)
from transforms.shards.steps import Step, StepContext, apply_step, describe

CACHE = "_tamis/cache"


@dataclass(frozen=True)
class Job:
    """A job as the engine runs it. Everything in it is picklable and small.

    Attributes:
        name: `detox`, `score`, ...
        input_url: Input root.
        output_url: Output folder.
        text_column: The column the steps work on.
        id_column: The column row ids come from; None gives `<shard>#<row>`.
        extra_columns: Columns the steps read beside the text; they ride along as text, under their own names.
        steps: What happens to a batch, in order.
        config: All that decides the result (hashed); no cosmetic settings.
        models: What the manifest says of the models, as plain dictionaries.
        seed: The run's seed.
        assemble: How shards are written.
        max_dead: More dead rows than this stop the run; None means any number.
        cache_url: Where model answers are kept; None means `OUT/_tamis/cache`.
        on_finish: `module:function` called with the output URL and `options=` once the manifest is there (the report).
        input_options: fsspec options of the input.
        output_options: fsspec options of the output.
        limits: Unit size, where the user sets none.
        max_units: About so many units at most, where the user sets no unit size; None = no bound.
        at_least_tasks: Read tasks to make at least, so that every worker has some.
        lineage: What the input says of itself, where it is an output of tamis.
    """

    name: str
    input_url: str
    output_url: str
    text_column: str
    steps: tuple[Step, ...]
    id_column: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    assemble: AssembleOptions = field(default_factory=AssembleOptions)
    max_dead: int | None = None
    cache_url: str | None = None
    on_finish: str | None = None
    input_options: Mapping[str, Any] = field(default_factory=dict)
    output_options: Mapping[str, Any] = field(default_factory=dict)
    limits: UnitLimits = field(default_factory=UnitLimits)
    max_units: int | None = None
    at_least_tasks: int = 4
    lineage: Mapping[str, Any] | None = None
    extra_columns: tuple[str, ...] = ()

    @property
    def config_hash(self) -> str:
        """Hash of all that decides the result."""
        tags = [f"{m['name']}@{m['revision']}" for m in self.models]
        return config_hash(
            {
                "job": self.name,
                "text_column": self.text_column,
                "id_column": self.id_column,
                "seed": self.seed,
                "config": dict(self.config),
                "models": tags,
            }
        )

    def source(self) -> Folder:
        """The input root."""
        return Folder(self.input_url, **self.input_options)

    def output(self) -> Folder:
        """The output folder."""
        return Folder(self.output_url, **self.output_options)

    def context(self) -> StepContext:
        """A fresh context for one step on one worker."""
        cache = RequestCache(
            self.cache_url or f"{self.output_url.rstrip('/')}/{CACHE}", **self.output_options
        )
        return StepContext(text_column=self.text_column, seed=self.seed, cache=cache)


def build(root: beam.Pipeline, job: Job) -> beam.PCollection:
    """Put a job's whole graph into a pipeline; its plan must already lie in the output folder.

    Returns:
        A collection of one element: the manifest.
    """
    units = root | "PlanTasks" >> PlanTasks(job) | "ReadUnits" >> ReadUnits(job)
    for step in job.steps:
        units |= step.label >> ApplyStep(step, job)
    fresh = units | "CommitUnits" >> CommitUnits(job)
    known = root | "KnownReceipts" >> KnownReceipts(job)
    return (
        (fresh, known)
        | "AllReceipts" >> beam.Flatten()
        | "AssembleShards" >> AssembleShards(job)
        | "FinishOutput" >> FinishOutput(job)
    )


class PlanTasks(beam.PTransform):
    """Turns the plan on disk, less what is committed, into read tasks spread over the workers."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, root: beam.Pipeline) -> beam.PCollection:
        """-> ReadTask."""
        return (
            root
            | beam.Create([self._job])
            | "ListTasks" >> beam.FlatMap(list_tasks).with_output_types(ReadTask)
            | beam.Reshuffle()
        )


def list_tasks(job: Job) -> Iterator[ReadTask]:
    """Read tasks of the units that have no good receipt."""
    output = job.output()
    plan = _plan(output)
    check_dead(unreadable(plan), job.max_dead, job.output_url)
    done = set(read_receipts(output, plan, job.config_hash))
    yield from plan.tasks(done, job.at_least_tasks)


class ReadUnits(beam.PTransform):
    """ReadTask -> (ShardKey, batch in flight), one unit at a time."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, tasks: beam.PCollection) -> beam.PCollection:
        """Read tasks -> keyed batches."""
        return tasks | typed(beam.ParDo(_ReadDoFn(self._job)))


class _ReadDoFn(beam.DoFn):
    def __init__(self, job: Job) -> None:
        self._job = job

    def setup(self) -> None:
        self._source = self._job.source()
        self._shards = {s.name: s for s in _plan(self._job.output()).shards}

    def process(self, element: ReadTask) -> Iterator[KeyedBatch]:
        shard = self._shards[element.shard]
        job = self._job
        yield from read_units(self._source, shard, element, job.text_column, job.id_column, job.extra_columns)


def read_units(
    source: Folder,
    shard: ShardPlan,
    task: ReadTask,
    text_column: str,
    id_column: str | None,
    extra: Sequence[str] = (),
) -> Iterator[KeyedBatch]:
    """Read a task's units and launch them: plain text, ids, reserved columns; unreadable rows already dead.

    Raises:
        InputError: The shard is damaged where planning did not look, or has changed since.
    """
    plans = shard.units[task.first_unit : task.first_unit + task.units]
    row = plans[0].first_row if plans else 0
    units = iter(get_format(shard.format).read(source, shard.name, plans, text_column, id_column, extra))
    while True:
        try:
            unit = next(units, None)
            if unit is None:
                return
            batch = launch(unit, shard.name, text_column, id_column, extra)
        except (TamisError, MemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"{shard.name} cannot be read at row {row}: {describe(error)}; "
                "replace or remove it and run the same command again"
            ) from error
        yield ShardKey(shard.name, unit.plan.unit, unit.plan.first_row), batch
        row = unit.plan.first_row + unit.plan.rows


def launch(
    unit: ReadUnit, shard: str, text_column: str, id_column: str | None, extra: Sequence[str] = ()
) -> pa.RecordBatch:
    """Bring a unit as read into flight."""
    plan, batch = unit.plan, unit.batch
    text = to_plain_text(batch.column(text_column))
    default = pc.binary_join_element_wise(
        shard, pc.cast(pa.arange(plan.first_row, plan.first_row + batch.num_rows), pa.string()), "#"
    )
    ids = default
    if id_column:
        index = batch.schema.get_field_index(id_column)
        if index >= 0:
            given = batch.column(index)
            given = given.dictionary_decode() if pa.types.is_dictionary(given.type) else given
            ids = pc.coalesce(given.cast(pa.string()), default)
    others = [name for name in extra if name != text_column]
    base = pa.RecordBatch.from_arrays(
        [text, *(to_text(batch.column(name)) for name in others)], names=[text_column, *others]
    )
    flying = flight.launch(base, first_row=plan.first_row, ids=ids)
    flying = flight.set_scratch(flying, ORIGINAL, text)
    if unit.errors:
        flying = flight.kill_rows(flying, unit.errors, stage="ReadShard")
    return flying


class ApplyStep(beam.PTransform):
    """Applies one step to every unit; rows it fails on become dead, the rest goes on."""

    def __init__(self, step: Step, job: Job) -> None:
        super().__init__()
        self._step, self._job = step, job

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """Keyed batches -> keyed batches."""
        return units | typed(beam.ParDo(_StepDoFn(self._step, self._job)))


class _StepDoFn(beam.DoFn):
    def __init__(self, step: Step, job: Job) -> None:
        self._step, self._job = step, job

    def setup(self) -> None:
        self._context = self._job.context()
        self._events = EventLog(self._job.output())
        self._step.setup(self._context)

    def process(self, element: KeyedBatch) -> Iterator[KeyedBatch]:
        key, batch = element
        context = self._context
        context.key = key
        context.counters.clear()
        context.heartbeat = lambda: self._pulse(key)
        batch = apply_step(self._step, batch, context)
        for name, amount in context.counters.items():
            Metrics.counter("tamis", name).inc(amount)
        yield key, with_counters(batch, counters_of(batch) + context.counters)

    def _pulse(self, key: ShardKey) -> None:
        counters = self._context.counters
        self._events.pulse(
            shard=key.shard,
            unit=key.unit,
            step=self._step.label,
            tokens_in=_sum(counters, ".tokens_in"),
            tokens_out=_sum(counters, ".tokens_out"),
        )


def _sum(counters: Mapping[str, int], suffix: str) -> int:
    return sum(v for k, v in counters.items() if k.endswith(suffix))


class CommitUnits(beam.PTransform):
    """(ShardKey, batch) -> (shard, receipt): each unit is written once, atomically."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """Keyed batches -> keyed receipts."""
        return units | beam.ParDo(_CommitDoFn(self._job)).with_output_types(tuple[str, bytes])


class _CommitDoFn(beam.DoFn):
    def __init__(self, job: Job) -> None:
        self._job = job
        self._dead = 0

    def setup(self) -> None:
        self._output = self._job.output()
        self._events = EventLog(self._output)
        shards = _plan(self._output).shards
        self._keys = {s.name: plan_key(s, self._job.config_hash) for s in shards}

    def process(self, element: KeyedBatch) -> Iterator[tuple[str, bytes]]:
        key, batch = element
        try:
            receipt = commit_unit(self._output, key, batch, self._job.text_column, self._keys[key.shard])
        except OSError as error:
            raise FatalStepError(
                f"cannot write {key} to {self._job.output_url}: {describe(error)}; "
                "make room and run the same command again: what is committed stays"
            ) from error
        self._events.emit(
            "unit",
            shard=receipt.shard,
            unit=receipt.unit,
            rows=receipt.rows,
            kept=receipt.kept,
            dropped=receipt.dropped,
            dead=receipt.dead,
            changed=receipt.changed,
            bytes=receipt.text_bytes,
            tokens_in=_sum(receipt.counters, ".tokens_in"),
            tokens_out=_sum(receipt.counters, ".tokens_out"),
        )
        self._dead += receipt.dead
        check_dead(self._dead, self._job.max_dead, self._job.output_url)
        yield receipt.shard, receipt.dumps()


def unreadable(plan: Plan) -> int:
    """Number of shards of which nothing can be read; each is one dead entry."""
    return sum(s.error is not None for s in plan.shards)


def check_dead(dead: int, limit: int | None, output: str) -> None:
    """Stop the run when more rows died than the user allows.

    Raises:
        TooManyDeadError: They did.
    """
    if limit is not None and dead > limit:
        raise TooManyDeadError(
            f"{dead} rows are dead and --max-dead is {limit}; look at `tamis status {output}`, "
            "mend the cause and run the same command again: what is committed stays"
        )


class KnownReceipts(beam.PTransform):
    """Receipts of earlier runs, and for every shard an empty mark, so that a shard without units is assembled too."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, root: beam.Pipeline) -> beam.PCollection:
        """-> (shard, receipt or empty)."""
        return (
            root
            | beam.Create([self._job])
            | "ListReceipts" >> beam.FlatMap(list_receipts).with_output_types(tuple[str, bytes])
        )


def list_receipts(job: Job) -> Iterator[tuple[str, bytes]]:
    """Good receipts already on disk, and an empty mark for every shard."""
    output = job.output()
    plan = _plan(output)
    for shard in plan.shards:
        yield shard.name, b""
    for receipt in read_receipts(output, plan, job.config_hash).values():
        yield receipt.shard, receipt.dumps()


class AssembleShards(beam.PTransform):
    """(shard, receipts) -> the shard's entry of the manifest, once all its units are there."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, receipts: beam.PCollection) -> beam.PCollection:
        """Keyed receipts -> manifest entries."""
        return (
            receipts
            | beam.GroupByKey()
            | beam.ParDo(_AssembleDoFn(self._job)).with_output_types(dict[str, Any])
        )


class _AssembleDoFn(beam.DoFn):
    def __init__(self, job: Job) -> None:
        self._job = job

    def setup(self) -> None:
        self._source, self._output = self._job.source(), self._job.output()
        self._events = EventLog(self._output)
        self._shards = {s.name: s for s in _plan(self._output).shards}

    def process(self, element: tuple[str, Iterable[bytes]]) -> Iterator[dict[str, Any]]:
        name, contents = element
        shard = self._shards[name]
        # A unit may come twice (a retried bundle, a receipt written between planning and listing): same content.
        receipts = {r.unit: r for r in map(Receipt.loads, filter(None, contents))}
        missing = [u.unit for u in shard.units if u.unit not in receipts]
        if missing:
            raise RuntimeError(f"{name}: units {missing[:5]} have no receipt; run the job again")
        options = self._job.assemble
        try:
            entry = assemble_shard(
                self._source, self._output, shard, list(receipts.values()), self._job.text_column, options
            )
        except OSError as error:
            raise FatalStepError(
                f"cannot assemble {name} in {self._job.output_url}: {describe(error)}; run the same command again"
            ) from error
        except MemoryError:  # Arrow's own is one of its exceptions too, and no column's fault
            raise
        except pa.ArrowException as error:  # in a column that no step has read
            raise FatalStepError(
                f"cannot write {name} with its columns as they are: {describe(error)}; leave it out, or convert the column"
            ) from error
        self._events.emit("shard", shard=name, rows=entry["rows_kept"], bytes=entry["bytes"])
        yield entry


class FinishOutput(beam.PTransform):
    """Manifest entries -> the finished output: report, card, manifest, `_SUCCESS` last."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def expand(self, entries: beam.PCollection) -> beam.PCollection:
        """Entries -> one manifest."""
        job = self._job
        return entries | beam.combiners.ToList() | beam.Map(finish_job, job).with_output_types(dict[str, Any])


def finish_job(entries: list[dict[str, Any]], job: Job) -> dict[str, Any]:
    """Count the entries against the plan and close the output."""
    output = job.output()
    plan = _plan(output)
    receipts = read_receipts(output, plan, job.config_hash)
    check_dead(sum(r.dead for r in receipts.values()) + unreadable(plan), job.max_dead, job.output_url)
    hook = None
    if job.on_finish:
        module, _, function = job.on_finish.partition(":")
        hook = functools.partial(
            getattr(importlib.import_module(module), function), options=dict(job.output_options)
        )
    facts = {
        "job": job.name,
        "config": dict(job.config),
        "config_hash": job.config_hash,
        "models": [dict(m) for m in job.models],
        "seed": job.seed,
        "lineage": dict(job.lineage) if job.lineage else None,
        "assemble": asdict(job.assemble),
    }
    return finish_output(job.source(), output, plan, entries, list(receipts.values()), facts, hook)


def _plan(output: Folder) -> Plan:
    plan = load_plan(output)
    if plan is None:
        raise FileNotFoundError(f"{output.url}/_tamis/plan.json")
    return plan
