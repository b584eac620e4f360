"""`tamis eval retrieval`: how well systems rank a collection's documents, side by side, by one set of rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.metrics.bootstrap import ends, mean_interval
from pipelines.evaluation.folder import EvalFolder
from pipelines.evaluation.progress import wide_console
from pipelines.evaluation.retrieval_record import (
    RetrievalEvalConfig,
    RetrievalEvalResult,
    SystemResult,
    make_record,
)
from pipelines.retrieval.asking import Answers
from pipelines.retrieval.corpus import CorpusSource, Workshop, passing
from pipelines.retrieval.dense import DenseRetriever, EncoderUse, Running, is_embedded
from pipelines.retrieval.retrievers import BM25Retriever, Retriever, read_run, short_name, strangers
from pipelines.run import locked, terminable
from schemas.errors import InputError, TamisError
from transforms.retrieval.collection import frame
from transforms.retrieval.lexical import Analyzer, BM25Settings
from transforms.retrieval.scoring import Measure, by_query, compare, parse_measures
from transforms.retrieval.unify import LabelFilter, PositiveRule, unify

if TYPE_CHECKING:
    import polars as pl

BM25 = "bm25"
WORK = "_tamis/cache/work"
DENOMINATORS = ("judged", "answered")


@dataclass(frozen=True)
class _Task:
    texts: dict[str, str]
    labels: dict[str, dict[str, int]]
    queries: list[str]  # that count
    source: CorpusSource | None
    fingerprints: dict[str, dict[str, str]]
    notes: list[str]


def run(config: RetrievalEvalConfig, *, dry_run: bool = False) -> RetrievalEvalResult:
    """Run it; what an earlier run built, embedded or asked is used again.

    Args:
        config: The settings.
        dry_run: Check and count, and write nothing.

    Raises:
        InputError: No labels, no such measure, a ranking of none of the queries.
        ModelError: A library or a model cannot be had.
        OutputError: The folder holds something else.
        TamisError: Settings that contradict one another.
    """
    _check(config)
    measures = parse_measures(config.measures)
    task = _read(config)
    if dry_run:
        retrievers = _retrievers(config, Workshop(_work(config)), task.source)
        record = {
            "queries": len(task.queries),
            "systems": [{"name": r.name, "kind": r.kind, **r.settings} for r in retrievers]
            + [{"name": n, "kind": "run"} for n in config.runs],
            "measures": [m.name for m in measures],
            "notes": task.notes,
        }
        return RetrievalEvalResult(None, [m.name for m in measures], task.queries, [], {}, record)
    out = EvalFolder(config.output, "retrieval", options=config.storage_options)
    workshop = Workshop(_work(config))
    retrievers = _retrievers(config, workshop, task.source)
    with locked(workshop.folder), terminable():
        return _evaluate(config, out, task, measures, workshop, retrievers)


def _check(config: RetrievalEvalConfig) -> None:
    names = [*config.systems, *config.runs]
    if not names:
        raise TamisError(
            "nothing to evaluate: pass --system bm25, an encoder or its folder, or --run NAME=FILE"
        )
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise TamisError(f"two systems are called '{twice}'; give one of them another name: NAME=...")
    if config.baseline is not None and config.baseline not in names:
        raise TamisError(f"--baseline '{config.baseline}' is no system (there are: {', '.join(names)})")
    if config.denominator not in DENOMINATORS:
        raise TamisError(f"--denominator '{config.denominator}' is neither judged nor answered")


def _work(config: RetrievalEvalConfig) -> Any:
    from transforms.shards.files import Folder

    return Folder(config.work or f"{config.output.rstrip('/')}/{WORK}", **config.storage_options)


def _retrievers(
    config: RetrievalEvalConfig, workshop: Workshop, source: CorpusSource | None
) -> list[Retriever]:
    if source is None:
        return []
    use = EncoderUse.of(config.dense_options)
    running = Running(config.device, config.threads, config.workers, config.exact, config.progress)
    found: list[Retriever] = []
    for name, reference in config.systems.items():
        if reference.partition(":")[0] == BM25:
            found.append(BM25Retriever(name, config.depth, _bm25(config, reference), workshop, source))
            continue
        found.append(
            DenseRetriever(
                name,
                config.depth,
                reference,
                use,
                running,
                workshop,
                source,
                config.storage_options,
                index=None if is_embedded(reference, config.storage_options) else config.index,
            )
        )
    return found


def _bm25(config: RetrievalEvalConfig, reference: str) -> BM25Settings:
    """`bm25` as the options have it, `bm25:stemmer=english,b=0.75` with some settings of its own."""
    given: dict[str, Any] = {k: getattr(config, k) for k in ("k1", "b", "stopwords", "stemmer")}
    for part in filter(None, reference.partition(":")[2].split(",")):
        key, _, value = part.partition("=")
        if key not in given:
            raise TamisError(f"--system {reference}: no setting '{key}' (there are: {', '.join(given)})")
        try:
            given[key] = float(value) if key in ("k1", "b") else value
        except ValueError:
            raise TamisError(f"--system {reference}: {key} '{value}' is not a number") from None
    return BM25Settings(given["k1"], given["b"], Analyzer(given["stopwords"], given["stemmer"]))


def _read(config: RetrievalEvalConfig) -> _Task:
    from pipelines.retrieval.inputs import open_collection

    opened = open_collection(
        config.collection,
        corpus=config.corpus,
        queries=config.queries,
        splits=config.splits,
        corpus_source=config.corpus_source,
        text=config.text,
        options=config.storage_options,
        need_documents=bool(config.systems),
    )
    notes = list(opened.data.notes)
    chosen = LabelFilter(config.label_source, config.annotators, config.signals, (), config.splits)
    labels = chosen.apply(frame(opened.data.judgments))
    if not labels.height:
        raise InputError(
            f"{config.collection} holds no labels (of the chosen splits, annotators and signals)"
        )
    nested, without = _grades(labels, config.unify, config.collection)
    if without:
        notes.append(
            f"{without:,} judged queries have no positive label; no ranking of them can be scored, and none is"
        )
    texts = {
        q: t
        for q, t in zip(
            opened.data.queries["query_id"].to_pylist(), opened.data.queries["text"].to_pylist(), strict=True
        )
        if t is not None and t.strip()
    }
    queries = list(nested)
    source = opened.source if config.systems else None
    silent = sum(q not in texts for q in queries)
    if config.systems and silent == len(queries):
        raise InputError("no judged query has a text: pass --queries")
    if config.systems and silent:
        notes.append(
            f"{silent:,} judged queries have no text; every system searched for here scores 0 on them"
        )
    return _Task(texts, nested, queries, source, opened.fingerprints, notes)


def _grades(labels: pl.DataFrame, policy: str, where: str) -> tuple[dict[str, dict[str, int]], int]:
    """Grades by query and document, of queries with a positive; and how many have none."""
    import polars as pl

    one = unify(labels, policy, PositiveRule(), where=f"the labels of {where}", contributors=False)
    grade = pl.coalesce(pl.col("grade"), pl.col("positive").cast(pl.Int32)).alias("grade")
    rows = one.select("query_id", "doc_id", grade).drop_nulls("grade")
    nested: dict[str, dict[str, int]] = {}
    for query, doc, value in rows.iter_rows():
        nested.setdefault(query, {})[doc] = int(value)
    kept = {q: docs for q, docs in nested.items() if max(docs.values()) > 0}
    if not kept:
        raise InputError(f"{where}: no query has a positive label")
    return kept, len(nested) - len(kept)


def _evaluate(
    config: RetrievalEvalConfig,
    out: EvalFolder,
    task: _Task,
    measures: Sequence[Measure],
    workshop: Workshop,
    retrievers: Sequence[Retriever],
) -> RetrievalEvalResult:
    asked = [(q, task.texts[q]) for q in task.queries if q in task.texts]
    answers = None
    corpus_counts: dict[str, int] = {}
    if retrievers and task.source is not None:
        bm25 = [r.bm25 for r in retrievers if isinstance(r, BM25Retriever)]
        by_name = any(r.by_name for r in retrievers if isinstance(r, DenseRetriever))
        with passing("documents", config.progress) as tell:
            corpus = workshop.prepare(task.source, bm25=bm25, texts=by_name, tell=tell)
        corpus_counts = corpus.counts
        answers = Answers(workshop.folder.child("hits"), corpus, asked, drop_self=not config.keep_self)
    scored: list[_Scored] = []
    notes = list(task.notes)
    for r in retrievers:
        assert answers is not None
        found = answers.read(answers.collect(r, config.progress))
        notes += strangers(r)
        scored.append(
            _score(out, task, measures, r.name, r.kind, found, {"depth": r.depth, **r.settings, **r.facts})
        )
    for name, url in config.runs.items():
        found = _given(config, task, url)
        scored.append(_score(out, task, measures, name, "run", found, {"file": url.rsplit("/", 1)[-1]}))
    for s in scored:
        if silent := sum(q in task.texts or s.kind == "run" for q in task.queries) - len(s.answered):
            notes.append(f"{s.name} gives no document for {silent:,} of the queries")
    queries = task.queries
    if config.denominator == "answered":
        queries = [q for q in queries if all(q in s.answered for s in scored)]
        if not queries:
            raise InputError("no query is answered by every system: leave out --denominator answered")
    systems = [_mean(config, s, task.queries, queries) for s in scored]
    comparisons = {
        (a.name, b.name): {
            m.name: compare(a.values[m.name], b.values[m.name], seed=config.seed, draws=config.draws)
            for m in measures
        }
        for i, b in enumerate(systems)
        for a in systems[i + 1 :]
    }
    result = RetrievalEvalResult(config.output, [m.name for m in measures], queries, systems, comparisons)
    record = make_record(
        config,
        measures,
        result,
        labels=task.labels,
        fingerprints=task.fingerprints,
        corpus=corpus_counts,
        notes=notes,
    )
    from pipelines.evaluation.retrieval_page import render

    out.write_table("per_query.parquet", _long(result))
    out.write_text("report.html", render(result, record, task.texts))
    result.record.update(out.finish(record))
    return result


@dataclass(frozen=True)
class _Scored:
    name: str
    kind: str
    values: dict[str, list[float]]  # of every judged query
    answered: set[str]
    settings: dict[str, Any]


def _given(config: RetrievalEvalConfig, task: _Task, url: str) -> pl.DataFrame:
    import polars as pl

    found = read_run(url, config.storage_options)
    mine = found.join(pl.DataFrame({"query_id": task.queries}), on="query_id", how="semi")
    if not mine.height:
        raise InputError(f"--run {url} ranks documents for none of the judged queries")
    if not config.keep_self:
        mine = mine.filter(pl.col("query_id") != pl.col("doc_id"))
    # Where a tool gave ranks only, a falling score says the same.
    return mine.with_columns(pl.coalesce("score", -pl.col("rank").cast(pl.Float64)).alias("score"))


def _score(
    out: EvalFolder,
    task: _Task,
    measures: Sequence[Measure],
    name: str,
    kind: str,
    found: pl.DataFrame,
    settings: dict[str, Any],
) -> _Scored:
    ranking: dict[str, dict[str, float]] = {}
    for query, doc, score in found.select("query_id", "doc_id", "score").iter_rows():
        ranking.setdefault(query, {})[doc] = float(score)
    settings = {**settings, "rows": found.height, "run": _write_run(out, name, found)}
    values = by_query(measures, task.labels, ranking, task.queries)
    return _Scored(name, kind, values, {q for q in task.queries if q in ranking}, settings)


def _mean(
    config: RetrievalEvalConfig, scored: _Scored, every: Sequence[str], queries: Sequence[str]
) -> SystemResult:
    place = {q: i for i, q in enumerate(every)}
    values = {m: [v[place[q]] for q in queries] for m, v in scored.values.items()}
    means = {m: mean_interval(v, seed=config.seed, draws=config.draws) for m, v in values.items()}
    answered = sum(q in scored.answered for q in queries)
    return SystemResult(scored.name, scored.kind, values, means, answered, scored.settings)


def _write_run(out: EvalFolder, name: str, found: pl.DataFrame) -> str:
    """The ranking as it was scored: a TREC run, or a table where ids hold spaces."""
    import polars as pl

    slug = "".join(c if c.isalnum() or c in "-_.@" else "-" for c in name)
    spaces = pl.col("query_id").str.contains(r"\s") | pl.col("doc_id").str.contains(r"\s")
    if found.height and found.select(spaces.any()).item():
        path = f"runs/{slug}.parquet"
        with out.folder.publish(path) as temporary:
            found.write_parquet(temporary, compression="zstd")
        return path
    path = f"runs/{slug}.run"
    lines = [
        f"{q} Q0 {d} {r} {s!r} {slug}\n"
        for q, d, r, s in found.select("query_id", "doc_id", "rank", "score").iter_rows()
    ]
    out.folder.write(path, "".join(lines).encode("utf-8"))
    return path


def _long(result: RetrievalEvalResult) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"query_id": [], "system": [], "measure": [], "value": []}
    for s in result.systems:
        for measure, values in s.values.items():
            columns["query_id"] += result.queries
            columns["system"] += [s.name] * len(values)
            columns["measure"] += [measure] * len(values)
            columns["value"] += values
    return columns


def print_result(result: RetrievalEvalResult) -> None:
    """Say what came of it."""
    from rich.table import Table

    console = wide_console()
    record = result.record
    if result.output is None:
        names = ", ".join(f"{s['name']} ({s['kind']})" for s in record["systems"])
        console.print(
            f"planned: {record['queries']:,} queries, {names}; {', '.join(record['measures'])}",
            soft_wrap=True,
        )
        return
    table = Table(box=None, title=f"{len(result.queries):,} queries", title_justify="left")
    table.add_column("system", overflow="fold")
    first = result.measures[0]
    for m in result.measures:
        table.add_column(m + (" [95 %]" if m == first else ""), justify="right")
    for s in result.systems:
        x = s.means[first]
        others = (f"{s.means[m].mean:.4f}" for m in result.measures[1:])
        table.add_row(s.name, f"{x.mean:.4f} {ends(x.as_dict())}", *others)
    console.print(table)
    base = record["baseline"]
    for pair in record["comparisons"]:
        if base in (pair["a"], pair["b"]):
            test = pair["measures"][first]
            d = test["difference"]
            console.print(
                f"{pair['a']} - {pair['b']}: {first} {d['mean']:+.4f} {ends(d, 4, '+')}, "
                f"p {test['t_p_value_holm']:.4f} (t, Holm), {test['p_value']:.4f} (bootstrap)",
                soft_wrap=True,
            )
    for note in record["notes"]:
        console.print(note, soft_wrap=True)
    console.print(f"report: {result.output}/report.html   runs: {result.output}/runs", soft_wrap=True)


def parse_systems(items: Sequence[str]) -> dict[str, str]:
    """`[NAME=]SYSTEM` options by name.

    Raises:
        TamisError: Two have one name.
    """
    from pathlib import Path

    found: dict[str, str] = {}
    for item in items:
        name, sign, thing = item.partition("=")
        if not sign or "/" in name or ":" in name or Path(item).exists():
            name, thing = short_name(item), item
        if name in found:
            raise TamisError(f"two systems are called '{name}'; name them: NAME={thing}")
        found[name] = thing
    return found
