"""`tamis groups`: judgments and candidates to training groups, in shards by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from models.training.groups import DrawPolicy
from pipelines.evaluation.progress import counting, wide_console
from pipelines.retrieval.folder import TableFolder, input_fingerprints
from pipelines.retrieval.groups_page import Seen, render
from pipelines.retrieval.inputs import read_all
from schemas.errors import InputError
from schemas.groups import DROPPED_SCHEMA, GROUP_SCHEMA, MASK_SCHEMA, REJECTED_SCHEMA
from transforms.retrieval.collection import RetrievalData, document_ids, frame, pick_documents
from transforms.retrieval.groups import (
    LABEL_COLUMNS,
    RANDOM,
    GroupShard,
    Stage,
    StageRows,
    check_merges,
    false_negative_mask,
    find_copies,
    group_shard,
    make_stages,
    mask_table,
    random_candidates,
    stage_rows,
)
from transforms.retrieval.mining import MiningRules
from transforms.retrieval.unify import LabelFilter, PositiveRule

if TYPE_CHECKING:
    import polars as pl


class GroupsConfig(BaseModel):
    """Settings of `tamis groups`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judgments: tuple[str, ...] = Field(description="Collections with labels, of any format.")
    output: str = Field(description="Folder to write.")
    corpus: str | None = Field(None, description="Documents; default those of the collections.")
    queries: str | None = Field(None, description="Queries; default those of the collections.")
    pools: tuple[str, ...] = Field((), description="Candidates: pools or TREC runs.")
    with_text: bool = Field(True, description="Put the texts into the groups.")
    # labels
    regime: str = Field(
        "auto", description="single, curriculum, union; auto: curriculum where both kinds of labels are."
    )
    positive_from: dict[str, int] = Field(
        default_factory=dict, description='Least grade of a positive, by label source; "" for all.'
    )
    positive_value: float = Field(
        0.0, description="A value above this is positive, where a label is a value."
    )
    positive_rank: int | None = Field(
        None, description="A rank up to this is positive, where a label is a rank."
    )
    unify: str = Field("apart", description="apart, max, majority, prefer_human.")
    across_targets: bool = Field(False, description="Also merge labels of different target models.")
    label_source: str | None = None
    annotators: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    target_models: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    corpus_source: str | None = Field(
        None, description="Which copy of the documents, where there are several."
    )
    # negatives
    sources: tuple[str, ...] = Field(
        (), description="Sources of negatives; default all. `judged`: judged ones."
    )
    first_rank: int = 1
    last_rank: int | None = None
    min_score: float | None = None
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    margin_against: str = "weakest"
    without_score: str = "keep"
    max_negatives: int | None = None
    min_negatives: int = Field(1, ge=0)
    random_negatives: int = Field(0, ge=0, description="Documents drawn at random for each query.")
    mask_copies: bool = Field(True, description="Mask documents of equal text, and rewrites, of a positive.")
    # draw: what the manifest recommends to the trainer
    positives: str = "all"
    max_positives: int = 4
    group_size: int = 8
    seed: int = 0
    queries_per_shard: int = Field(20_000, ge=1)
    overwrite: bool = False
    progress: str = Field("auto", description="auto, plain, quiet.")
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class GroupsResult:
    """What came of it.

    Attributes:
        output: The folder.
        state: `finished`, `already finished` or `planned`.
        manifest: Its manifest; of a dry run, the totals only.
    """

    output: str
    state: str
    manifest: dict[str, Any]


def run(config: GroupsConfig, *, dry_run: bool = False) -> GroupsResult:
    """Run it.

    Args:
        config: The settings.
        dry_run: Count what would come out, and write nothing.

    Raises:
        InputError: No labels, labels nobody said how to merge, texts missing altogether.
        OutputError: The folder holds something else.
        TamisError: Settings that contradict one another.
    """
    policy = DrawPolicy(config.positives, config.max_positives, config.group_size)
    rules = _mining(config)
    settings = config.model_dump(exclude={"output", "overwrite", "progress", "storage_options"})
    settings["input"] = {
        url: input_fingerprints(url, config.storage_options)
        for url in (*config.judgments, *config.pools, config.corpus, config.queries)
        if url is not None
    }
    out = TableFolder(
        config.output, "groups", settings, overwrite=config.overwrite, options=config.storage_options
    )
    if not dry_run and (manifest := out.finished) is not None:
        return GroupsResult(config.output, "already finished", manifest)
    data = read_all(
        config.judgments,
        pools=config.pools,
        corpus=config.corpus,
        queries=config.queries,
        splits=config.splits,
        corpus_source=config.corpus_source,
        options=config.storage_options,
    )
    labels, pool = frame(data.judgments.select(LABEL_COLUMNS)), frame(data.pool)
    chosen = LabelFilter(
        config.label_source, config.annotators, config.signals, config.target_models, config.splits
    )
    by_source = _positive_rules(config)
    stages, warnings = make_stages(labels, config.regime, chosen, by_source, config.unify)
    check_merges(stages, labels, across_targets=config.across_targets)
    queries = data.queries_with_labels_first()
    if config.splits:  # queries of other splits are no queries without labels
        inside = set(chosen.apply(labels)["query_id"])
        queries = [q for q in queries if q in inside]
    texts = dict(zip(data.queries["query_id"].to_pylist(), data.queries["text"].to_pylist(), strict=True))
    if config.with_text:
        _check_texts(config, data, texts)
    work = Work(stages, labels, pool, _copies(config, data, labels), _random_ids(config, data), rules)
    seen = Seen()
    with counting("queries", len(queries), config.progress) as tell:
        figures = _write(config, None if dry_run else out, work, queries, texts, data, seen, tell)
    notes = [*data.notes, *warnings, *_empty_stages(figures)]
    facts = {
        "stages": figures["stages"],
        "dropped": figures["dropped"],
        "rejected": figures["rejected"],
        "notes": notes,
        "draw": {
            "positives": policy.positives,
            "max_positives": policy.max_positives,
            "group_size": policy.group_size,
            "seed": config.seed,
        },
    }
    totals = figures["totals"]
    if dry_run:
        return GroupsResult(config.output, "planned", {"totals": totals, **facts})
    out.write_text("report.html", render({"config": settings, "totals": totals, **facts}, seen))
    return GroupsResult(config.output, "finished", out.finish(totals, **facts))


def _mining(config: GroupsConfig) -> MiningRules:
    return MiningRules(
        config.sources,
        config.first_rank,
        config.last_rank,
        config.min_score,
        config.max_score,
        config.absolute_margin,
        config.relative_margin,
        config.margin_against,
        config.without_score,
        config.max_negatives,
    )


def _positive_rules(config: GroupsConfig) -> dict[str, PositiveRule]:
    base = config.positive_from.get("", 1)
    rules = {"": PositiveRule(base, config.positive_value, config.positive_rank)}
    for source, grade in config.positive_from.items():
        if source not in ("", "human", "llm"):
            raise InputError(f"--positive-from {source}={grade}: the stages are llm and human")
        rules[source] = PositiveRule(grade, config.positive_value, config.positive_rank)
    return rules


def _copies(config: GroupsConfig, data: RetrievalData, labels: pl.DataFrame) -> pl.DataFrame | None:
    """Documents that say the same as another, by one pass over the corpus; only hashes are kept of the texts."""
    import polars as pl
    import xxhash

    if data.documents is None or not config.mask_copies:
        return None
    parts = []
    for batch in data.documents():
        hashes = [
            None
            if not (t or "").split()
            else xxhash.xxh3_64_intdigest(" ".join(t.split()).casefold().encode("utf-8", "surrogatepass"))
            for t in batch.column("text").to_pylist()
        ]
        base = batch.column("base_id")
        parts.append(
            pl.DataFrame(
                {
                    "doc_id": pl.Series(batch.column("doc_id").to_pylist(), dtype=pl.String),
                    "text_hash": pl.Series(hashes, dtype=pl.UInt64),
                    "base_id": pl.Series(base.to_pylist(), dtype=pl.String),
                }
            )
        )
    return find_copies(pl.concat(parts), labels["doc_id"]) if parts else None


def _random_ids(config: GroupsConfig, data: RetrievalData) -> list[str]:
    """The documents random negatives are drawn from; none where none are wanted."""
    if not config.random_negatives:
        return []
    if config.sources and RANDOM not in config.sources:
        raise InputError(
            "--random-negatives draws candidates of the source random: add --negatives-from random"
        )
    if data.documents is None:
        raise InputError("--random-negatives draws from the corpus: pass --corpus")
    return document_ids(data.documents)


def _check_texts(config: GroupsConfig, data: RetrievalData, texts: dict[str, str | None]) -> None:
    if data.documents is None:
        raise InputError("there are no documents to take texts from: pass --corpus, or --ids-only")
    if not any(t is not None for t in texts.values()):
        raise InputError("there are no texts of queries: pass --queries, or --ids-only")


@dataclass(frozen=True)
class Work:
    """What groups are made of.

    Attributes:
        stages: In the order they are trained.
        labels: All judgments.
        pool: All candidates.
        copies: Documents that say the same as another.
        random_ids: Documents random negatives are drawn from.
        rules: Which candidates become negatives.
    """

    stages: Sequence[Stage]
    labels: pl.DataFrame
    pool: pl.DataFrame
    copies: pl.DataFrame | None
    random_ids: Sequence[str]
    rules: MiningRules

    def block(self, config: GroupsConfig, queries: Sequence[str]) -> tuple[list[StageRows], pl.DataFrame]:
        """The rows of some queries by stage, and their mask; nothing here looks at any other query."""
        import polars as pl

        ids = pl.DataFrame({"query_id": list(queries)}, schema={"query_id": pl.String})
        labels = self.labels.join(ids, on="query_id", how="semi", maintain_order="left")
        pool = self.pool.join(ids, on="query_id", how="semi", maintain_order="left")
        mask = false_negative_mask(labels, [s.rule for s in self.stages], self.copies)
        if self.random_ids:
            drawn = random_candidates(queries, self.random_ids, mask, config.random_negatives, config.seed)
            pool = pl.concat([pool, drawn.select(pool.columns)])
        rows = [
            stage_rows(s, i, labels, pool, mask, self.rules, across_targets=config.across_targets)
            for i, s in enumerate(self.stages)
        ]
        return rows, mask


def _write(
    config: GroupsConfig,
    out: TableFolder | None,
    work: Work,
    queries: Sequence[str],
    texts: dict[str, str | None],
    data: RetrievalData,
    seen: Seen,
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """Write shard by shard: labels, candidates and documents of its queries are all a shard takes memory for."""
    if out is not None:
        out.start()
    size = config.queries_per_shard
    blocks = [queries[i : i + size] for i in range(0, len(queries), size)]
    stages: list[dict[str, Any]] = [
        {"name": s.name, "groups": 0, "positives": 0, "negatives": 0, "dropped": 0} for s in work.stages
    ]
    dropped: Counter[tuple[str, str]] = Counter()
    rejected: Counter[tuple[str, str]] = Counter()
    masked = 0
    for number, block in enumerate(blocks):
        rows, mask = work.block(config, block)
        documents = None
        if config.with_text:
            assert data.documents is not None
            documents = pick_documents(data.documents, _needed(rows))
        for r, figures in zip(rows, stages, strict=True):
            shard = group_shard(
                r,
                block,
                texts,
                documents,
                min_negatives=config.min_negatives,
                need_text=config.with_text,
            )
            _count(shard, figures, dropped, rejected)
            seen.look(r.stage.name, shard)
            if out is not None:
                name = f"{r.number}-{r.stage.name}/part-{number:05d}.parquet"
                out.write("data", name, shard.groups, GROUP_SCHEMA)
                out.write("dropped", name, shard.dropped, DROPPED_SCHEMA)
                out.write("rejected", name, shard.rejected, REJECTED_SCHEMA)
        table = mask_table(mask, block)
        masked += table.num_rows
        if out is not None:
            out.write("mask", f"part-{number:05d}.parquet", table, MASK_SCHEMA)
        tell(len(block))
    groups = sum(s["groups"] for s in stages)
    if not groups:
        reasons = ", ".join(f"{reason} {n:,}" for (_, reason), n in dropped.most_common())
        raise InputError(f"no query makes a group ({reasons}){_hint(dropped)}")
    return {
        "totals": {"groups": groups, "queries": len(queries), "masked_queries": masked},
        "stages": stages,
        "dropped": [{"stage": s, "reason": x, "queries": n} for (s, x), n in sorted(dropped.items())],
        "rejected": [{"stage": s, "reason": x, "candidates": n} for (s, x), n in sorted(rejected.items())],
    }


def _empty_stages(figures: dict[str, Any]) -> list[str]:
    """A stage nothing is left of would otherwise be missed only when it is trained."""
    notes = []
    for s in figures["stages"]:
        if not s["groups"]:
            why = Counter(
                {
                    (d["stage"], d["reason"]): d["queries"]
                    for d in figures["dropped"]
                    if d["stage"] == s["name"]
                }
            )
            notes.append(f"stage '{s['name']}' has no group{_hint(why)}")
    return notes


def _hint(dropped: Counter[tuple[str, str]]) -> str:
    """What to do about the commonest reason there is something to do about."""
    hints = {
        "no_negative": ": pass --pool with candidates, --random-negatives 8, or --min-negatives 0 to train on in-batch "
        "negatives alone",
        "no_positive": ": lower --positive-from",
    }
    return next((hints[reason] for (_, reason), _ in dropped.most_common() if reason in hints), "")


def _needed(rows: Sequence[StageRows]) -> set[str]:
    needed: set[str] = set()
    for r in rows:
        for part in (r.positives, r.negatives):
            needed.update(part["doc_id"].unique().to_list())
    return needed


def _count(
    shard: GroupShard,
    figures: dict[str, Any],
    dropped: Counter[tuple[str, str]],
    rejected: Counter[tuple[str, str]],
) -> None:
    import pyarrow.compute as pc

    figures["groups"] += shard.groups.num_rows
    figures["dropped"] += shard.dropped.num_rows
    for name in ("positives", "negatives"):
        figures[name] += int(pc.sum(pc.list_value_length(shard.groups[name])).as_py() or 0)
    dropped.update((figures["name"], r) for r in shard.dropped["reason"].to_pylist())
    rejected.update((figures["name"], r) for r in shard.rejected["reason"].to_pylist())


def print_result(result: GroupsResult) -> None:
    """Say what came of it."""
    from rich.table import Table

    console = wide_console()
    m = result.manifest
    table = Table(box=None, title=f"{result.state}: {m['totals']['groups']:,} groups", title_justify="left")
    for heading in ("stage", "groups", "positives a group", "negatives a group", "queries dropped"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for s in m["stages"]:
        n = max(1, s["groups"])
        table.add_row(
            s["name"],
            f"{s['groups']:,}",
            f"{s['positives'] / n:.2f}",
            f"{s['negatives'] / n:.2f}",
            f"{s['dropped']:,}",
        )
    console.print(table)
    for d in m["dropped"]:
        console.print(f"dropped   {d['stage']}: {d['reason']} {d['queries']:,}")
    for r in m["rejected"]:
        console.print(f"rejected  {r['stage']}: {r['reason']} {r['candidates']:,}")
    for note in m["notes"]:
        console.print(note, soft_wrap=True)
    if result.state != "planned":
        console.print(f"groups: {result.output}/data   report: {result.output}/report.html", soft_wrap=True)
