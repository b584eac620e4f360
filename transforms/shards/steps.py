"""What a step is, and how a step is applied so that one bad row never takes its batch along."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from schemas import flight
from schemas.errors import FatalStepError, TamisError
from transforms.shards.cache import RequestCache
from transforms.shards.keys import ShardKey

FATAL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}


@dataclass
class StepContext:
    """What a step may use besides its batch.

    Attributes:
        text_column: Name of the text column of the batch.
        seed: The run's seed.
        cache: Model answers already paid for; None turns caching off.
        key: The unit at work, for messages.
        counters: Counts by name; they end in the receipt, the events and the report.
        heartbeat: Called with a progress note while a long step runs; the engine turns it into events.
    """

    text_column: str
    seed: int = 0
    cache: RequestCache | None = None
    key: ShardKey | None = None
    counters: Counter[str] = field(default_factory=Counter)
    heartbeat: Callable[[], None] = field(default=lambda: None)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to the counter `name` (dotted, `rewrite.tokens_out`)."""
        self.counters[name] += amount


@runtime_checkable
class Step(Protocol):
    """A labelled, picklable transformation of a batch in flight.

    `label` is a verb phrase in CamelCase (`ScoreToxicity`); it names the PTransform and stands in `dead/` as stage.
    """

    label: str

    def setup(self, context: StepContext) -> None:
        """Load what the step needs, once a worker; raises `ModelError` before any row is touched."""
        ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Transform the live rows: same row count, same order; columns may be added, fates set."""
        ...


def apply_step(step: Step, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
    """Apply a step to the live rows of a batch; rows it fails on become dead, the rest goes on.

    The step sees only KEPT rows. If it raises, the rows are halved until the culprits stand alone; each is marked
    dead with its error. Errors that are not a row's fault (`TamisError`, out of memory, disk full) stop the run.

    Raises:
        FatalStepError: On such an error, with the unit and the step named.
    """
    started = time.perf_counter()
    fates = batch.column(flight.FATE).to_numpy(zero_copy_only=False)
    live = np.flatnonzero(fates == flight.KEPT)
    name = step.label
    if len(live) == len(fates):
        out = _rescue(step, batch, context)
    elif len(live) == 0:
        # Still run on no rows, so that the columns a step adds exist in every unit.
        out = _scatter(batch, _rescue(step, batch.slice(0, 0), context), live)
    else:
        out = _scatter(batch, _rescue(step, batch.take(pa.array(live)), context), live)
    if len(live) and not (out.column(flight.FATE).to_numpy(zero_copy_only=False) == flight.KEPT).any():
        # The step failed on every row, perhaps: the columns it would have added must be there for the next one.
        out = _stack([out, _rescue(step, out.slice(0, 0), context)])
    after = out.column(flight.FATE).to_numpy(zero_copy_only=False)
    context.count(f"{name}.rows_in", len(live))
    context.count(f"{name}.rows_out", int((after == flight.KEPT).sum()))
    context.count(f"{name}.ms", int((time.perf_counter() - started) * 1000))
    return out


def _rescue(step: Step, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
    try:
        out = step(batch, context)
    except (TamisError, MemoryError) as error:
        raise _fatal(step, context, error) from error
    except OSError as error:
        if error.errno in FATAL_ERRNO:
            raise _fatal(step, context, error) from error
        return _bisect(step, batch, context, error)
    except Exception as error:
        return _bisect(step, batch, context, error)
    if out.num_rows != batch.num_rows:
        raise FatalStepError(
            f"{step.label}: returned {out.num_rows} rows for {batch.num_rows} in {context.key}; "
            "a step must keep row count and order (mark rows with drop_rows instead)"
        )
    lost = [f.name for f in flight.BASE_FIELDS if out.schema.get_field_index(f.name) < 0]
    if lost:
        raise FatalStepError(f"{step.label}: returned no column {', '.join(lost)} in {context.key}")
    if not out.column(flight.ROW).equals(batch.column(flight.ROW)):
        raise FatalStepError(
            f"{step.label}: returned other rows or another order in {context.key}; "
            "a step must keep row count and order"
        )
    return out


def _bisect(step: Step, batch: pa.RecordBatch, context: StepContext, error: Exception) -> pa.RecordBatch:
    if batch.num_rows == 0:
        raise FatalStepError(f"{step.label}: failed on an empty batch: {describe(error)}") from error
    if batch.num_rows == 1:
        context.count(f"{step.label}.dead")
        return flight.kill_rows(batch, [describe(error)], stage=step.label)
    half = batch.num_rows // 2
    parts = [_rescue(step, part, context) for part in (batch.slice(0, half), batch.slice(half))]
    return _stack(parts)


def _stack(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Concatenate batches whose columns may differ (a dead row lacks what its step would have added)."""
    return _one([pa.Table.from_batches([p]) for p in parts], None)


def _scatter(batch: pa.RecordBatch, done: pa.RecordBatch, live: np.ndarray) -> pa.RecordBatch:
    """Put the processed live rows back among the rows no step touches."""
    rest = np.setdiff1d(np.arange(batch.num_rows), live)
    if len(rest) == 0:
        return done
    idle = batch.take(pa.array(rest))
    order = np.argsort(np.concatenate([live, rest]), kind="stable")
    return _one([pa.Table.from_batches([done]), pa.Table.from_batches([idle])], order)


def _one(tables: list[pa.Table], order: np.ndarray | None) -> pa.RecordBatch:
    whole = pa.concat_tables(tables, promote_options="default")
    if order is not None:
        whole = whole.take(pa.array(order))
    batches = whole.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=whole.schema)


def _fatal(step: Step, context: StepContext, error: BaseException) -> TamisError:
    if isinstance(error, TamisError) and not isinstance(error, FatalStepError):
        return error
    return FatalStepError(f"{step.label} stopped at {context.key}: {describe(error)}")


def describe(error: BaseException) -> str:
    """One line for an error: its class and message, newlines folded, at most 500 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text.encode("utf-8", "backslashreplace").decode()  # it is written to Arrow columns
    return text if len(text) <= 500 else text[:497] + "..."
