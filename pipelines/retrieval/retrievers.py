"""Retrievers by one interface: BM25, an embedded corpus, an encoder by name, a ranking somebody else made.

A retriever says what decides its answers (`settings`), is opened when its answers are not there yet, and is asked a block
of queries at a time. One is open at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipelines.retrieval.corpus import Corpus, CorpusSource, IntArray, Workshop
from schemas.errors import InputError
from transforms.retrieval.candidates import hits
from transforms.retrieval.lexical import BM25Settings, LexicalIndex

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Ask:
    """Queries to answer.

    Attributes:
        ids: Their ids.
        texts: Their texts; none is blank.
        watched: By query, documents whose rank and score are wanted wherever they stand.
        drop_self: Leave out the document whose id is the query's.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    watched: Mapping[str, Sequence[str]] = field(default_factory=dict)
    drop_self: bool = True


class Retriever(Protocol):
    """Answers queries.

    Attributes:
        name: Source of its candidates.
        kind: bm25, dense or run.
        depth: Documents a query.
        block: Queries asked at once.
        settings: What decides its answers.
        facts: What manifests record beside them, known once it was opened.
    """

    name: str
    kind: str
    depth: int
    block: int
    settings: dict[str, Any]
    facts: dict[str, Any]

    def open(self, corpus: Corpus) -> None:
        """Get ready."""

    def search(self, ask: Ask) -> pl.DataFrame:
        """query_id, doc_id, rank, score: the first `depth` of each query, and watched documents behind them."""

    def close(self) -> None:
        """Let go of what it holds."""


class BM25Retriever:
    """BM25 over the corpus' texts.

    Args:
        name: Source of its candidates.
        depth: Documents a query.
        settings: k1, b, words.
        workshop: Where its index is.
        source: The documents.
    """

    kind, block = "bm25", 500

    def __init__(
        self, name: str, depth: int, settings: BM25Settings, workshop: Workshop, source: CorpusSource
    ) -> None:
        self.name, self.depth = name, depth
        self.bm25 = settings
        self.settings = {**settings.deciding, "text": source.template.template}
        self.facts: dict[str, Any] = {}
        self._place = workshop.index_place(source, settings)
        self._index: LexicalIndex | None = None
        self._corpus: Corpus | None = None

    def open(self, corpus: Corpus) -> None:
        """Map the index."""
        self._index, self._corpus = LexicalIndex(self._place, self.bm25.analyzer), corpus

    def search(self, ask: Ask) -> pl.DataFrame:
        """See `Retriever`."""
        assert self._index is not None and self._corpus is not None
        corpus = self._corpus
        own = own_numbers(ask, corpus)
        watched = watched_numbers(ask, corpus)
        rows: list[tuple[str, str, int | None, float | None]] = []
        for i, (query, text) in enumerate(zip(ask.ids, ask.texts, strict=True)):
            numbers, scores, seen = self._index.best(
                text, self.depth, corpus.order, watched=watched[i], without=int(own[i])
            )
            rows += answer_rows(query, corpus.names(numbers), scores.astype(float).tolist(), seen, corpus)
        return hits(rows)

    def close(self) -> None:
        """See `Retriever`."""
        self._index = self._corpus = None


class RunRetriever:
    """A ranking that is there: a TREC run, or a pool of one source.

    Args:
        name: Source of its candidates.
        depth: Documents a query.
        url: The file.
        storage: fsspec options.

    Raises:
        InputError: It holds no ranking.
    """

    kind, block = "run", 5000

    def __init__(self, name: str, depth: int, url: str, storage: Mapping[str, Any] | None = None) -> None:
        from pipelines.retrieval.folder import input_fingerprints

        self.name, self.depth, self.url = name, depth, url
        self._storage = dict(storage or {})
        self.settings = {"files": input_fingerprints(url, self._storage)}
        self.facts: dict[str, Any] = {}
        self._rows: pl.DataFrame | None = None

    def open(self, corpus: Corpus) -> None:
        """Read it."""
        self._rows, self.facts = read_run(self.url, self._storage), {}
        rows = self._rows
        names = rows["doc_id"].unique()
        known = corpus.numbers(names.to_list()) >= 0
        strange = set(names.filter(~known).to_list())
        import polars as pl

        inside = rows.filter(~pl.col("doc_id").is_in(list(strange))) if strange else rows
        if not inside.height:
            raise InputError(f"--run {self.url}: none of its documents ('{names[0]}' ...) is in the corpus")
        self.facts = {"rows": rows.height, "rows_of_other_documents": rows.height - inside.height}
        self._rows = inside.with_columns(
            pl.col("rank").rank("ordinal").over("query_id").cast(pl.Int32).alias("rank")
        )

    def search(self, ask: Ask) -> pl.DataFrame:
        """See `Retriever`."""
        import polars as pl

        assert self._rows is not None
        mine = self._rows.join(pl.DataFrame({"query_id": list(ask.ids)}), on="query_id", how="semi")
        if ask.drop_self:
            mine = mine.filter(pl.col("query_id") != pl.col("doc_id")).with_columns(
                pl.col("rank").rank("ordinal").over("query_id").cast(pl.Int32).alias("rank")
            )
        pairs = [(q, d) for q, docs in ask.watched.items() for d in docs]
        watched = pl.DataFrame(pairs, schema={"query_id": pl.String, "doc_id": pl.String}, orient="row")
        kept = pl.col("rank") <= self.depth
        behind = mine.filter(~kept).join(watched, on=["query_id", "doc_id"], how="semi")
        return pl.concat([mine.filter(kept), behind]).select("query_id", "doc_id", "rank", "score")

    def close(self) -> None:
        """See `Retriever`."""
        self._rows = None


def read_run(url: str, storage: Mapping[str, Any] | None = None) -> pl.DataFrame:
    """query_id, doc_id, rank, score of a ranking, each document once; equal scores stay in the order of the file.

    Raises:
        InputError: It holds none, several, or ranks nobody could order.
    """
    import polars as pl

    from transforms.retrieval import formats
    from transforms.retrieval.collection import frame

    data, _ = formats.read(url, storage=dict(storage or {}))
    pool = frame(data.pool)
    if not pool.height:
        raise InputError(f"--run {url} holds no ranking")
    sources = pool["source"].unique().to_list()
    if len(sources) > 1:
        raise InputError(
            f"--run {url} holds several rankings ({', '.join(sorted(sources)[:4])}); give one file each"
        )
    ordered = pool.filter(pl.col("rank").is_not_null() | pl.col("score").is_not_null())
    by_score = pl.col("score").rank("ordinal", descending=True).over("query_id")
    rank = pl.coalesce(pl.col("rank"), by_score).cast(pl.Int32)
    ranked = ordered.with_columns(rank.alias("rank")).select("query_id", "doc_id", "rank", "score")
    once = ranked.sort("query_id", "rank", maintain_order=True).unique(
        ["query_id", "doc_id"], keep="first", maintain_order=True
    )
    return once.with_columns(pl.col("rank").rank("ordinal").over("query_id").cast(pl.Int32).alias("rank"))


def strangers(retriever: Retriever) -> list[str]:
    """What a retriever knows of documents that are not in the corpus, in words."""
    said = (
        (
            "vectors_of_other_documents",
            "vectors are of documents that are not in the corpus, and are left out",
        ),
        ("rows_of_other_documents", "rows name documents that are not in the corpus, and are left out"),
    )
    return [f"{retriever.name}: {n:,} {what}" for key, what in said if (n := retriever.facts.get(key))]


def short_name(reference: str) -> str:
    """What candidates of an encoder, an output or a file are called where nobody named them."""
    name = Path(reference.removeprefix("hf:").rstrip("/")).name
    return (
        name.removesuffix(".gz").removesuffix(".run").removesuffix(".trec").removesuffix(".txt") or reference
    )


def own_numbers(ask: Ask, corpus: Corpus) -> IntArray:
    """For each query the document it is, by number; -1 where it is none."""
    if not ask.drop_self:
        return np.full(len(ask.ids), -1, np.int64)
    return corpus.numbers(list(ask.ids))


def watched_numbers(ask: Ask, corpus: Corpus) -> list[list[int]]:
    """For each query the watched documents that are in the corpus, by number."""
    own = [list(ask.watched.get(q, ())) for q in ask.ids]
    flat = corpus.numbers([d for docs in own for d in docs]) if any(own) else np.zeros(0, np.int64)
    numbers, at = [], 0
    for docs in own:
        numbers.append([int(n) for n in flat[at : at + len(docs)] if n >= 0])
        at += len(docs)
    return numbers


def answer_rows(
    query: str,
    names: list[str],
    scores: list[float],
    seen: Mapping[int, tuple[int | None, float]],
    corpus: Corpus,
) -> list[tuple[str, str, int | None, float | None]]:
    """A query's answers as rows: what was found, then watched documents behind it.

    Args:
        query: Its id.
        names: Documents, best first.
        scores: Of these.
        seen: Rank and score of watched documents by number.
        corpus: Their names.
    """
    rows: list[tuple[str, str, int | None, float | None]] = [
        (query, d, r, s) for r, (d, s) in enumerate(zip(names, scores, strict=True), 1)
    ]
    there = set(names)
    more = [(corpus.ids[n].as_py(), rank, score) for n, (rank, score) in seen.items()]
    rows += [
        (query, d, r, s) for d, r, s in sorted(more, key=lambda x: (x[1] or 1 << 30, x[0])) if d not in there
    ]
    return rows
