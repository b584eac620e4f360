"""What a job cost and lost: time and tokens by step, and the rows that did not make it, by reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.report.output import Output
from pipelines.report.stats import Smallest, numbers, row_hashes

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class StepCost:
    """Rows and time of one step, summed over all workers."""

    name: str
    rows_in: int
    rows_out: int
    seconds: float

    @property
    def rate(self) -> float | None:
        """Rows a second of the step's own time; None where it took less than can be told."""
        return self.rows_in / self.seconds if self.seconds >= 0.001 else None


def step_costs(counters: Mapping[str, int]) -> list[StepCost]:
    """Steps that were timed (`<step>.ms`), in the order their counters were first written."""
    names = [key.removesuffix(".ms") for key in counters if key.endswith(".ms")]
    return [
        StepCost(
            name,
            int(counters.get(f"{name}.rows_in", 0)),
            int(counters.get(f"{name}.rows_out", 0)),
            counters[f"{name}.ms"] / 1000,
        )
        for name in names
    ]


def token_counts(counters: Mapping[str, int]) -> dict[str, int]:
    """Tokens read and written, requests made and answers found in the cache, over all steps."""
    sums = dict.fromkeys(("tokens_in", "tokens_out", "requests", "cache_hits"), 0)
    for key, value in counters.items():
        last = key.rsplit(".", 1)[-1]
        if last in sums:
            sums[last] += int(value)
    return sums


def other_counters(counters: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counters that are not step timings, grouped by what stands before the first dot."""
    steps = {s.name for s in step_costs(counters)}
    out: dict[str, dict[str, int]] = {}
    for key, value in sorted(counters.items()):
        head, _, rest = key.partition(".")
        if head in steps and rest in ("ms", "rows_in", "rows_out"):
            continue
        out.setdefault(head, {})[rest or head] = int(value)
    return out


@dataclass
class Losses:
    """Rows of `dropped/` or `dead/`.

    Attributes:
        n: How many.
        groups: (stage, reason or error) -> rows. Numbers inside errors are folded, so that alike ones count together.
        examples: A few rows: shard, row, id, stage, reason, error.
    """

    n: int = 0
    groups: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)


def losses(output: Output, table: str, *, examples: int = 12) -> Losses | None:
    """Count the rows of `dropped` or `dead` by reason; None where there are none."""
    wanted = ["shard", "row", "id", "stage", "reason", "error"]
    out = Losses()
    sample = Smallest(examples)
    for name, batch in output.batches(table, wanted):
        out.n += batch.num_rows
        rows = batch.to_pylist()
        for row in rows:
            what = row.get("reason") or row.get("error") or "unknown"
            out.groups[row.get("stage") or "-", _fold(what)] += 1
        position = (
            numbers(batch.column("row")) if "row" in batch.schema.names else numbers(None, batch.num_rows)
        )
        sample.offer(row_hashes(name, _rows_or_index(position)), rows)
    if not out.n:
        return None
    out.examples = sample.items
    return out


def _rows_or_index(rows: Any) -> Any:
    import numpy as np

    return np.nan_to_num(np.where(np.isnan(rows), np.arange(len(rows)), rows)).astype(np.int64)


def _fold(error: str) -> str:
    text = " ".join(error.split())
    text = text if len(text) <= 160 else text[:157] + "..."
    return _DIGITS.sub("#", text) if ":" in text else text
