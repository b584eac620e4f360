"""How far labels of one annotator agree with another's: counts by query, and every figure a function of their sums.

A query is the unit that is drawn with replacement: labels of one query stand or fall together (a misread query spoils all
of them), so an interval over pairs would claim far more evidence than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from models.metrics.bootstrap import (
    DRAWS,
    LEVEL,
    Interval,
    mean_interval,
    resampled_sums,
    share_interval,
)

Array = npt.NDArray[np.float64]
UNJUDGED = ("auto", "skip", "negative")
_COUNTS = ("tp", "fp", "fn", "tn")


@dataclass(frozen=True)
class How:
    """How intervals are drawn."""

    seed: int = 0
    draws: int = DRAWS
    level: float = LEVEL


def paired(a: pl.DataFrame, b: pl.DataFrame, unjudged: str) -> tuple[pl.DataFrame, bool]:
    """The pairs both judged.

    Args:
        a: query_id, doc_id, grade, value, rank, positive: one label a pair.
        b: The same, of the annotator that is compared with.
        unjudged: What of a pair only A judged, in a query B judged: `skip` it, or take it as `negative` in B's eyes.
            `auto`: negative where B says no in fewer than half of its queries (sparse qrels list positives), else skip.

    Returns:
        query_id, doc_id, grade_a, grade_b, value_a, positive_a, positive_b, held (B did judge it); and whether unjudged
        pairs count as negative.
    """
    as_negative = unjudged == "negative" or (unjudged == "auto" and _is_sparse(b))
    left = a.filter(pl.col("positive").is_not_null()).join(
        b.select("query_id").unique(), on="query_id", how="semi", maintain_order="left"
    )
    right = b.select("query_id", "doc_id", "grade", "positive").with_columns(pl.lit(True).alias("held"))
    both = left.select("query_id", "doc_id", "grade", "value", "rank", "positive").join(
        right,
        on=["query_id", "doc_id"],
        how="left" if as_negative else "inner",
        suffix="_b",
        maintain_order="left",
    )
    both = both.rename({"grade": "grade_a", "value": "value_a", "rank": "rank_a", "positive": "positive_a"})
    if as_negative:
        both = both.with_columns(
            pl.col("positive_b").fill_null(False),
            pl.when(pl.col("held").is_null()).then(0).otherwise(pl.col("grade_b")).alias("grade_b"),
            pl.col("held").fill_null(False),
        )
    return both.filter(pl.col("positive_b").is_not_null()), as_negative


def _is_sparse(labels: pl.DataFrame) -> bool:
    """Whether most queries have no label but positives: documents not listed are then the negatives."""
    says_no = labels.group_by("query_id").agg((~pl.col("positive").fill_null(True)).any().alias("no"))
    return bool(says_no.height and says_no["no"].sum() * 2 < says_no.height)


def by_query(pairs: pl.DataFrame) -> pl.DataFrame:
    """True and false positives and negatives of A in B's eyes, by query."""
    a, b = pl.col("positive_a"), pl.col("positive_b")
    return pairs.group_by("query_id", maintain_order=True).agg(
        (a & b).sum().alias("tp"),
        (a & ~b).sum().alias("fp"),
        (~a & b).sum().alias("fn"),
        (~a & ~b).sum().alias("tn"),
    )


def binary_figures(counts: pl.DataFrame, how: How) -> dict[str, Interval | None]:
    """Precision, recall, F1, accuracy and Cohen's kappa of A against B.

    Args:
        counts: From `by_query`; one row a query.
        how: Of the intervals, by query.

    Returns:
        Figure -> interval; None where it is not defined (no positive of A: no precision).
    """
    columns = counts.select(_COUNTS).to_numpy().astype(np.float64)

    def divide(top: Array, bottom: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(top / bottom, dtype=np.float64)

    statistics: dict[str, Callable[[Array], Array]] = {
        "precision": lambda s: divide(s[:, 0], s[:, 0] + s[:, 1]),
        "recall": lambda s: divide(s[:, 0], s[:, 0] + s[:, 2]),
        "f1": lambda s: divide(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2]),
        "accuracy": lambda s: divide(s[:, 0] + s[:, 3], s.sum(axis=1)),
        "kappa": _kappa,
    }
    return {name: of_sums(columns, f, how) for name, f in statistics.items()}


def _kappa(sums: Array) -> Array:
    """Cohen's kappa (J. Cohen, EPM 20, 1960) of rows of (tp, fp, fn, tn); 0/0 where both say one thing throughout."""
    tp, fp, fn, tn = sums.T
    n = sums.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (tp + tn) / n
        chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / (n * n)
        return np.asarray((observed - chance) / (1 - chance), dtype=np.float64)


def set_figures(counts: pl.DataFrame, how: How) -> dict[str, Interval | None]:
    """A's set of positives against B's, query by query; queries where B's set is empty by themselves.

    Where nothing is needed (a reader knows the answer), precision and recall are not defined and a judge that selects
    something is wrong: averaged in with the rest that would not be seen.

    Args:
        counts: From `by_query`.
        how: Of the intervals, by query.

    Returns:
        `precision`, `recall`, `f1` (means over queries with a positive of B; without any of A they are 0) and `selected`
        (positives of A there); `empty_accuracy` (share of queries without a positive of B for which A has none either) and
        `empty_selected`. None where there is no such query.
    """
    full = counts.filter(pl.col("tp") + pl.col("fn") > 0)
    tp, fp, fn = (full[name].to_numpy().astype(np.float64) for name in ("tp", "fp", "fn"))
    chosen = tp + fp
    empty = counts.filter(pl.col("tp") + pl.col("fn") == 0)["fp"].to_numpy().astype(np.float64)
    precision = np.divide(tp, chosen, out=np.zeros_like(tp), where=chosen > 0)
    values = {
        "precision": precision,
        "recall": tp / (tp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "selected": chosen,
        "empty_accuracy": (empty == 0).astype(np.float64),
        "empty_selected": empty,
    }
    shares = ("precision", "recall", "f1", "empty_accuracy")
    interval: dict[bool, Callable[..., Interval]] = {True: share_interval, False: mean_interval}
    return {
        name: interval[name in shares](x, seed=how.seed, draws=how.draws, level=how.level) if len(x) else None
        for name, x in values.items()
    }


def graded_figures(pairs: pl.DataFrame, how: How) -> dict[str, Interval | None]:
    """Agreement of grades: quadratically weighted kappa, and Krippendorff's alpha with the interval metric.

    Both are functions of sums over pairs (of squared differences, squares and totals), which is what is resampled.
    (J. Cohen, Psychological Bulletin 70, 1968; K. Krippendorff, *Content Analysis*, 2004.)

    Args:
        pairs: From `paired`; those with both grades count.
        how: Of the intervals, by query.
    """
    graded = pairs.filter(pl.col("grade_a").is_not_null() & pl.col("grade_b").is_not_null())
    if not graded.height:
        return {"weighted_kappa": None, "alpha": None}
    a, b = pl.col("grade_a").cast(pl.Float64), pl.col("grade_b").cast(pl.Float64)
    sums = graded.group_by("query_id", maintain_order=True).agg(
        pl.len().cast(pl.Float64).alias("n"),
        ((a - b) ** 2).sum().alias("gap"),
        a.sum().alias("a"),
        b.sum().alias("b"),
        (a**2).sum().alias("aa"),
        (b**2).sum().alias("bb"),
    )
    columns = sums.drop("query_id").to_numpy().astype(np.float64)

    def weighted_kappa(s: Array) -> Array:
        n, gap, ta, tb, aa, bb = s.T
        with np.errstate(invalid="ignore", divide="ignore"):
            by_chance = aa / n + bb / n - 2 * (ta / n) * (tb / n)
            return np.asarray(1 - (gap / n) / by_chance, dtype=np.float64)

    def alpha(s: Array) -> Array:
        n, gap, ta, tb, aa, bb = s.T
        with np.errstate(invalid="ignore", divide="ignore"):
            values = 2 * n
            # Of all ordered pairs of values, whoever gave them.
            expected = 2 * (values * (aa + bb) - (ta + tb) ** 2) / (values * (values - 1))
            return np.asarray(1 - (gap / n) / expected, dtype=np.float64)

    return {"weighted_kappa": of_sums(columns, weighted_kappa, how), "alpha": of_sums(columns, alpha, how)}


def order_figures(pairs: pl.DataFrame, how: How) -> dict[str, Interval | None]:
    """Whether A puts B's positives first: area under the curve within a query, and Kendall's tau-b with B's grades.

    A's order is that of its values, else its ranks, else its grades, else its yes and no. Of the queries in which both
    orders say something at all; 0.5 and 0 are chance.

    Args:
        pairs: From `paired`.
        how: Of the intervals, by query.
    """
    from scipy.stats import kendalltau

    score = pl.coalesce(
        pl.col("value_a"),
        -pl.col("rank_a").cast(pl.Float64),
        pl.col("grade_a").cast(pl.Float64),
        pl.col("positive_a").cast(pl.Float64),
    )
    target = pl.coalesce(pl.col("grade_b"), pl.col("positive_b").cast(pl.Int32)).cast(pl.Float64)
    rows = pairs.with_columns(score.alias("_a"), target.alias("_b"))
    areas, taus = [], []
    lists = rows.group_by("query_id", maintain_order=True).agg("_a", "_b", "positive_b")
    for _, a, b, positive in lists.iter_rows():
        scores, truth = np.asarray(a), np.asarray(positive, dtype=bool)
        if truth.any() and not truth.all():
            areas.append(_area(scores[truth], scores[~truth]))
        if len(set(b)) > 1:
            # An order without any preference agrees with nothing and contradicts nothing.
            taus.append(float(kendalltau(a, b).statistic) if len(set(a)) > 1 else 0.0)
    return {"auc": _mean(areas, how), "tau": _mean(taus, how)}


def _area(positives: Array, negatives: Array) -> float:
    """Share of (positive, negative) pairs in the right order, ties half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positives, negatives]))
    m, n = len(positives), len(negatives)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def cut_offs(pairs: pl.DataFrame, how: How) -> list[tuple[int, dict[str, Interval | None], Interval]]:
    """Figures at every cut-off of A's grades: (least grade of a positive, figures, positives a query)."""
    graded = pairs.filter(pl.col("grade_a").is_not_null())
    grades = sorted(g for g in graded["grade_a"].unique().to_list() if g > graded["grade_a"].min())
    found = []
    for grade in grades:
        cut = graded.with_columns((pl.col("grade_a") >= grade).alias("positive_a"))
        counts = by_query(cut)
        positives = (counts["tp"] + counts["fp"]).cast(pl.Float64).to_list()
        found.append(
            (
                grade,
                binary_figures(counts, how),
                mean_interval(positives, seed=how.seed, draws=how.draws, level=how.level),
            )
        )
    return found


def confusion(pairs: pl.DataFrame) -> tuple[list[str], list[str], list[list[int]]]:
    """How often which label of A meets which of B: A's labels (rows), B's labels (columns), counts."""

    def named(side: str) -> pl.Expr:
        yes = pl.when(pl.col(f"positive_{side}")).then(pl.lit("yes")).otherwise(pl.lit("no"))
        return pl.coalesce(pl.col(f"grade_{side}").cast(pl.String), yes)

    b = pl.when(pl.col("held")).then(named("b")).otherwise(pl.lit("not judged")).alias("_b")
    table = pairs.select(named("a").alias("_a"), b).group_by("_a", "_b").len()
    counts = {(x, y): n for x, y, n in table.iter_rows()}
    rows = sorted({x for x, _ in counts}, key=_label_order)
    columns = sorted({y for _, y in counts}, key=_label_order)
    return rows, columns, [[counts.get((x, y), 0) for y in columns] for x in rows]


def _label_order(name: str) -> tuple[int, float, str]:
    try:
        return 1, float(name), name
    except ValueError:
        return (0 if name == "not judged" else 2), 0.0, name


def of_sums(columns: Array, statistic: Callable[[Array], Array], how: How) -> Interval | None:
    """Percentile interval of a function of column sums.

    Args:
        columns: (n, k), one row a query.
        statistic: (draws, k) sums -> (draws,) figures; may be nan where a draw leaves it undefined.
        how: The draws.

    Returns:
        None where the figure is undefined on the data as it is.
    """
    if not len(columns):
        return None
    estimate = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    if not np.isfinite(estimate):
        return None
    drawn = statistic(resampled_sums(columns, how.seed, how.draws))
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - how.level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (estimate, estimate)
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), len(columns))


def _mean(values: list[float], how: How) -> Interval | None:
    return mean_interval(values, seed=how.seed, draws=how.draws, level=how.level) if values else None


def as_json(figures: Mapping[str, Interval | None]) -> dict[str, dict[str, float | int] | None]:
    """Figures for `results.json`."""
    return {name: None if x is None else x.as_dict() for name, x in figures.items()}
