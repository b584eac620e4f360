"""Nearest vectors as a retriever: of an embedded corpus, or of an encoder by name, which embeds the corpus first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.retrieval.corpus import Corpus, CorpusSource, Workshop
from pipelines.retrieval.retrievers import Ask, answer_rows, own_numbers, watched_numbers
from schemas.errors import InputError, TamisError
from schemas.fingerprint import config_hash
from transforms.embed.exact import METRICS
from transforms.retrieval.candidates import hits
from transforms.shards.files import Folder, file_fingerprint

if TYPE_CHECKING:
    import polars as pl

    from pipelines.search import Searcher
    from transforms.retrieval.nearest import Vectors

_FAISS_DIGITS = 6
_MORE = 32  # further hits asked of an index, to put equal scores in order at the cut


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
        if options.get("metric", "auto") not in ("auto", *METRICS):
            raise TamisError(
                f"--dense-option metric: '{options['metric']}' is not auto, {', '.join(METRICS)}"
            )
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
        reference: Output folder of `tamis embed`, or an encoder. `FOLDER@ENCODER` asks the folder's vectors with
            queries of an encoder that was trained against them.
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
        reference, asking = split_reference(reference, storage)
        self.name, self.depth, self.reference, self._asking = name, depth, reference, asking
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
            if asking is not None:
                self.settings["query_encoder"] = _revision(asking)

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
        from pydantic import ValidationError

        try:
            return self._checked_config(output)
        except ValidationError as error:
            first = error.errors()[0]
            raise TamisError(f"--dense-option {first['loc'][0]}: {first['msg']}") from error

    def _checked_config(self, output: str) -> Any:
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
            query_encoder=self._asking,
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
        if self._asking is not None:
            self.facts["query_encoder"] = _revision(self._asking)

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
        own = own_numbers(ask, corpus)
        watched = watched_numbers(ask, corpus)
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
            rows += answer_rows(
                query, corpus.names(numbers[i][there]), scores[i][there].tolist(), seen[i], corpus
            )
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


def split_reference(reference: str, storage: Mapping[str, Any] | None = None) -> tuple[str, str | None]:
    """An embedded corpus and the encoder of its queries, where `FOLDER@ENCODER` names both; else the reference alone."""
    folder, sign, encoder = reference.rpartition("@")
    return (folder, encoder) if sign and encoder and is_embedded(folder, storage) else (reference, None)


def _revision(encoder: str) -> str:
    from models import registry
    from models.encoder_folder import encoder_name

    return registry.describe("encoder", encoder_name(encoder)).revision


def is_embedded(reference: str, storage: Mapping[str, Any] | None = None) -> bool:
    """Whether a reference is an output of a job (or `FOLDER@ENCODER` of one), and not an encoder."""
    folder, sign, encoder = reference.rpartition("@")
    if sign and encoder and is_embedded(folder, storage):
        return True
    if ":" in reference and "://" not in reference:
        return False
    try:
        folder = Folder(reference, **dict(storage or {}))
        # A model that tamis trained may carry a manifest too.
        return folder.exists("manifest.json") and not folder.exists("modules.json")
    except (ValueError, ImportError, OSError):
        return False
