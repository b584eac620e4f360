"""Run a step or a PTransform over a few batches in memory: what wiring tests, notebooks and doctests call.

A job goes through a plan, receipts and files; here only the transform itself runs, on the same runner and through
the same coders, and its rows come back as one table.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

from schemas import flight
from transforms.shards.coders import KeyedBatch
from transforms.shards.engine import ApplyStep, Job, launch
from transforms.shards.files import Folder
from transforms.shards.formats import ReadUnit, UnitPlan
from transforms.shards.keys import ShardKey
from transforms.shards.receipts import COUNTERS
from transforms.shards.steps import Step

SHARD = "eager"
_COLLECTED: dict[str, list[KeyedBatch]] = {}


def run_eagerly(
    transform: beam.PTransform | Step,
    batches: Iterable[pa.RecordBatch | KeyedBatch],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    seed: int = 0,
) -> pa.Table:
    """Run a transform over batches on the in-memory runner.

    Args:
        transform: A PTransform from keyed batches to keyed batches, or a step (it runs inside `ApplyStep`, so rows
            it fails on become dead as they would in a job).
        batches: (ShardKey, batch) pairs, or bare batches, which are keyed in order as units of one shard. A batch
            that is not in flight yet (it lacks the reserved columns) is launched.
        text_column: Text column of the batches.
        id_column: Column the row ids come from; None numbers them.
        seed: The run's seed, for a step.

    Returns:
        All rows that came out, in key order, with every in-flight column.

    Raises:
        TypeError: The transform gave something else than keyed batches.
        Exception: Whatever the transform raises, as the runner wraps it.

    Example:
        >>> import pyarrow as pa
        >>> from transforms.score import ScoreTexts
        >>> table = run_eagerly(ScoreTexts(), [pa.record_batch({"text": ["a mild text"]})])  # doctest: +SKIP
    """
    keyed = list(key_batches(batches, text_column, id_column))
    token = uuid.uuid4().hex
    # Only the request cache and the event log of a step would ever touch this folder.
    job = Job("eager", "memory://eager", f"memory://eager-{token}", text_column, (), id_column, seed=seed)
    if not isinstance(transform, beam.PTransform):
        transform = transform.label >> ApplyStep(transform, job)
    _COLLECTED[token] = []
    try:
        options = PipelineOptions(["--runner=FnApiRunner", "--direct_running_mode=in_memory"])
        with beam.Pipeline(options=options) as pipeline:
            source = pipeline | "Batches" >> beam.Create(keyed, reshuffle=False)
            _ = source | transform | "Collect" >> beam.Map(_collect, token)
        found = sorted(_COLLECTED[token], key=lambda pair: pair[0])
    finally:
        del _COLLECTED[token]
        Folder(job.output_url).remove("")
    tables = [pa.Table.from_batches([_without_counters(batch)]) for _, batch in found]
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


def key_batches(
    batches: Iterable[pa.RecordBatch | KeyedBatch], text_column: str, id_column: str | None = None
) -> Iterator[KeyedBatch]:
    """Key bare batches as consecutive units of one shard, and launch those that are not in flight."""
    row = 0
    for unit, item in enumerate(batches):
        key, batch = (ShardKey(SHARD, unit, row), item) if isinstance(item, pa.RecordBatch) else item
        row += batch.num_rows
        if batch.schema.get_field_index(flight.FATE) < 0:
            plan = UnitPlan(key.unit, key.first_row, batch.num_rows)
            batch = launch(ReadUnit(plan, batch), key.shard, text_column, id_column)
        yield key, batch


def _collect(element: Any, token: str) -> None:
    # The in-memory runner works in this process, so a module-level list is within its reach.
    if not (isinstance(element, tuple) and len(element) == 2 and isinstance(element[1], pa.RecordBatch)):
        raise TypeError(f"run_eagerly expects (ShardKey, RecordBatch) elements, got {type(element).__name__}")
    key, batch = element
    _COLLECTED[token].append((ShardKey(*key), batch))


def _without_counters(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times differ from run to run; the table that comes back does not."""
    kept = {k: v for k, v in (batch.schema.metadata or {}).items() if k != COUNTERS}
    return batch.replace_schema_metadata(kept or None)
