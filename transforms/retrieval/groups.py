"""Judgments and candidates to training groups: stages, the false-negative mask, and what was left out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import polars as pl
import pyarrow as pa

from schemas.errors import InputError
from schemas.fingerprint import derive_seed
from schemas.groups import DROPPED_SCHEMA, GROUP_SCHEMA, MASK_SCHEMA, REJECTED_SCHEMA
from schemas.judgments import READABLE
from transforms.retrieval.mining import JUDGED, MiningRules, mine
from transforms.retrieval.unify import LabelFilter, PositiveRule, label_sets, readable, unify

REGIMES = ("auto", "single", "curriculum", "union")
RANDOM = "random"
# Of the many columns of a label: what groups are made by.
LABEL_COLUMNS = (
    "query_id", "doc_id", "grade", "binary", "value", "rank", "label_source", "annotator", "target_model", "signal",
    "known_query", "pool_rank", "parse_status", "split",
)  # fmt: skip
UNION_WARNING = (
    "union puts LLM and human positives in one stage; published measurements find that worse than the same labels in two "
    "stages (MRR@10 33.2 against 38.2 on MS MARCO, with 20% of the human labels): --regime curriculum trains LLM labels "
    "first, then human ones"
)


@dataclass(frozen=True)
class Stage:
    """A training stage: which labels, and when they are positive.

    Attributes:
        name: Its tag in the shards.
        labels: Which labels count.
        rule: When one is positive.
        unify: How labels of several annotators become one (`transforms.retrieval.unify`).
    """

    name: str
    labels: LabelFilter = field(default_factory=LabelFilter)
    rule: PositiveRule = field(default_factory=PositiveRule)
    unify: str = "apart"


@dataclass(frozen=True)
class StageRows:
    """What a stage is made of, flat: one row a document.

    Attributes:
        stage: The stage.
        number: Its place in the order of stages.
        positives: query_id, doc_id, quality_rank, grade, value, label_source, annotator; best first in a query.
        negatives: query_id, doc_id, source, rank, score, grade; hardest first.
        rejected: Candidates that became neither, with reason.
        known: Queries the target model answers unaided.
        judged: Queries with any label of the stage.
    """

    stage: Stage
    number: int
    positives: pl.DataFrame
    negatives: pl.DataFrame
    rejected: pl.DataFrame
    known: frozenset[str]
    judged: frozenset[str]


def make_stages(
    labels: pl.DataFrame,
    regime: str,
    chosen: LabelFilter,
    rules: dict[str, PositiveRule],
    unify_policy: str,
) -> tuple[list[Stage], list[str]]:
    """The stages of a regime, in the order they are trained.

    Args:
        labels: Judgments.
        regime: `single`: one stage, of one label source. `curriculum`: LLM labels, then human ones. `union`: both in one
            stage. `auto`: single where there is one source, else curriculum.
        chosen: Which labels count at all.
        rules: Rule by label source; `""` for every source not named.
        unify_policy: How labels of several annotators merge.

    Returns:
        The stages, and warnings.

    Raises:
        InputError: No labels, or not of the sources the regime needs.
    """
    if regime not in REGIMES:
        raise InputError(f"no regime '{regime}'; there are {', '.join(REGIMES)}")
    kept = chosen.apply(labels)
    if not kept.height:
        raise InputError(_say_none(labels))
    sources = set(kept["label_source"].unique())

    def stage(source: str) -> Stage:
        only = LabelFilter(source, chosen.annotators, chosen.signals, chosen.target_models, chosen.splits)
        return Stage(source, only, rules.get(source, rules[""]), unify_policy)

    if regime == "auto":
        regime = "single" if len(sources) == 1 else "curriculum"
    if regime == "union":
        policy = "max" if unify_policy == "apart" else unify_policy
        return [Stage("union", chosen, rules[""], policy)], [UNION_WARNING]
    if regime == "curriculum":
        if sources != {"llm", "human"}:
            raise InputError(
                f"a curriculum needs LLM and human labels, and there are only {', '.join(sorted(sources))} ones; pass both "
                "collections, or --regime single"
            )
        return [stage("llm"), stage("human")], []
    if len(sources) > 1:
        raise InputError(
            "--regime single trains one kind of labels and there are two: choose with --label-source, or pass --regime "
            "curriculum (LLM labels, then human ones) or union"
        )
    return [stage(sources.pop())], []


def false_negative_mask(
    labels: pl.DataFrame, rules: Sequence[PositiveRule], copies: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Documents that must not count as negatives of a query.

    Any positive of the query by any readable judgment, whoever gave it and for whichever stage: it is cheaper to lose a
    negative than to train against a positive. It is the query's own list; a document masked for one query stays a
    negative of all others.

    Args:
        labels: All judgments.
        rules: The stages' rules; positive by any of them, or by grade 1, is positive here.
        copies: doc_id, other, why: documents that say the same as another (equal text, rewrites of one base text).

    Returns:
        query_id, doc_id, why (`positive`, `same_text_as_positive`, `copy_of_positive`).
    """
    judged = labels.filter(pl.col("parse_status").is_in(list(READABLE)))
    any_rule = [r.expression().fill_null(False) for r in (*rules, PositiveRule())]
    found = judged.filter(pl.any_horizontal(*(e.alias(f"_{i}") for i, e in enumerate(any_rule))))
    mask = found.select("query_id", "doc_id").unique(maintain_order=True)
    mask = mask.with_columns(pl.lit("positive").alias("why"))
    if copies is not None and copies.height:
        more = mask.join(copies.rename({"why": "_why"}), on="doc_id", how="inner", maintain_order="left")
        more = more.select("query_id", pl.col("other").alias("doc_id"), pl.col("_why").alias("why"))
        mask = pl.concat([mask, more]).unique(["query_id", "doc_id"], keep="first", maintain_order=True)
    return mask


def find_copies(documents: pl.DataFrame, positives: pl.Series) -> pl.DataFrame:
    """Documents that say the same as a positive.

    Args:
        documents: doc_id, text_hash, base_id of every document (null: unknown).
        positives: Ids of positive documents.

    Returns:
        doc_id (the positive), other, why.
    """
    mine_ = documents.filter(pl.col("doc_id").is_in(positives.unique().implode()))
    parts = []
    for column, why in (("text_hash", "same_text_as_positive"), ("base_id", "copy_of_positive")):
        pairs = (
            mine_.select("doc_id", column)
            .drop_nulls(column)
            .join(
                documents.select(pl.col("doc_id").alias("other"), column).drop_nulls(column),
                on=column,
                how="inner",
                maintain_order="left",
            )
            .filter(pl.col("doc_id") != pl.col("other"))
        )
        parts.append(pairs.select("doc_id", "other", pl.lit(why).alias("why")))
    return pl.concat(parts)


def check_merges(stages: Sequence[Stage], labels: pl.DataFrame, *, across_targets: bool = False) -> None:
    """Refuse labels that would have to be merged before anything is written, by the pairs that have several.

    Raises:
        InputError: As `unify`.
    """
    for stage in stages:
        own = readable(stage.labels.apply(labels))
        several = own.filter(own.select("query_id", "doc_id").is_duplicated())
        _unified(stage, several, across_targets)


def _unified(stage: Stage, own: pl.DataFrame, across_targets: bool) -> pl.DataFrame:
    return unify(
        own,
        stage.unify,
        stage.rule,
        across_targets=across_targets,
        contributors=False,
        where=f"the labels of stage '{stage.name}'",
    )


def stage_rows(
    stage: Stage,
    number: int,
    labels: pl.DataFrame,
    pool: pl.DataFrame,
    mask: pl.DataFrame,
    rules: MiningRules,
    *,
    across_targets: bool = False,
) -> StageRows:
    """Positives and negatives of one stage.

    Args:
        stage: The stage.
        number: Its place.
        labels: All judgments.
        pool: All candidates.
        mask: From `false_negative_mask`.
        rules: Which candidates become negatives.
        across_targets: See `unify`.

    Raises:
        InputError: Labels would have to be merged and nobody said how.
    """
    own = stage.labels.apply(labels)
    one = _unified(stage, own, across_targets)
    positives = quality_order(one.filter(pl.col("positive").fill_null(False)))
    below = one.filter(pl.col("positive").not_().fill_null(False))
    judged = below.select(
        "query_id",
        "doc_id",
        pl.lit(JUDGED).alias("source"),
        pl.col("pool_rank").cast(pl.Int32).alias("rank"),
        pl.lit(None, pl.Float64).alias("score"),
        "grade",
    )
    queries = one.select("query_id").unique()
    judged = pl.concat([judged, _judged_elsewhere(stage, labels, one, queries)])
    found = pool.join(queries, on="query_id", how="semi").join(
        one.select("query_id", "doc_id", "grade"),
        on=["query_id", "doc_id"],
        how="left",
        maintain_order="left",
    )
    unread = own.filter(~pl.col("parse_status").is_in(list(READABLE))).select("query_id", "doc_id")
    # Asked about and not understood: neither a positive nor a negative.
    barred = pl.concat(
        [mask, _barred(unread, mask, "unreadable_label"), _barred(_undecided(one), mask, "undecided_label")]
    )
    candidates = pl.concat([judged, found.select(judged.columns)])
    negatives, rejected = mine(candidates, positives, barred, rules)
    known = frozenset(own.filter(pl.col("known_query").fill_null(False))["query_id"].unique())
    # A positive is in the pool to be compared with; that it is no negative needs no saying.
    rejected = rejected.join(positives.select("query_id", "doc_id"), on=["query_id", "doc_id"], how="anti")
    return StageRows(
        stage, number, positives, negatives, rejected, known, frozenset(own["query_id"].unique())
    )


def quality_order(positives: pl.DataFrame) -> pl.DataFrame:
    """Positives best first: by grade, value, rank in the annotator's list, people before models, then arrival."""
    ordered = positives.with_row_index("_row").sort(
        pl.col("grade"),
        pl.col("value"),
        -pl.col("rank").cast(pl.Int64),
        (pl.col("label_source") == "human"),
        -pl.col("_row").cast(pl.Int64),
        descending=True,
        nulls_last=True,
        maintain_order=True,
    )
    place = (pl.int_range(pl.len(), dtype=pl.Int32) + 1).over("query_id").alias("quality_rank")
    return ordered.with_columns(place).select(
        "query_id", "doc_id", "quality_rank", "grade", "value", "label_source", "annotator"
    )


def random_candidates(
    queries: Sequence[str], doc_ids: Sequence[str], mask: pl.DataFrame, count: int, seed: int
) -> pl.DataFrame:
    """Documents drawn at random for each query, none of them masked, as candidates of the source `random`."""
    barred = {q: set(d) for q, d in mask.group_by("query_id").agg("doc_id").iter_rows()}
    rows: list[tuple[str, str, int]] = []
    for query in queries:
        draw = random.Random(derive_seed(seed, query, RANDOM))
        no = barred.get(query, set())
        most = min(len(doc_ids), count + len(no))
        fit = [doc_ids[i] for i in draw.sample(range(len(doc_ids)), most) if doc_ids[i] not in no]
        rows += [(query, doc, rank) for rank, doc in enumerate(fit[:count], 1)]
    schema = {"query_id": pl.String, "doc_id": pl.String, "rank": pl.Int32}
    found = pl.DataFrame(rows, schema=schema, orient="row")
    return found.select(
        "query_id",
        "doc_id",
        pl.lit(RANDOM).alias("source"),
        "rank",
        pl.lit(None, pl.Float64).alias("score"),
    )


@dataclass(frozen=True)
class GroupShard:
    """What is written for some queries of a stage."""

    groups: pa.Table
    dropped: pa.Table
    rejected: pa.Table


def group_shard(
    rows: StageRows,
    queries: Sequence[str],
    texts: dict[str, str | None],
    documents: pl.DataFrame | None,
    *,
    min_negatives: int = 1,
    need_text: bool = False,
) -> GroupShard:
    """Groups of some queries, in their order; those that make none are dropped with the reason.

    Args:
        rows: The stage.
        queries: Query ids, in the order wanted.
        texts: Query text by id.
        documents: doc_id, title, text of what the groups name; None leaves texts null.
        min_negatives: Fewer drop the query; 0 makes groups for in-batch negatives alone.
        need_text: A document without text is rejected, a query without text dropped.
    """
    ids = pl.DataFrame({"query_id": list(queries)}, schema={"query_id": pl.String})
    positives = rows.positives.join(ids, on="query_id", how="semi")
    negatives = rows.negatives.join(ids, on="query_id", how="semi")
    rejected = [rows.rejected.join(ids, on="query_id", how="semi")]
    if documents is not None:
        positives, lost = _with_texts(positives, documents)
        rejected.append(_no_text(lost, "positive"))
        negatives, lost = _with_texts(negatives, documents)
        rejected.append(_no_text(lost, None))
    else:
        none = (pl.lit(None, pl.String).alias("title"), pl.lit(None, pl.String).alias("text"))
        positives, negatives = positives.with_columns(*none), negatives.with_columns(*none)
    lists = ids.join(
        _listed(positives, "positives", GROUP_SCHEMA), on="query_id", how="left", maintain_order="left"
    )
    lists = lists.join(
        _listed(negatives, "negatives", GROUP_SCHEMA), on="query_id", how="left", maintain_order="left"
    )
    query_text = pl.Series("query", [texts.get(q) for q in queries], pl.String)
    lists = lists.with_columns(
        query_text,
        pl.col("positives").list.len().fill_null(0).cast(pl.Int32).alias("_p"),
        pl.col("negatives").list.len().fill_null(0).cast(pl.Int32).alias("_n"),
        pl.col("query_id").is_in(list(rows.known)).alias("_known"),
        pl.col("query_id").is_in(list(rows.judged)).alias("_judged"),
    )
    reason = (
        pl.when((pl.col("_p") == 0) & pl.col("_known"))
        .then(pl.lit("known_query_needs_no_document"))
        .when(~pl.col("_judged"))
        .then(pl.lit("no_label"))
        .when(pl.col("_p") == 0)
        .then(pl.lit("no_positive"))
        .when(pl.col("_n") < min_negatives)
        .then(pl.lit("no_negative" if min_negatives == 1 else "too_few_negatives"))
    )
    if need_text:
        reason = reason.when(pl.col("query").is_null()).then(pl.lit("no_query_text"))
    lists = lists.with_columns(reason.otherwise(pl.lit(None, pl.String)).alias("reason"))
    stage = pl.lit(rows.stage.name).alias("stage")
    kept = lists.filter(pl.col("reason").is_null()).with_columns(
        stage, pl.lit(rows.number, pl.Int32).alias("stage_number")
    )
    empty = pl.col("negatives").fill_null([])
    gone = lists.filter(pl.col("reason").is_not_null()).select(
        "query_id", stage, "reason", pl.col("_p").alias("positives"), pl.col("_n").alias("negatives")
    )
    log = pl.concat(rejected).with_columns(stage)
    return GroupShard(
        _to_arrow(kept.with_columns(empty), GROUP_SCHEMA),
        _to_arrow(gone, DROPPED_SCHEMA),
        _to_arrow(log, REJECTED_SCHEMA),
    )


def mask_table(mask: pl.DataFrame, queries: Sequence[str]) -> pa.Table:
    """The mask as one row a query, in the order of the queries."""
    ids = pl.DataFrame({"query_id": list(queries)}, schema={"query_id": pl.String})
    lists = mask.group_by("query_id").agg(pl.col("doc_id").unique().sort().alias("doc_ids"))
    return _to_arrow(ids.join(lists, on="query_id", how="inner", maintain_order="left"), MASK_SCHEMA)


def _judged_elsewhere(
    stage: Stage, labels: pl.DataFrame, one: pl.DataFrame, queries: pl.DataFrame
) -> pl.DataFrame:
    """What labels of other stages call negative: human labels seldom say no, and the judges' no is there to be used.

    Only where nobody said yes, which the mask sees to.
    """
    everybody = replace(stage.labels, label_source=None)
    rows = readable(everybody.apply(labels)).with_columns(stage.rule.expression())
    rows = rows.filter(pl.col("positive").not_().fill_null(False)).join(queries, on="query_id", how="semi")
    rows = rows.join(one.select("query_id", "doc_id"), on=["query_id", "doc_id"], how="anti")
    return (
        rows.sort("grade", descending=True, nulls_last=True, maintain_order=True)
        .unique(["query_id", "doc_id"], keep="first", maintain_order=True)
        .select(
            "query_id",
            "doc_id",
            pl.lit(JUDGED).alias("source"),
            pl.col("pool_rank").cast(pl.Int32).alias("rank"),
            pl.lit(None, pl.Float64).alias("score"),
            "grade",
        )
    )


def _barred(rows: pl.DataFrame, mask: pl.DataFrame, why: str) -> pl.DataFrame:
    fresh = rows.unique().join(mask, on=["query_id", "doc_id"], how="anti")
    return fresh.select("query_id", "doc_id", pl.lit(why).alias("why"))


def _undecided(one: pl.DataFrame) -> pl.DataFrame:
    return one.filter(pl.col("positive").is_null()).select("query_id", "doc_id")


def _with_texts(rows: pl.DataFrame, documents: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    joined = rows.join(
        documents.select("doc_id", "title", "text"), on="doc_id", how="left", maintain_order="left"
    )
    return joined.filter(pl.col("text").is_not_null()), joined.filter(pl.col("text").is_null())


def _no_text(lost: pl.DataFrame, source: str | None) -> pl.DataFrame:
    none_i, none_f = pl.lit(None, pl.Int32), pl.lit(None, pl.Float64)
    return lost.select(
        "query_id",
        "doc_id",
        pl.lit(source).alias("source") if source else pl.col("source"),
        none_i.alias("rank") if source else pl.col("rank"),
        none_f.alias("score") if source else pl.col("score"),
        pl.lit("no_text").alias("reason"),
        none_f.alias("limit"),
    )


def _listed(rows: pl.DataFrame, name: str, schema: pa.Schema) -> pl.DataFrame:
    fields = [f.name for f in schema.field(name).type.value_type]
    return rows.group_by("query_id", maintain_order=True).agg(pl.struct(fields).alias(name))


def _to_arrow(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    table = rows.select(schema.names).to_arrow()
    return pa.table([table[f.name].cast(f.type) for f in schema], schema=schema)


def _say_none(labels: pl.DataFrame) -> str:
    if not labels.height:
        return "there are no judgments to make groups of"
    have = "; ".join(label_sets(labels)["name"].to_list()[:6])
    return f"no label is of the chosen annotator, signal, target model and split (there are: {have})"
