"""`tamis judgments agree`: how far labels agree with others', by annotator and cut-off, and what rankings make of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from models.metrics.bootstrap import DRAWS, Interval, mean_interval
from pipelines.evaluation.folder import EvalFolder
from schemas.errors import InputError
from schemas.judgments import READABLE, SET_KEY
from transforms.retrieval import agreement, formats, rankings
from transforms.retrieval.collection import frame
from transforms.retrieval.formats.base import ImportOptions
from transforms.retrieval.unify import LabelFilter, PositiveRule, label_sets, set_name, unify

if TYPE_CHECKING:
    import polars as pl


class AgreeConfig(BaseModel):
    """Settings of `tamis judgments agree`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: str = Field(description="Labels that are looked at: each annotator and signal by itself.")
    b: str = Field(description="Labels they are compared with.")
    output: str = Field(description="Folder for the results.")
    runs: dict[str, str] = Field(default_factory=dict, description="Rankings (TREC runs) by name.")
    positive_from: int = Field(1, description="Least grade of a positive of A.")
    positive_from_b: int | None = Field(None, description="Least grade of a positive of B; default as A's.")
    positive_value: float = 0.0
    positive_rank: int | None = None
    unify_b: str = Field("apart", description="How labels of several annotators of B merge.")
    annotators: tuple[str, ...] = Field((), description="Only these annotators of A.")
    signals: tuple[str, ...] = Field((), description="Only these signals of A.")
    splits: tuple[str, ...] = Field((), description="Only these splits of B.")
    unjudged: str = Field("auto", description="Pairs only A judged: skip, negative, or auto.")
    measure: str = "nDCG@10"
    seed: int = 0
    draws: int = Field(DRAWS, ge=100)
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class SetAgreement:
    """One annotator's labels against B.

    Attributes:
        name: Of the label set.
        asked: Pairs it was asked about.
        unreadable: Of these, replies that could not be read.
        queries: Queries compared.
        pairs: Pairs compared.
        filled: Of these, pairs B did not judge (taken as negative).
        covered: Share of B's positives, in queries A saw, that A was asked about at all.
        figures: precision, recall, f1, accuracy, kappa, weighted_kappa, alpha, auc, tau.
        positives: Positives a query, of A and of B, among the pairs compared.
        cuts: Cut-offs of A's grades.
        confusion: Rows (A), columns (B), counts.
        runs: Rankings under both labels.
        order: Whether the order of the rankings holds.
        by_set: Sets of positives query by query (`agreement.set_figures`).
    """

    name: str
    asked: int
    unreadable: int
    queries: int
    pairs: int
    filled: int
    covered: float
    figures: dict[str, Interval | None]
    positives: tuple[Interval, Interval]
    cuts: list[tuple[int, dict[str, Interval | None], Interval]]
    confusion: tuple[list[str], list[str], list[list[int]]]
    runs: dict[str, rankings.RunFigures] = field(default_factory=dict)
    order: Interval | None = None
    by_set: dict[str, Interval | None] = field(default_factory=dict)

    @property
    def unreadable_share(self) -> float:
        """Share of replies that could not be read."""
        return self.unreadable / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class AgreeResult:
    """What came of it."""

    output: str
    sets: list[SetAgreement]
    against: str
    notes: list[str]
    record: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def best(self) -> SetAgreement:
        """The set with the highest kappa, of equals the higher F1."""

        def rank(x: SetAgreement) -> tuple[float, float]:
            kappa, f1 = x.figures["kappa"], x.figures["f1"]
            return (kappa.mean if kappa else -2.0, f1.mean if f1 else -2.0)

        return max(self.sets, key=rank)


def run(config: AgreeConfig) -> AgreeResult:
    """Run it.

    Raises:
        InputError: Nothing to compare, or labels of B that nobody said how to merge.
        OutputError: The folder holds something else.
    """
    if config.unjudged not in agreement.UNJUDGED:
        raise InputError(f"--unjudged '{config.unjudged}' is not one of {', '.join(agreement.UNJUDGED)}")
    out = EvalFolder(config.output, "agreement", options=config.storage_options)
    how = agreement.How(config.seed, config.draws)
    a, b, notes = _read(config)
    rule_a = PositiveRule(config.positive_from, config.positive_value, config.positive_rank)
    least_b = config.positive_from if config.positive_from_b is None else config.positive_from_b
    gold = unify(
        b,
        config.unify_b,
        PositiveRule(least_b, config.positive_value, config.positive_rank),
        where=f"the labels of {config.b}",
    )
    runs = {name: _read_run(url, config.storage_options) for name, url in config.runs.items()}
    names = label_sets(a)["name"].to_list()
    sets, tables = [], []
    for name in names:
        own = a.filter(set_name() == name)
        one = unify(own, "majority", rule_a, across_targets=True, contributors=False)
        pairs, filled = agreement.paired(one, gold, config.unjudged)
        if not pairs.height:
            notes.append(f"{name}: no pair was judged by both sides")
            continue
        if filled and pairs.filter(~_held()).height:
            notes.append(
                f"{name}: pairs {_short(config.b)} does not list count as not relevant there, as it lists positives almost "
                "alone; its holes therefore lower precision (--unjudged skip leaves them out)"
            )
        sets.append(_compare(name, own, one, gold, pairs, runs, config, how))
        tables.append(pairs.with_columns(_constant(name)))
    if not sets:
        raise InputError(
            f"{config.a} and {config.b} share no judged pair; are query and document ids the same in both?"
        )
    result = AgreeResult(config.output, sets, _short(config.b), list(dict.fromkeys(notes)))
    _write(out, config, result, tables)
    return result


def _read(config: AgreeConfig) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    left, _ = formats.read(config.a, ImportOptions(corpus_source="all"), storage=config.storage_options)
    # Where a collection has copies of its documents, people judged base ids: ids of no copy, as `human` keeps them.
    copy = "human" if _several_copies(config) else None
    options = ImportOptions(splits=config.splits, corpus_source=copy)
    right, _ = formats.read(config.b, options, storage=config.storage_options)
    a = LabelFilter(annotators=config.annotators, signals=config.signals).apply(frame(left.judgments))
    b = LabelFilter(splits=config.splits).apply(frame(right.judgments))
    for url, labels in ((config.a, a), (config.b, b)):
        if not labels.height:
            raise InputError(f"{url} holds no labels (of the chosen annotators, signals and splits)")
    return a, b, [*left.notes, *right.notes]


def _compare(
    name: str,
    own: pl.DataFrame,
    one: pl.DataFrame,
    gold: pl.DataFrame,
    pairs: pl.DataFrame,
    runs: dict[str, pl.DataFrame],
    config: AgreeConfig,
    how: agreement.How,
) -> SetAgreement:
    import polars as pl

    counts = agreement.by_query(pairs)
    figures = {
        **agreement.binary_figures(counts, how),
        **agreement.graded_figures(pairs, how),
        **agreement.order_figures(pairs, how),
    }
    per_a = (counts["tp"] + counts["fp"]).cast(pl.Float64).to_list()
    per_b = (counts["tp"] + counts["fn"]).cast(pl.Float64).to_list()
    wanted = gold.filter(pl.col("positive").fill_null(False)).join(
        own.select("query_id").unique(), on="query_id", how="semi"
    )
    asked = wanted.join(own.select("query_id", "doc_id").unique(), on=["query_id", "doc_id"], how="semi")
    scored: dict[str, rankings.RunFigures] = {}
    if runs:
        labels_a, labels_b = _gains(one), _gains(gold)
        queries = _queries_that_count(labels_a, labels_b)
        if not queries:
            raise InputError("no query has a positive of both sides, so no run can be scored with both")
        scored = rankings.score_runs(runs, labels_a, labels_b, queries, config.measure, how)
    return SetAgreement(
        name,
        own.height,
        own.filter(~pl.col("parse_status").is_in(list(READABLE))).height,
        counts.height,
        pairs.height,
        pairs.filter(~_held()).height,
        asked.height / wanted.height if wanted.height else 1.0,
        figures,
        (
            mean_interval(per_a, seed=how.seed, draws=how.draws, level=how.level),
            mean_interval(per_b, seed=how.seed, draws=how.draws, level=how.level),
        ),
        agreement.cut_offs(pairs, how),
        agreement.confusion(pairs),
        scored,
        rankings.order_kept(scored, how),
        agreement.set_figures(counts, how),
    )


def _gains(one: pl.DataFrame) -> pl.DataFrame:
    """Labels as gains: the grade, else 1 and 0."""
    import polars as pl

    gain = pl.coalesce(pl.col("grade"), pl.col("positive").cast(pl.Int32)).alias("grade")
    return one.select("query_id", "doc_id", gain).drop_nulls("grade")


def _queries_that_count(a: pl.DataFrame, b: pl.DataFrame) -> list[str]:
    import polars as pl

    found = [set(x.filter(pl.col("grade") > 0)["query_id"]) for x in (a, b)]
    return [q for q in b["query_id"].unique(maintain_order=True) if q in found[0] & found[1]]


def _read_run(url: str, options: dict[str, Any]) -> pl.DataFrame:
    data, _ = formats.read(url, storage=options)
    if not data.pool.num_rows:
        raise InputError(f"--run {url} holds no ranking")
    pool = frame(data.pool)
    import polars as pl

    return pool.with_columns(pl.coalesce(pl.col("score"), -pl.col("rank").cast(pl.Float64)).alias("score"))


def _several_copies(config: AgreeConfig) -> bool:
    """Whether B is a folder with copies of its documents: base ids are what people judged."""
    from transforms.retrieval.formats.base import Source

    return any(n.startswith("corpus/") for n in Source.open(config.b, config.storage_options).files())


def _held() -> pl.Expr:
    import polars as pl

    return pl.col("held")


def _constant(name: str) -> pl.Expr:
    import polars as pl

    return pl.lit(name).alias("label_set")


def _short(url: str) -> str:
    return PurePosixPath(url.rstrip("/")).name or url


def _write(out: EvalFolder, config: AgreeConfig, result: AgreeResult, tables: list[pl.DataFrame]) -> None:
    import polars as pl

    pairs = pl.concat(tables).to_arrow()
    out.write_table("pairs.parquet", {n: pairs[n].combine_chunks() for n in pairs.column_names})
    record = {
        "config": config.model_dump(exclude={"storage_options"}),
        "models": {},
        "against": result.against,
        "best": result.best.name,
        "sets": [_set_record(s) for s in result.sets],
        "notes": result.notes,
        "set_key": list(SET_KEY),
    }
    from pipelines.evaluation.agreement_page import render

    out.write_text("report.html", render(result, record, config.measure))
    result.record.update(out.finish(record))


def _set_record(s: SetAgreement) -> dict[str, Any]:
    rows, columns, counts = s.confusion
    return {
        "name": s.name,
        "asked": s.asked,
        "unreadable": s.unreadable,
        "queries": s.queries,
        "pairs": s.pairs,
        "not_judged_by_b": s.filled,
        "positives_of_b_asked_about": s.covered,
        "figures": agreement.as_json(s.figures),
        "sets": agreement.as_json(s.by_set),
        "positives_per_query": {"a": s.positives[0].as_dict(), "b": s.positives[1].as_dict()},
        "cut_offs": [
            {"grade": g, **agreement.as_json(f), "positives_per_query": p.as_dict()} for g, f, p in s.cuts
        ],
        "confusion": {"a": rows, "b": columns, "counts": counts},
        "runs": {
            name: {
                "a": x.a.as_dict(),
                "b": x.b.as_dict(),
                "change": x.change.as_dict(),
                "judged_a": x.judged_a,
                "judged_b": x.judged_b,
            }
            for name, x in s.runs.items()
        },
        "order_of_runs": None if s.order is None else s.order.as_dict(),
    }


def print_result(result: AgreeResult, measure: str = "nDCG@10") -> None:
    """Say what came of it."""
    from rich.table import Table

    from pipelines.evaluation.progress import wide_console

    console = wide_console()
    table = Table(title=f"against {result.against}", title_justify="left", box=None)
    table.add_column("labels of", min_width=14, overflow="fold")
    for heading in ("pairs", "precision", "recall", "kappa [95 %]", "AUC", "positives", "unreadable"):
        table.add_column(heading, justify="right", overflow="fold")
    for s in result.sets:
        kappa = s.figures["kappa"]
        table.add_row(
            s.name,
            f"{s.pairs:,}",
            *(_number(s.figures[n]) for n in ("precision", "recall")),
            "–" if kappa is None else f"{kappa.mean:.3f} [{kappa.low:.2f}, {kappa.high:.2f}]",
            _number(s.figures["auc"]),
            f"{s.positives[0].mean:.2f}/{s.positives[1].mean:.2f}",
            f"{100 * s.unreadable_share:.1f}%",
        )
    console.print(table)
    for s in result.sets:
        for name, x in s.runs.items():
            console.print(
                f"{measure} of {name}: {x.a.mean:.4f} by {s.name}, {x.b.mean:.4f} by {result.against} "
                f"(p {x.change.p_value:.3f})",
                soft_wrap=True,
            )
        if s.order is not None:
            console.print(f"order of {len(s.runs)} runs: tau {s.order}", soft_wrap=True)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    console.print(f"report: {result.output}/report.html", soft_wrap=True)


def _number(x: Interval | None) -> str:
    return "–" if x is None else f"{x.mean:.3f}"
