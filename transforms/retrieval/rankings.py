"""What other labels make of the same rankings: each run scored with each set of labels, and whether the order holds.

Figures are those of trec_eval (through ir-measures): linear gain, equal scores ordered by document id descending, labels
that are not there count 0. A query a run does not answer counts 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from models.metrics.bootstrap import (
    Interval,
    PairedDifference,
    mean_interval,
    paired_difference,
    resampled_sums,
)
from schemas.errors import InputError, ModelError
from transforms.retrieval.agreement import How

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunFigures:
    """A run under two sets of labels.

    Attributes:
        a: Mean with A's labels.
        b: Mean with B's labels.
        change: A minus B, by query.
        judged_a: Share of its first k documents A judged.
        judged_b: Share of its first k documents B judged.
        each: By query: (with A, with B).
    """

    a: Interval
    b: Interval
    change: PairedDifference
    judged_a: float
    judged_b: float
    each: list[tuple[float, float]]


def score_runs(
    runs: Mapping[str, pl.DataFrame],
    a: pl.DataFrame,
    b: pl.DataFrame,
    queries: Sequence[str],
    measure: str,
    how: How,
) -> dict[str, RunFigures]:
    """Score runs with two sets of labels.

    Args:
        runs: query_id, doc_id, score by name.
        a: query_id, doc_id, grade.
        b: The same.
        queries: Queries that count: both judged them, and found something.
        measure: As ir-measures writes it: nDCG@10, RR@10, AP.
        how: Of the intervals, by query.

    Raises:
        InputError: No such measure.
        ModelError: ir-measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ModelError("scoring runs needs ir-measures: pip install 'tamis[retrieval]'") from error
    try:
        parsed = ir_measures.parse_measure(measure)
    except (ValueError, NameError, SyntaxError) as error:
        raise InputError(f"no measure '{measure}' (write nDCG@10, RR@10, AP, R@100)") from error
    wanted = pl.DataFrame({"query_id": list(queries)}, schema={"query_id": pl.String})
    qrels = [_qrels(labels.join(wanted, on="query_id", how="semi")) for labels in (a, b)]
    cutoff = parsed.params.get("cutoff", 10)
    found = {}
    for name, run in runs.items():
        kept = run.join(wanted, on="query_id", how="semi")
        nested = _run(kept)
        scores = []
        for labels in qrels:
            got = {m.query_id: m.value for m in ir_measures.iter_calc([parsed], labels, nested)}
            scores.append([float(got.get(q, 0.0)) for q in queries])
        found[name] = RunFigures(
            mean_interval(scores[0], seed=how.seed, draws=how.draws, level=how.level),
            mean_interval(scores[1], seed=how.seed, draws=how.draws, level=how.level),
            paired_difference(scores[0], scores[1], seed=how.seed, draws=how.draws, level=how.level),
            _judged(kept, a, cutoff),
            _judged(kept, b, cutoff),
            list(zip(*scores, strict=True)),
        )
    return found


def order_kept(figures: Mapping[str, RunFigures], how: How) -> Interval | None:
    """Kendall's tau-b between the orders of systems the two sets of labels give; None for fewer than two runs.

    The interval resamples queries and ranks the systems anew in every draw.
    """
    from scipy.stats import kendalltau

    if len(figures) < 2:
        return None
    columns = np.asarray([[v for x in figures.values() for v in x.each[q]] for q in range(_queries(figures))])

    def tau(sums: Array) -> float:
        value = float(kendalltau(sums[0::2], sums[1::2]).statistic)
        return value if np.isfinite(value) else 0.0

    estimate = tau(columns.sum(axis=0))
    drawn = [tau(s) for s in resampled_sums(columns, how.seed, min(how.draws, 1000))]
    tail = (1 - how.level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), len(columns))


def _queries(figures: Mapping[str, RunFigures]) -> int:
    return len(next(iter(figures.values())).each)


def _qrels(labels: pl.DataFrame) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for query, doc, grade in labels.select("query_id", "doc_id", "grade").iter_rows():
        nested.setdefault(query, {})[doc] = int(grade)
    return nested


def _run(rows: pl.DataFrame) -> dict[str, dict[str, float]]:
    nested: dict[str, dict[str, float]] = {}
    for query, doc, score in rows.select("query_id", "doc_id", "score").iter_rows():
        nested.setdefault(query, {})[doc] = float(score)
    return nested


def _judged(run: pl.DataFrame, labels: pl.DataFrame, cutoff: int) -> float:
    top = run.sort("query_id", "score", "doc_id", descending=[False, True, True])
    top = top.filter(pl.int_range(pl.len()).over("query_id") < cutoff)
    if not top.height:
        return 0.0
    held = top.join(labels.select("query_id", "doc_id"), on=["query_id", "doc_id"], how="semi")
    return held.height / top.height
