"""`tamis pool`: which documents to have judged for each query, found by several retrievers, with who found what where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.progress import counting, wide_console
from pipelines.retrieval.asking import Answers
from pipelines.retrieval.corpus import Corpus, CorpusSource, Workshop, documents_in, passing
from pipelines.retrieval.dense import DenseRetriever, EncoderUse, Running
from pipelines.retrieval.folder import TableFolder
from pipelines.retrieval.pool_config import BM25, COSMETIC, PoolConfig, check
from pipelines.retrieval.pool_examples import Example, look_at
from pipelines.retrieval.pool_figures import Recalls
from pipelines.retrieval.retrievers import BM25Retriever, Retriever, RunRetriever, short_name, strangers
from pipelines.run import locked, terminable
from schemas.errors import InputError, TamisError
from schemas.fingerprint import derive_seed
from schemas.judgments import DOCUMENT_SCHEMA, QUERY_SCHEMA
from schemas.pools import POOL_SCHEMA, check_pool
from transforms.retrieval.candidates import HUMAN, RANDOM, assemble, in_order, to_arrow
from transforms.retrieval.collection import frame
from transforms.retrieval.lexical import Analyzer, BM25Settings
from transforms.retrieval.unify import LabelFilter, PositiveRule, unify

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

SAMPLE = "sample"
CORPUS_ROWS = 100_000


@dataclass(frozen=True)
class PoolResult:
    """What came of it.

    Attributes:
        output: The folder.
        state: `finished`, `already finished` or `planned`.
        manifest: Its manifest; of a dry run, what is known before any work.
    """

    output: str
    state: str
    manifest: dict[str, Any]


@dataclass
class Task:
    """What is to be pooled.

    Attributes:
        queries: Ids and texts, in order.
        table: Of `QUERY_SCHEMA`, the same queries.
        dropped: Queries without text: query_id, reason.
        positives: query_id, doc_id people judged good, of these queries.
        source: The documents.
        notes: What the reader should know.
    """

    queries: list[tuple[str, str]]
    table: pa.Table
    dropped: list[dict[str, str]]
    positives: pl.DataFrame
    source: CorpusSource
    notes: list[str] = field(default_factory=list)


def run(config: PoolConfig, *, dry_run: bool = False) -> PoolResult:
    """Run it, from the beginning or from where an earlier run stopped.

    Args:
        config: The settings.
        dry_run: Check and count, and write nothing.

    Raises:
        InputError: No queries, no documents, a ranking of other documents.
        ModelError: A library or a model cannot be had.
        OutputError: The folder holds something else.
        TamisError: Settings that contradict one another.
    """
    check(config)
    settings, task = _read(config)
    workshop = Workshop(_work(config))
    retrievers = make_retrievers(config, workshop, task.source)
    settings["retrievers"] = {r.name: {"kind": r.kind, **r.settings} for r in retrievers}
    out = TableFolder(
        config.output, "pool", settings, overwrite=config.overwrite, options=config.storage_options
    )
    if not dry_run and (manifest := out.finished) is not None:
        return PoolResult(config.output, "already finished", manifest)
    if dry_run:
        return PoolResult(config.output, "planned", _plan(config, task, retrievers))
    with locked(out.folder), terminable():
        out.start()
        return PoolResult(config.output, "finished", _pool(config, out, task, workshop, retrievers))


def _work(config: PoolConfig) -> Any:
    from transforms.shards.files import Folder

    return Folder(f"{config.output.rstrip('/')}/_tamis/work", **config.storage_options)


def make_retrievers(config: PoolConfig, workshop: Workshop, source: CorpusSource) -> list[Retriever]:
    """The retrievers of a configuration; none is opened.

    Raises:
        InputError: A ranking cannot be read.
        ModelError: An encoder or a library cannot be had.
    """
    found: list[Retriever] = []
    if config.bm25:
        settings = BM25Settings(config.k1, config.b, Analyzer(config.stopwords, config.stemmer))
        found.append(BM25Retriever(BM25, config.depth_of(BM25), settings, workshop, source))
    use = EncoderUse.of(config.dense_options)
    running = Running(config.device, config.threads, config.workers, config.exact, config.progress)
    for name, reference in config.dense.items():
        found.append(
            DenseRetriever(
                name, config.depth_of(name), reference, use, running, workshop, source, config.storage_options
            )
        )
    for name, url in config.runs.items():
        found.append(RunRetriever(name, config.depth_of(name), url, config.storage_options))
    return found


def _read(config: PoolConfig) -> tuple[dict[str, Any], Task]:
    """Settings with the fingerprints of what is read; queries and positives whole, documents as a stream."""
    import polars as pl

    from pipelines.retrieval.inputs import open_collection

    opened = open_collection(
        config.collection,
        corpus=config.corpus,
        queries=config.queries,
        splits=config.splits,
        corpus_source=config.corpus_source,
        text=config.text,
        options=config.storage_options,
    )
    data = opened.data
    settings = config.model_dump(exclude=COSMETIC)
    settings["source"] = config.collection or config.corpus
    settings["input"] = opened.fingerprints
    labels = LabelFilter(label_source="human", splits=config.splits).apply(frame(data.judgments))
    table = frame(data.queries).unique("query_id", keep="first", maintain_order=True)
    if config.splits:
        table = table.join(
            labels.select("query_id").unique(), on="query_id", how="semi", maintain_order="left"
        )
    if config.sample_queries is not None:
        table = _sample(table, config.sample_queries, config.seed)
    blank = pl.col("text").fill_null("").str.strip_chars() == ""
    task = Task(
        list(table.filter(~blank).select("query_id", "text").iter_rows()),
        table.filter(~blank).to_arrow().cast(QUERY_SCHEMA),
        [{"query_id": q, "reason": "no_text"} for q in table.filter(blank)["query_id"].to_list()],
        _positives(labels, table, config.positive_from),
        opened.source,
        list(data.notes),
    )
    if not task.queries:
        n = len(task.dropped)
        raise InputError(
            f"none of {n:,} queries has text: pass --queries" if n else "there are no queries: pass --queries"
        )
    if config.human and not task.positives.height:
        raise InputError(
            "--human: people judged no document good for these queries (of these splits, at this grade)"
        )
    return settings, task


def _sample(table: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """The queries whose seeds are least: the same ones whatever else is there and in which order."""
    draws = {q: derive_seed(seed, q, SAMPLE) for q in table["query_id"].to_list()}
    chosen = set(sorted(draws, key=lambda q: (draws[q], q))[:count])
    import polars as pl

    return table.filter(pl.col("query_id").is_in(list(chosen)))


def _positives(labels: pl.DataFrame, queries: pl.DataFrame, positive_from: int) -> pl.DataFrame:
    import polars as pl

    of_these = labels.join(queries.select("query_id"), on="query_id", how="semi", maintain_order="left")
    rule = PositiveRule(positive_from)
    one = unify(of_these, "max", rule, across_targets=True, contributors=False)
    good = one.filter(pl.col("positive").fill_null(False))
    return good.select("query_id", "doc_id").unique(maintain_order=True)


def _plan(config: PoolConfig, task: Task, retrievers: Sequence[Retriever]) -> dict[str, Any]:
    """What is known before any work."""
    most = sum(r.depth for r in retrievers) if config.budget is None else config.budget
    return {
        "totals": {
            "queries": len(task.queries),
            "queries_without_text": len(task.dropped),
            "candidates_at_most": len(task.queries) * (most + config.random)
            + task.positives.height * config.human,
            "human_positives": task.positives.height,
        },
        "sources": [{"name": r.name, "kind": r.kind, "depth": r.depth, **r.settings} for r in retrievers],
        "notes": task.notes,
    }


def _pool(
    config: PoolConfig, out: TableFolder, task: Task, workshop: Workshop, retrievers: Sequence[Retriever]
) -> dict[str, Any]:
    corpus = _prepare(config, task, workshop, retrievers)
    positives = _in_corpus(task, corpus, drop_self=not config.keep_self)
    watched: dict[str, list[str]] = {}
    if config.human:
        watched = dict(positives.group_by("query_id", maintain_order=True).agg("doc_id").iter_rows())
    answers = Answers(
        workshop.folder.child("hits"), corpus, task.queries, watched, drop_self=not config.keep_self
    )
    files = {r.name: answers.collect(r, config.progress) for r in retrievers}
    depths = {r.name: r.depth for r in retrievers}
    recalls = Recalls(depths, task.positives, config.fusion)
    random_ids = corpus.sorted_ids() if config.random else []
    examples: list[Example] = []
    pooled: set[str] = set()
    sources: dict[str, dict[str, int]] = {}
    sizes: list[int] = []
    without = 0
    size = config.queries_per_shard
    with counting("queries", len(task.queries), config.progress) as tell:
        for number, start in enumerate(range(0, len(task.queries), size)):
            ids = [q for q, _ in task.queries[start : start + size]]
            parts = {
                r.name: answers.read(answers.files_of(files[r.name], r, start, start + len(ids)), ids)
                for r in retrievers
            }
            pool = _block(config, parts, depths, ids, positives, random_ids)
            table = to_arrow(pool)
            check_pool(table)
            out.write("data", f"part-{number:05d}.parquet", table, POOL_SCHEMA)
            recalls.look(parts, pool, ids)
            if not number:
                examples = look_at(pool, dict(task.queries), depths, positives)
            pooled.update(pool["doc_id"].unique().to_list())
            counts = dict(pool.select("query_id", "doc_id").unique().group_by("query_id").len().iter_rows())
            sizes += [counts.get(q, 0) for q in ids]
            without += sum(q not in counts for q in ids)
            for name, rows, queries in (
                pool.group_by("source").agg(n="query_id", q="query_id").select("source", "n", "q").iter_rows()
            ):
                held = sources.setdefault(name, {"candidates": 0, "queries": 0})
                held["candidates"] += len(rows)
                held["queries"] += len(set(queries))
            tell(len(ids))
    _write_sides(config, out, task, pooled, recalls, examples)
    notes = [*task.notes, *_notes(task, corpus, retrievers, without, positives)]
    facts: dict[str, Any] = {
        "sources": [
            {
                "name": r.name,
                "kind": r.kind,
                "depth": r.depth,
                **sources.get(r.name, {"candidates": 0, "queries": 0}),
                **r.settings,
                **r.facts,
            }
            for r in retrievers
        ]
        + [{"name": n, "kind": n, **sources[n]} for n in (HUMAN, RANDOM) if n in sources],
        "corpus": {"path": config.corpus or config.collection, "copy": config.corpus_source, **corpus.counts},
        "recall": recalls.record(config.seed),
        "overlap": recalls.overlaps(),
        "notes": notes,
    }
    totals = {
        "queries": len(task.queries),
        "candidates": sum(sizes),
        "rows": sum(s["candidates"] for s in sources.values()),
        "documents": len(pooled),
        "queries_without_candidate": without,
        "queries_without_text": len(task.dropped),
    }
    from pipelines.retrieval.pool_page import card, render

    record = {"config": out.config, "totals": totals, **facts}
    out.write_text("report.html", render(record, recalls, sizes, examples))
    out.write_text("README.md", card(record))
    return out.finish(totals, **facts)


def _prepare(config: PoolConfig, task: Task, workshop: Workshop, retrievers: Sequence[Retriever]) -> Corpus:
    bm25 = [r.bm25 for r in retrievers if isinstance(r, BM25Retriever)]
    texts = any(r.by_name for r in retrievers if isinstance(r, DenseRetriever))
    with passing("documents", config.progress) as tell:
        return workshop.prepare(task.source, bm25=bm25, texts=texts, tell=tell)


def _in_corpus(task: Task, corpus: Corpus, *, drop_self: bool) -> pl.DataFrame:
    """Positives that are documents of the corpus."""
    import polars as pl

    known = corpus.numbers(task.positives["doc_id"].to_list()) >= 0
    found = task.positives.filter(pl.Series(known, dtype=pl.Boolean))
    return found.filter(pl.col("query_id") != pl.col("doc_id")) if drop_self else found


def _block(
    config: PoolConfig,
    parts: Mapping[str, pl.DataFrame],
    depths: Mapping[str, int],
    ids: Sequence[str],
    positives: pl.DataFrame,
    random_ids: Sequence[str],
) -> pl.DataFrame:
    import polars as pl

    from transforms.retrieval.groups import random_candidates

    human = None
    if config.human:
        human = positives.join(pl.DataFrame({"query_id": list(ids)}), on="query_id", how="semi")
    pool = assemble(parts, depths, ids, human=human, budget=config.budget, fusion=config.fusion)
    if random_ids:
        barred = pool.select("query_id", "doc_id").unique()
        if not config.keep_self:
            own = pl.DataFrame({"query_id": list(ids), "doc_id": list(ids)})
            barred = pl.concat([barred, own]).unique()
        drawn = random_candidates(ids, random_ids, barred, config.random, config.seed)
        pool = in_order(pl.concat([pool, drawn.select(pool.columns)]), ids, list(parts))
    return pool


def _write_sides(
    config: PoolConfig,
    out: TableFolder,
    task: Task,
    pooled: set[str],
    recalls: Recalls,
    examples: Sequence[Example],
) -> None:
    import pyarrow as pa

    out.write("queries", "queries.parquet", task.table, QUERY_SCHEMA)
    if task.dropped:
        schema = pa.schema([pa.field("query_id", pa.string()), pa.field("reason", pa.string())])
        out.write("dropped", "queries.parquet", pa.Table.from_pylist(task.dropped, schema), schema)
    if (table := recalls.table()) is not None:
        out.write("recall", "recall.parquet", table, table.schema)
    if config.documents == "none":
        return
    stream = task.source.documents()
    if config.documents == "pooled":
        stream = documents_in(sorted(pooled), task.source.documents)
    part, waiting = 0, next(stream, None)
    while waiting is not None:

        def some() -> Any:
            nonlocal waiting
            rows = 0
            while waiting is not None and rows < CORPUS_ROWS:
                rows += waiting.num_rows
                for example in examples:
                    example.read(waiting)
                yield waiting
                waiting = next(stream, None)

        out.write("corpus", f"part-{part:05d}.parquet", some(), DOCUMENT_SCHEMA)
        part += 1


def _notes(
    task: Task, corpus: Corpus, retrievers: Sequence[Retriever], without: int, positives: pl.DataFrame
) -> list[str]:
    notes = []
    counts = corpus.counts
    for name, said in (
        ("empty", "documents have no text; no retriever finds them"),
        ("repeated_ids", "documents repeat an id; the first of each is taken"),
        ("repeated_texts", "documents have the text of another; each is a candidate of its own"),
    ):
        if counts[name]:
            notes.append(f"{counts[name]:,} {said}")
    if task.dropped:
        notes.append(f"{len(task.dropped):,} queries have no text and no pool (dropped/)")
    if without:
        notes.append(f"{without:,} queries have no candidate")
    missing = task.positives.height - positives.height
    if missing:
        notes.append(
            f"{missing:,} documents people judged good are not in the corpus; they count as not found"
        )
    for r in retrievers:
        notes += strangers(r)
    return notes


def print_result(result: PoolResult) -> None:
    """Say what came of it."""
    from rich.table import Table

    console = wide_console()
    m = result.manifest
    totals = m["totals"]
    if result.state == "planned":
        console.print(
            f"planned: {totals['queries']:,} queries, at most {totals['candidates_at_most']:,} candidates, "
            f"{totals['human_positives']:,} human positives"
        )
        for s in m["sources"]:
            console.print(f"  {s['name']} ({s['kind']}), {s['depth']:,} a query", soft_wrap=True)
        return
    mean = totals["candidates"] / max(1, totals["queries"])
    table = Table(
        box=None,
        title=f"{result.state}: {totals['candidates']:,} candidates for {totals['queries']:,} queries, {mean:.1f} a query",
        title_justify="left",
    )
    at = m["recall"]["at"] if m["recall"] else None
    for heading in ("source", "depth", "candidates", *([f"recall@{at} [95 %]"] if at else [])):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    figures = m["recall"]["systems"] if m["recall"] else {}
    for s in m["sources"]:
        cell = _interval(figures.get(s["name"], {}).get(str(at)))
        table.add_row(s["name"], str(s.get("depth", "")), f"{s['candidates']:,}", *([cell] if at else []))
    for name in ("fused", "union"):
        if name in figures:
            table.add_row(
                f"all, {name}", "", "", _interval(figures[name][str(at) if name == "fused" else "all"])
            )
    console.print(table)
    for note in m["notes"]:
        console.print(note, soft_wrap=True)
    console.print(f"pool: {result.output}/data   report: {result.output}/report.html", soft_wrap=True)


def _interval(x: Mapping[str, float] | None) -> str:
    return "" if x is None else f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"


def parse_named(items: Sequence[str], what: str) -> dict[str, str]:
    """`NAME=THING` or `THING` options by name.

    Raises:
        TamisError: Two have one name.
    """
    from pathlib import Path

    found: dict[str, str] = {}
    for item in items:
        name, sign, thing = item.partition("=")
        if not sign or "/" in name or Path(item).exists():
            name, thing = short_name(item), item
        if name in found:
            raise TamisError(f"two of {what} are called '{name}'; name them: {what} NAME={thing}")
        found[name] = thing
    return found
