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

from pipelines.retrieval.corpus import Corpus, CorpusSource, Workshop
from schemas.errors import InputError, TamisError
from schemas.fingerprint import config_hash
from transforms.retrieval.candidates import hits
from transforms.retrieval.lexical import BM25Settings, LexicalIndex
from transforms.shards.files import Folder, file_fingerprint

if TYPE_CHECKING:
    import polars as pl

    from pipelines.search import Searcher
    from transforms.retrieval.nearest import Vectors

_FAISS_DIGITS = 6
_MORE = 32  # further hits asked of an index, to put equal scores in order at the cut


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
        own = _own(ask, corpus)
        watched = _watched(ask, corpus)
        rows: list[tuple[str, str, int | None, float | None]] = []
        for i, (query, text) in enumerate(zip(ask.ids, ask.texts, strict=True)):
            numbers, scores, seen = self._index.best(
                text, self.depth, corpus.order, watched=watched[i], without=int(own[i])
            )
            rows += _rows(query, corpus.names(numbers), scores.astype(float).tolist(), seen, corpus)
        return hits(rows)

    def close(self) -> None:
        """See `Retriever`."""
        self._index = self._corpus = None


@dataclass(frozen=True)
class EncoderUse:
    """How an encoder by name is used, for documents and queries.

    Attributes:
        prefix: Text before documents, instead of the model's prompt.
        query_prefix: Text before queries, instead of the model's prompt.
        prompt_name: Prompt for documents, by name.
        query_prompt_name: Prompt for queries, by name.
        pooling: Instead of the model's own.
        normalize: Unit length; None as the model says.
        dimensions: Keep so many numbers of each vector.
        long: What is done with over-long texts.
        dtype: What the model computes in.
        store: Type of stored numbers.
        token_budget: Padded tokens a batch.
        metric: auto, cosine, dot, l2.
    """

    prefix: str | None = None
    query_prefix: str | None = None
    prompt_name: str | None = None
    query_prompt_name: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    long: str = "truncate"
    dtype: str = "float32"
    store: str = "float32"
    token_budget: int | None = None
    metric: str = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EncoderUse:
        """From KEY=VALUE pairs.

        Raises:
            TamisError: There is no such setting.
        """
        strange = options.keys() - cls.__dataclass_fields__.keys()
        if strange:
            known = ", ".join(cls.__dataclass_fields__)
            raise TamisError(f"--dense-option: no setting '{min(strange)}' (there are: {known})")
        return cls(**options)


@dataclass(frozen=True)
class Running:
    """How models are run; none of it decides what comes out, but for rounding."""

    device: str = "auto"
    threads: int = 1
    workers: int = 1
    exact: bool = False
    progress: str = "auto"


class DenseRetriever:
    """Nearest vectors: of an output of `tamis embed`, or of an encoder by name, which embeds the corpus when opened.

    Args:
        name: Source of its candidates.
        depth: Documents a query.
        reference: Output folder of `tamis embed`, or an encoder.
        use: How the encoder is used.
        running: How it is run.
        workshop: Where the vectors of an encoder by name are kept.
        source: The documents.
        storage: fsspec options.
        index: Kind of index an encoder by name is searched through; None: every vector is looked at.

    Raises:
        ModelError: The encoder cannot be had.
        OutputError: The folder is no finished output of `tamis embed`.
    """

    kind, block = "dense", 2048

    def __init__(
        self,
        name: str,
        depth: int,
        reference: str,
        use: EncoderUse,
        running: Running,
        workshop: Workshop,
        source: CorpusSource,
        storage: Mapping[str, Any] | None = None,
        *,
        index: str | None = None,
    ) -> None:
        self.name, self.depth, self.reference = name, depth, reference
        self._index = index
        self._use, self._running, self._storage = use, running, dict(storage or {})
        self.by_name = not is_embedded(reference, self._storage)
        self.facts: dict[str, Any] = {}
        self._searcher: Searcher | None = None
        self._vectors: Vectors | None = None
        self._corpus: Corpus | None = None
        self._output = reference
        self._input = workshop.text_place(source)
        if self.by_name:
            self._describe(workshop, source)
        else:
            folder = Folder(reference, **self._storage)
            self.settings = {
                "vectors": file_fingerprint(folder, "manifest.json"),
                "exact": running.exact,
                "metric": use.metric,
                "query_prefix": use.query_prefix,
                "query_prompt_name": use.query_prompt_name,
            }

    def _describe(self, workshop: Workshop, source: CorpusSource) -> None:
        from pipelines.embed import describe

        config = self._embed_config("")
        info, wants = describe(config)
        self.settings = {
            "encoder": info.name,
            "revision": info.revision,
            "prompt": wants.prompt("document", self._use.prompt_name, self._use.prefix),
            "query_prompt": wants.prompt("query", self._use.query_prompt_name, self._use.query_prefix),
            "text": source.template.template,
            **{k: getattr(self._use, k) for k in ("pooling", "normalize", "dimensions", "long", "dtype", "store", "metric")},
        }  # fmt: skip
        documents = {k: v for k, v in self.settings.items() if k not in ("query_prompt", "metric")}
        mark = config_hash({**documents, "corpus": source.key})[:16]
        if self._index is not None:
            self.settings["index"] = self._index
        self._output = f"{workshop.folder.url.rstrip('/')}/embed-{mark}"

    def _embed_config(self, output: str) -> Any:
        from pipelines.embed import EmbedConfig, make_index_config

        use = self._use
        return EmbedConfig(
            input=self._input,
            output=output,
            encoder=self.reference,
            id_column="doc_id",
            prompt_name=use.prompt_name,
            prefix=use.prefix,
            pooling=use.pooling,
            normalize=use.normalize,
            dimensions=use.dimensions,
            long=use.long,
            store=use.store,
            dtype=use.dtype,
            device=self._running.device,
            threads=self._running.threads,
            token_budget=use.token_budget,
            index=make_index_config(self._index, {}) if self._index is not None else None,
            storage_options=self._storage,
        )

    def open(self, corpus: Corpus) -> None:
        """Embed what is not embedded yet, and load the model for queries.

        Raises:
            InputError: The vectors are of other documents.
        """
        from pipelines.search import Searcher, SearchOptions
        from transforms.retrieval.nearest import Vectors

        if self.by_name:
            self._embed()
        options = SearchOptions(
            exact=self._running.exact or (self.by_name and self._index is None),
            metric=self._use.metric,
            prompt_name=self._use.query_prompt_name,
            prefix=self._use.query_prefix,
            device=self._running.device,
            threads=self._running.threads,
        )
        searcher = Searcher(self._output, options, self._storage)
        ids = [row_ids.filter(present) for _, row_ids, present in searcher.shards.ids()]
        import pyarrow as pa

        every = pa.concat_arrays([i.cast(pa.string()) for i in ids]) if ids else pa.array([], pa.string())
        numbers = corpus.numbers(every)
        strange = int((numbers < 0).sum())
        if strange == len(numbers):
            example = every[0].as_py() if len(every) else "none"
            raise InputError(
                f"--dense {self.reference}: no id of its rows ('{example}' ...) is a document's "
                f"('{corpus.ids[0].as_py()}' ...); embed with --id-column"
            )
        self._searcher, self._corpus = searcher, corpus
        self._vectors = Vectors(searcher.shards, numbers, corpus.order, searcher.metric)
        index = searcher.index
        self.facts = {
            "metric": searcher.metric,
            "search": "exact" if index is None else str(index.entry["factory"]),
            "vectors": int((self._vectors.numbers >= 0).sum()),
            "vectors_of_other_documents": strange,
            "model": next(m for m in searcher.shards.manifest["models"] if m["kind"] == "encoder"),
        }

    def _embed(self) -> None:
        from pipelines.embed import run
        from pipelines.run import RunSettings

        Folder(self._output, **self._storage)  # an unknown protocol shows here
        run(
            self._embed_config(self._output),
            RunSettings(workers=self._running.workers, progress=self._running.progress),
        )

    def search(self, ask: Ask) -> pl.DataFrame:
        """See `Retriever`."""
        assert self._searcher is not None and self._vectors is not None and self._corpus is not None
        corpus = self._corpus
        queries = self._searcher.vectors(list(ask.texts))
        if not np.isfinite(queries).all():
            raise TamisError(
                f"{self.name}: the vector of a query is not finite; try --dense-option dtype=float32"
            )
        own = _own(ask, corpus)
        watched = _watched(ask, corpus)
        if self._searcher.index is None:
            k = min(self.depth, len(corpus))
            near = self._vectors.search(
                queries,
                k,
                watched=watched if any(watched) else None,
                without=own if (own >= 0).any() else None,
            )
            numbers, scores, seen = near.numbers, near.scores, near.watched
        else:
            numbers, scores, seen = self._by_index(queries, own, watched)
        rows: list[tuple[str, str, int | None, float | None]] = []
        for i, query in enumerate(ask.ids):
            there = numbers[i] >= 0
            rows += _rows(query, corpus.names(numbers[i][there]), scores[i][there].tolist(), seen[i], corpus)
        return hits(rows)

    def _by_index(self, queries: Any, own: Any, watched: list[list[int]]) -> Any:
        """Hits of an index; watched documents it does not find get the score of their vector, and no rank."""
        assert self._searcher is not None and self._searcher.index is not None
        assert self._vectors is not None and self._corpus is not None
        k = min(self.depth + _MORE, self._searcher.index.size)
        found = self._searcher.index.search(queries, k)
        order = self._corpus.order
        numbers = np.full((len(queries), self.depth), -1, np.int64)
        scores = np.full((len(queries), self.depth), -np.inf)
        for i in range(len(queries)):
            ordinals = found.ordinals[i]
            mine = np.where(ordinals >= 0, self._vectors.numbers[np.maximum(ordinals, 0)], -1)
            keep = (mine >= 0) & (mine != own[i])
            named, points = mine[keep], np.round(found.scores[i][keep].astype(np.float64), _FAISS_DIGITS)
            best = np.lexsort((order[named], -points))[: self.depth]
            numbers[i, : len(best)], scores[i, : len(best)] = named[best], points[best]
        seen: list[dict[int, tuple[int | None, float]]] = [{} for _ in watched]
        if any(watched):
            exact = self._vectors.scores_of(queries, watched)
            for i, own_scores in enumerate(exact):
                place = {int(n): r for r, n in enumerate(numbers[i], 1) if n >= 0}
                seen[i] = {n: (place.get(n), s) for n, s in own_scores.items()}
        return numbers, scores, seen

    def close(self) -> None:
        """See `Retriever`."""
        self._searcher = self._vectors = self._corpus = None


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
    """query_id, doc_id, rank, score of a ranking; equal scores stay in the order of the file.

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
    return ordered.with_columns(rank.alias("rank")).select("query_id", "doc_id", "rank", "score")


def is_embedded(reference: str, storage: Mapping[str, Any] | None = None) -> bool:
    """Whether a reference is an output of a job, and not an encoder."""
    if ":" in reference and "://" not in reference:
        return False
    try:
        return Folder(reference, **dict(storage or {})).exists("manifest.json")
    except (ValueError, ImportError, OSError):
        return False


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


def _own(ask: Ask, corpus: Corpus) -> Any:
    """The document a query is, by number; -1 where it is none."""
    if not ask.drop_self:
        return np.full(len(ask.ids), -1, np.int64)
    return corpus.numbers(list(ask.ids))


def _watched(ask: Ask, corpus: Corpus) -> list[list[int]]:
    own = [list(ask.watched.get(q, ())) for q in ask.ids]
    flat = corpus.numbers([d for docs in own for d in docs]) if any(own) else np.zeros(0, np.int64)
    numbers, at = [], 0
    for docs in own:
        numbers.append([int(n) for n in flat[at : at + len(docs)] if n >= 0])
        at += len(docs)
    return numbers


def _rows(
    query: str,
    names: list[str],
    scores: list[float],
    seen: Mapping[int, tuple[int | None, float]],
    corpus: Corpus,
) -> list[tuple[str, str, int | None, float | None]]:
    rows: list[tuple[str, str, int | None, float | None]] = [
        (query, d, r, s) for r, (d, s) in enumerate(zip(names, scores, strict=True), 1)
    ]
    there = set(names)
    more = [(corpus.ids[n].as_py(), rank, score) for n, (rank, score) in seen.items()]
    rows += [
        (query, d, r, s) for d, r, s in sorted(more, key=lambda x: (x[1] or 1 << 30, x[0])) if d not in there
    ]
    return rows
