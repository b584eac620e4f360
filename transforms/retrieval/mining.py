"""Hard negatives from a pool: who may be one, and for everybody else the reason why not.

Margins are read against the query's positives in the same source, since scores of two retrievers mean nothing to one
another. The relative margin is a share of the positive's size (`limit = s - |s| m`), which also says something sensible
where scores are negative (G. de S. P. Moreira et al., "NV-Retriever", 2024: a margin of 0.05).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from schemas.errors import TamisError

AGAINST = {"weakest": "min", "strongest": "max", "mean": "mean"}
JUDGED = "judged"  # source of negatives that were judged, not only found
# A document one source's score unmasks is no negative of another source either.
_BY_SCORE = ("above_max_score", "absolute_margin", "relative_margin", "no_positive_score")


@dataclass(frozen=True)
class MiningRules:
    """Which candidates become negatives.

    Attributes:
        sources: Sources of the pool to use, in order of preference; empty = all. `judged` stands for judged negatives.
        first_rank: Candidates ranked before it are left out (the top of a list is where unlabelled positives are).
        last_rank: So are those ranked after it; None = no end.
        min_score: Least score; None = no bound.
        max_score: Highest score; None = no bound.
        absolute_margin: A candidate's score must stay this far below the positive's; None = no margin.
        relative_margin: As a share of the positive's; None = no margin.
        against: Which positive of the query: its weakest, its strongest, their mean.
        without_score: Where no positive of the query has a score in the source: `keep` candidates, or `drop` them.
        max_negatives: Negatives a query keeps, best ranked first; None = all.

    Raises:
        TamisError: The rules contradict one another.
    """

    sources: tuple[str, ...] = ()
    first_rank: int = 1
    last_rank: int | None = None
    min_score: float | None = None
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    against: str = "weakest"
    without_score: str = "keep"
    max_negatives: int | None = None

    def __post_init__(self) -> None:
        if self.against not in AGAINST:
            raise TamisError(f"--margin-against '{self.against}' is not one of {', '.join(AGAINST)}")
        if self.without_score not in ("keep", "drop"):
            raise TamisError(f"--without-score '{self.without_score}' is neither keep nor drop")
        if self.first_rank < 1 or (self.last_rank is not None and self.last_rank < self.first_rank):
            raise TamisError(
                f"--ranks {self.first_rank}-{self.last_rank} holds no rank: ranks start at 1 and rise"
            )
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise TamisError(
                f"no score lies between --min-score {self.min_score} and --max-score {self.max_score}"
            )
        if self.max_negatives is not None and self.max_negatives < 1:
            raise TamisError("--max-negatives must be 1 or more (--min-negatives 0 makes groups without any)")

    @property
    def has_margin(self) -> bool:
        """Whether any margin is set."""
        return self.absolute_margin is not None or self.relative_margin is not None


def score_limits(pool: pl.DataFrame, positives: pl.DataFrame, rules: MiningRules) -> pl.DataFrame:
    """How high a negative may score, by query and source.

    Args:
        pool: Of `POOL_SCHEMA`.
        positives: query_id, doc_id.
        rules: The margins.

    Returns:
        query_id, source, absolute_limit, relative_limit: where a positive has a score.
    """
    scored = pool.join(positives.select("query_id", "doc_id"), on=["query_id", "doc_id"], how="semi")
    scored = scored.filter(pl.col("score").is_not_null())
    anchor: pl.Expr = getattr(pl.col("score"), AGAINST[rules.against])()
    limits = scored.group_by("query_id", "source").agg(anchor.alias("_anchor"))
    absolute = (
        pl.lit(None, pl.Float64)
        if rules.absolute_margin is None
        else pl.col("_anchor") - rules.absolute_margin
    )
    relative = (
        pl.lit(None, pl.Float64)
        if rules.relative_margin is None
        else pl.col("_anchor") - pl.col("_anchor").abs() * rules.relative_margin
    )
    return limits.select(
        "query_id", "source", absolute.alias("absolute_limit"), relative.alias("relative_limit")
    )


def mine(
    candidates: pl.DataFrame, positives: pl.DataFrame, mask: pl.DataFrame, rules: MiningRules
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split candidates into negatives and rejected ones.

    Args:
        candidates: query_id, doc_id, source, rank, score, grade: the pool, and judged negatives with the source
            `judged`; further rows of positives are what margins are read from.
        positives: query_id, doc_id of the stage.
        mask: query_id, doc_id, why: documents that must not be a query's negatives.
        rules: The rules.

    Returns:
        Negatives, one row a document, best ranked first; and rejected candidates with `reason` and `limit`. Every
        candidate is in one or the other, save that further sources of an accepted document are in neither.
    """
    rows = candidates.with_row_index("_row")
    limits = score_limits(candidates, positives, rules) if rules.has_margin else None
    if limits is not None:
        rows = rows.join(limits, on=["query_id", "source"], how="left", maintain_order="left")
    else:
        none = pl.lit(None, pl.Float64)
        rows = rows.with_columns(none.alias("absolute_limit"), none.alias("relative_limit"))
    rows = rows.join(
        mask.select("query_id", "doc_id", "why").unique(
            ["query_id", "doc_id"], keep="first", maintain_order=True
        ),
        on=["query_id", "doc_id"],
        how="left",
        maintain_order="left",
    ).with_columns(_reason(rules))
    # What one source's score gives away holds for the document, whoever else found it.
    unmasked = pl.col("reason").is_in(list(_BY_SCORE)).fill_null(False)
    rows = rows.with_columns(unmasked.any().over("query_id", "doc_id").alias("_unmasked"))
    rows = rows.with_columns(
        pl.when(pl.col("reason").is_null() & pl.col("_unmasked"))
        .then(pl.lit("rejected_in_another_source"))
        .otherwise(pl.col("reason"))
        .alias("reason")
    )
    order = {name: i for i, name in enumerate(rules.sources)}
    preference = pl.col("source").replace_strict(order, default=len(order), return_dtype=pl.Int32)
    accepted = (
        rows.filter(pl.col("reason").is_null())
        .sort("query_id", "rank", preference, "_row", nulls_last=True, maintain_order=True)
        .unique(["query_id", "doc_id"], keep="first", maintain_order=True)
    )
    rejected = rows.filter(pl.col("reason").is_not_null())
    if rules.max_negatives is not None:
        place = pl.int_range(pl.len()).over("query_id")
        accepted = accepted.with_columns(place.alias("_place"))
        over = accepted.filter(pl.col("_place") >= rules.max_negatives)
        over = over.with_columns(pl.lit("over_max_negatives").alias("reason")).drop("_place")
        rejected = pl.concat([rejected, over.select(rejected.columns)])
        accepted = accepted.filter(pl.col("_place") < rules.max_negatives).drop("_place")
    limit = (
        pl.when(pl.col("reason") == "absolute_margin")
        .then(pl.col("absolute_limit"))
        .when(pl.col("reason") == "relative_margin")
        .then(pl.col("relative_limit"))
        .when(pl.col("reason") == "above_max_score")
        .then(pl.lit(rules.max_score, pl.Float64))
        .alias("limit")
    )
    columns = ("query_id", "doc_id", "source", "rank", "score")
    return (
        accepted.select(*columns, "grade"),
        rejected.sort("_row").select(*columns, "reason", limit),
    )


def _reason(rules: MiningRules) -> pl.Expr:
    """The first rule a candidate breaks; null where it breaks none."""
    score, rank = pl.col("score"), pl.col("rank")
    broken: list[tuple[str, pl.Expr]] = [("graded_above_none", pl.col("grade") > 0)]
    if rules.sources:
        broken.append(("source_not_used", ~pl.col("source").is_in(list(rules.sources))))
    if rules.first_rank > 1:
        broken.append(("before_first_rank", rank < rules.first_rank))
    if rules.last_rank is not None:
        broken.append(("after_last_rank", rank > rules.last_rank))
    if rules.max_score is not None:
        broken.append(("above_max_score", score > rules.max_score))
    if rules.min_score is not None:
        broken.append(("below_min_score", score < rules.min_score))
    if rules.absolute_margin is not None:
        broken.append(("absolute_margin", score > pl.col("absolute_limit")))
    if rules.relative_margin is not None:
        broken.append(("relative_margin", score > pl.col("relative_limit")))
    if rules.has_margin and rules.without_score == "drop":
        nothing = pl.col("absolute_limit").is_null() & pl.col("relative_limit").is_null()
        broken.append(("no_positive_score", nothing & score.is_not_null()))
    rest = [pl.when(condition).then(pl.lit(name)) for name, condition in broken]
    return pl.coalesce(pl.col("why"), *rest).alias("reason")
