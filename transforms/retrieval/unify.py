"""From judgments to one label a pair: labels of different annotators or target models merge only as they are told to.

A merge never rewrites who judged: the row that wins is one that stood there, with its own label source and annotator,
and all that took part are listed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from schemas.errors import InputError
from schemas.judgments import READABLE, SET_KEY

POLICIES = ("apart", "max", "majority", "prefer_human")
PAIR = ("query_id", "doc_id")


@dataclass(frozen=True)
class PositiveRule:
    """When a label is positive: by its grade, else its yes or no, else its value, else its rank.

    Attributes:
        grade_from: Least grade.
        value_above: A value must lie above it (a gain of 0 is none).
        rank_to: Rank a label of ranks alone must have at least; None leaves such labels undecided.
    """

    grade_from: int = 1
    value_above: float = 0.0
    rank_to: int | None = None

    def expression(self) -> pl.Expr:
        """Boolean, null where the label says nothing either way."""
        by_rank = pl.lit(None, pl.Boolean) if self.rank_to is None else pl.col("rank") <= self.rank_to
        return pl.coalesce(
            pl.col("grade") >= self.grade_from,
            pl.col("binary"),
            pl.col("value") > self.value_above,
            by_rank,
        ).alias("positive")


@dataclass(frozen=True)
class LabelFilter:
    """Which labels count.

    Attributes:
        label_source: human or llm; None = both.
        annotators: Empty = all.
        signals: Empty = all.
        target_models: Empty = all; `agnostic` stands for labels of no target model.
        splits: Empty = all.
    """

    label_source: str | None = None
    annotators: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    target_models: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()

    def apply(self, labels: pl.DataFrame) -> pl.DataFrame:
        """The labels that count."""
        keep = pl.lit(True)
        if self.label_source is not None:
            keep &= pl.col("label_source") == self.label_source
        for column, wanted in (
            ("annotator", self.annotators),
            ("signal", self.signals),
            ("split", self.splits),
        ):
            if wanted:
                keep &= pl.col(column).is_in(list(wanted)).fill_null(False)
        if self.target_models:
            named = [t for t in self.target_models if t != "agnostic"]
            of_target = pl.col("target_model").is_in(named).fill_null(False)
            if "agnostic" in self.target_models:
                of_target |= pl.col("target_model").is_null()
            keep &= of_target
        return labels.filter(keep)


def readable(labels: pl.DataFrame) -> pl.DataFrame:
    """Labels whose reply could be read; the others are findings about the judge, never labels."""
    return labels.filter(pl.col("parse_status").is_in(list(READABLE)))


def label_sets(labels: pl.DataFrame, rule: PositiveRule = PositiveRule()) -> pl.DataFrame:
    """Who judged what: one row a label set.

    Returns:
        The columns of `SET_KEY`, `name`, `labels`, `queries`, `positives`, `unreadable`.
    """
    return (
        labels.with_columns(
            rule.expression(),
            (~pl.col("parse_status").is_in(list(READABLE))).alias("_bad"),
        )
        .group_by(SET_KEY, maintain_order=True)
        .agg(
            pl.len().alias("labels"),
            pl.col("query_id").n_unique().alias("queries"),
            pl.col("positive").sum().alias("positives"),
            pl.col("_bad").sum().alias("unreadable"),
        )
        .with_columns(set_name().alias("name"))
        .sort("label_source", "annotator", "target_model", "signal", nulls_last=False)
    )


def set_name() -> pl.Expr:
    """Name of a row's label set: `llm qwen3@ab12 utilsel for llama3`."""
    target = (
        pl.when(pl.col("target_model").is_null()).then(pl.lit("")).otherwise(" for " + pl.col("target_model"))
    )
    return pl.col("label_source") + " " + pl.col("annotator") + " " + pl.col("signal") + target


def unify(
    labels: pl.DataFrame,
    policy: str = "apart",
    rule: PositiveRule = PositiveRule(),
    *,
    across_targets: bool = False,
    where: str = "these judgments",
    contributors: bool = True,
) -> pl.DataFrame:
    """One label a pair, or the labels as they are.

    Args:
        labels: Judgments; unreadable ones are left out.
        policy: `apart`: nothing is merged; it is an error if a pair has several labels. `max`: the best of them.
            `majority`: what more than half of the label sets say (of equals: not positive, as judges over-label), each
            set speaking once. `prefer_human`: people's labels where there are any, else the judges'; the majority
            of either.
        rule: When a label is positive.
        across_targets: Also merge labels that hold for different target models.
        where: Named in errors.
        contributors: Whether to list who took part; large where there are millions of labels.

    Returns:
        The columns of the judgments, `positive` (null: undecided) and, where wanted, `contributors`: list of who took part and what
        each said. One row a pair, in order of first appearance.

    Raises:
        InputError: Labels would have to be merged and the policy does not say how, or targets differ and
            `across_targets` is not given.
    """
    if policy not in POLICIES:
        raise InputError(f"no merge policy '{policy}'; there are {', '.join(POLICIES)}")
    rows = readable(labels).with_columns(rule.expression())
    several = rows.select(pl.struct(PAIR).is_duplicated().any()).item() if rows.height else False
    if several:
        _check_targets(rows, across_targets, where)
        if policy == "apart":
            raise InputError(_say_apart(rows, where))
    rows = rows.with_row_index("_row")
    merged = (_merge(rows, policy) if several else rows).sort("_row")
    if contributors:
        merged = merged.join(_contributors(rows), on=PAIR, how="left", maintain_order="left")
    return merged.drop("_row")


def query_sets(
    labels: pl.DataFrame,
    queries: pl.DataFrame | None = None,
    rule: PositiveRule = PositiveRule(),
) -> pl.DataFrame:
    """Every label set's verdict on every query it saw, empty sets included.

    Args:
        labels: Judgments.
        queries: Of `QUERY_SCHEMA`: a query some target model answers unaided has an (empty) set for that model even
            where nothing was judged.
        rule: When a label is positive.

    Returns:
        query_id, the columns of `SET_KEY`, `judged`, `positives`, `known_query`.
    """
    found = (
        readable(labels)
        .with_columns(rule.expression())
        .group_by("query_id", *SET_KEY, maintain_order=True)
        .agg(
            pl.len().alias("judged"),
            pl.col("positive").sum().cast(pl.UInt32).alias("positives"),
            pl.col("known_query").any(ignore_nulls=True).alias("known_query"),
        )
    )
    if queries is None or "known_to" not in queries.columns:
        return found
    known = (
        queries.select("query_id", pl.col("known_to").alias("target_model"))
        .explode("target_model", empty_as_null=True, keep_nulls=True)
        .drop_nulls("target_model")
    )
    if not known.height:
        return found
    marked = found.join(
        known.with_columns(pl.lit(True).alias("_known")),
        on=["query_id", "target_model"],
        how="left",
        maintain_order="left",
    )
    marked = marked.with_columns(
        (pl.col("known_query").fill_null(False) | pl.col("_known").fill_null(False)).alias("known_query")
    ).drop("_known")
    sets = labels.select(SET_KEY).unique(maintain_order=True).drop_nulls("target_model")
    silent = known.join(sets, on="target_model", how="inner").join(
        found.select("query_id", *SET_KEY), on=["query_id", *SET_KEY], how="anti"
    )
    silent = silent.select(
        "query_id",
        *SET_KEY,
        pl.lit(0, pl.UInt32).alias("judged"),
        pl.lit(0, pl.UInt32).alias("positives"),
        pl.lit(True).alias("known_query"),
    )
    return pl.concat([marked, silent], how="vertical_relaxed")


def _contributors(rows: pl.DataFrame) -> pl.DataFrame:
    fields = (*SET_KEY, "grade", "positive")
    return rows.group_by(PAIR, maintain_order=True).agg(pl.struct(*fields).alias("contributors"))


def _merge(rows: pl.DataFrame, policy: str) -> pl.DataFrame:
    human_first = (pl.col("label_source") != "human").alias("_llm")
    if policy == "max":
        return rows.sort(
            pl.col("positive").cast(pl.Int8),
            pl.col("grade"),
            pl.col("value"),
            ~human_first,
            pl.col("_row"),
            descending=[True, True, True, True, False],
            nulls_last=True,
            maintain_order=True,
        ).unique(PAIR, keep="first", maintain_order=True)
    if policy == "prefer_human":
        rows = rows.with_columns(
            (pl.col("label_source") == "human").any().over(PAIR).alias("_judged_by_people")
        )
        rows = rows.filter(~pl.col("_judged_by_people") | (pl.col("label_source") == "human"))
        rows = rows.drop("_judged_by_people")
    once = _majority(rows, (*PAIR, *SET_KEY))
    return _majority(once, PAIR)


def _majority(rows: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """One row a key: the middle grade (of two middles the lower) and what more than half say."""
    counted = rows.with_columns(
        (pl.col("positive").sum().over(key) * 2 > pl.col("positive").count().over(key)).alias("_decision"),
        pl.col("positive").count().over(key).alias("_votes"),
        pl.col("grade").quantile(0.5, "lower").over(key).cast(pl.Int32).alias("_middle"),
        (pl.col("label_source") != "human").alias("_llm"),
        pl.len().over(key).alias("_size"),
    ).with_columns(
        pl.when(pl.col("_votes") > 0).then(pl.col("_decision")).alias("_decision"),
        (pl.col("value").mean().over(key)).alias("_mean"),
    )
    agrees = (pl.col("positive") == pl.col("_decision")).fill_null(False)
    chosen = counted.sort(
        ~agrees, pl.col("grade").ne_missing(pl.col("_middle")), "_llm", "_row", maintain_order=True
    ).unique(key, keep="first", maintain_order=True)
    alone = pl.col("_size") == 1
    return chosen.with_columns(
        pl.when(alone).then(pl.col("grade")).otherwise(pl.col("_middle")).alias("grade"),
        pl.when(alone).then(pl.col("value")).otherwise(pl.col("_mean")).alias("value"),
        pl.when(alone).then(pl.col("binary")).otherwise(pl.col("_decision")).alias("binary"),
        pl.when(alone).then(pl.col("positive")).otherwise(pl.col("_decision")).alias("positive"),
    ).drop("_decision", "_votes", "_middle", "_llm", "_mean", "_size")


def _check_targets(rows: pl.DataFrame, across_targets: bool, where: str) -> None:
    if across_targets:
        return
    differ = (
        rows.group_by(PAIR)
        .agg(pl.col("target_model").n_unique().alias("n"))
        .select((pl.col("n") > 1).any())
        .item()
    )
    if differ:
        targets = [t or "agnostic" for t in rows["target_model"].unique().sort().to_list()]
        raise InputError(
            f"{where} hold for {len(targets)} target models ({', '.join(targets)}), and what is useful to one is not to "
            "another; choose with --target-model, or pass --across-targets to merge them all the same"
        )


def _say_apart(rows: pl.DataFrame, where: str) -> str:
    names = rows.select(set_name().unique(maintain_order=True)).to_series().to_list()
    if len(names) == 1:
        return (
            f"{where} hold several labels of one annotator for a pair (contexts, prompts or splits); choose with --split, or "
            "say how they merge: --unify max or majority"
        )
    return (
        f"{where} hold labels of {len(names)} annotators for the same pairs ({'; '.join(names[:4])}); choose with "
        "--annotator, --label-source or --signal, or say how they merge: --unify max, majority or prefer_human"
    )
