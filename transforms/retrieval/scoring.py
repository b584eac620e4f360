"""Rankings against labels, by query: trec_eval's figures, through ir-measures, under one set of rules.

trec_eval's rules hold for every measure it computes: gain is the grade itself, equal scores are ordered by document id
descending, documents nobody judged count 0. RR@k is not among them in ir-measures, which then asks another tool that orders
equal scores the other way round; here it is read off trec_eval's reciprocal rank. What another tool computes after all
(ERR@10, exponential gain) is said by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.metrics.bootstrap import PairedDifference, paired_difference
from schemas.errors import InputError, ModelError

Labels = Mapping[str, Mapping[str, int]]
Ranking = Mapping[str, Mapping[str, float]]
Array = npt.NDArray[np.float64]

OURS = "pytrec_eval"


@dataclass(frozen=True)
class Measure:
    """A measure, and who computes it.

    Attributes:
        name: As ir-measures writes it.
        asked: What is asked of ir-measures.
        provider: Who answers.
        cutoff: A reciprocal rank below 1 / cutoff counts 0; None: as it is.
    """

    name: str
    asked: Any
    provider: str
    cutoff: int | None = None


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """Measures by their names.

    Raises:
        InputError: There is no such measure, or nothing installed computes it.
        ModelError: ir-measures is not installed.
    """
    ir = _ir_measures()
    found: dict[str, Measure] = {}
    for name in names:
        try:
            parsed = ir.parse_measure(name)
        except (ValueError, NameError, SyntaxError, KeyError) as error:
            raise InputError(f"no measure '{name}' (write nDCG@10, RR@10, R@100, AP, P(rel=2)@5)") from error
        cutoff = None
        asked = parsed
        if parsed.NAME == "RR" and parsed.params.get("cutoff") is not None:
            cutoff = int(parsed.params["cutoff"])
            asked = type(parsed)(**{k: v for k, v in parsed.params.items() if k != "cutoff"})
        provider = next(
            (p for p in ir.DefaultPipeline.providers if p.is_available() and p.supports(asked)), None
        )
        if provider is None:
            raise InputError(f"nothing that is installed computes '{name}'")
        found.setdefault(str(parsed), Measure(str(parsed), asked, provider.NAME, cutoff))
    return list(found.values())


def by_query(
    measures: Sequence[Measure], labels: Labels, ranking: Ranking, queries: Sequence[str]
) -> dict[str, list[float]]:
    """Every measure of every query.

    Args:
        measures: What is wanted.
        labels: Grade by query and document.
        ranking: Score by query and document.
        queries: Queries that count, in the order wanted; one the ranking does not answer has 0.

    Returns:
        By measure, one number a query.
    """
    ir = _ir_measures()
    wanted = {q: dict(labels[q]) for q in queries if q in labels}
    given = {q: dict(ranking[q]) for q in queries if ranking.get(q)}
    found: dict[tuple[str, str], float] = {}
    if wanted and given:
        for metric in ir.iter_calc([m.asked for m in measures], wanted, given):
            found[str(metric.measure), str(metric.query_id)] = float(metric.value)
    values: dict[str, list[float]] = {}
    for m in measures:
        numbers = [found.get((str(m.asked), q), 0.0) for q in queries]
        if m.cutoff is not None:
            # 1 / rank in float32 may lie a hair below 1 / cutoff.
            numbers = [x if x * m.cutoff > 1 - 1e-6 else 0.0 for x in numbers]
        values[m.name] = numbers
    return values


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same queries.

    Attributes:
        bootstrap: Interval and two-sided p of the mean difference a - b, queries drawn with replacement.
        t: Of the paired t-test; 0 where no query differs.
        t_p: Its two-sided p.
        wins: Queries on which a is ahead.
        losses: Queries on which b is.
    """

    bootstrap: PairedDifference
    t: float
    t_p: float
    wins: int
    losses: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.bootstrap.as_dict(),
            "t": self.t,
            "t_p_value": self.t_p,
            "wins": self.wins,
            "losses": self.losses,
        }


def compare(a: Sequence[float], b: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Comparison:
    """Compare two systems by one measure, paired by query (M. D. Smucker et al., CIKM 2007, on which tests fit)."""
    from scipy.stats import ttest_rel

    gaps: Array = np.asarray(a, float) - np.asarray(b, float)
    t, p = 0.0, 1.0
    if len(gaps) > 1 and np.ptp(gaps) > 0:
        test = ttest_rel(a, b)
        t, p = float(test.statistic), float(test.pvalue)
    elif len(gaps) > 1 and gaps[0] != 0:  # the same difference everywhere: no spread to test against
        t, p = float("inf") if gaps[0] > 0 else float("-inf"), 0.0
    even = 1e-12
    return Comparison(
        paired_difference(a, b, seed=seed, draws=draws),
        t,
        p,
        int((gaps > even).sum()),
        int((gaps < -even).sum()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold together (S. Holm, Scandinavian Journal of Statistics 6, 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    most = 0.0
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - place) * float(p_values[i])))
        adjusted[i] = most
    return [float(x) for x in adjusted]


def _ir_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise ModelError("scoring rankings needs ir-measures: pip install 'tamis[retrieval]'") from error
    return ir_measures
