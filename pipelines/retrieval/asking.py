"""Asking retrievers a block of queries at a time; what a block was answered is kept, so that a killed run goes on behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import orjson

from pipelines.evaluation.progress import counting
from pipelines.retrieval.corpus import Corpus
from pipelines.retrieval.retrievers import Ask, Retriever
from schemas.fingerprint import config_hash, fingerprint
from transforms.shards.files import Folder

if TYPE_CHECKING:
    import polars as pl


class Answers:
    """What retrievers found for some queries, on disk.

    Args:
        folder: Where answers are kept.
        corpus: The documents.
        queries: Ids and texts, none blank.
        watched: By query, documents whose rank and score are wanted wherever they stand.
        drop_self: Leave out the document whose id is the query's.
    """

    def __init__(
        self,
        folder: Folder,
        corpus: Corpus,
        queries: Sequence[tuple[str, str]],
        watched: Mapping[str, Sequence[str]] | None = None,
        *,
        drop_self: bool = True,
    ) -> None:
        self._folder, self._corpus, self._queries = folder, corpus, list(queries)
        self._watched, self._drop_self = dict(watched or {}), drop_self

    def collect(self, retriever: Retriever, progress: str = "auto") -> list[str]:
        """Ask a retriever everything it was not asked yet; it is opened only where there is something to ask.

        Returns:
            Names of the files with its answers, in the order of the queries.
        """
        blocks = list(self._blocks(retriever))
        facts = f"{self._home(retriever)}/facts.json"
        missing = [(name, ask) for name, ask in blocks if not self._folder.exists(name)]
        if missing:
            retriever.open(self._corpus)
            try:
                self._folder.write(facts, orjson.dumps(retriever.facts))
                waiting = sum(len(ask.ids) for _, ask in missing)
                with counting(f"{retriever.name}: queries", waiting, progress) as tell:
                    for name, ask in missing:
                        found: pl.DataFrame = retriever.search(ask)
                        with self._folder.publish(name) as temporary:
                            found.write_parquet(temporary, compression="zstd")
                        tell(len(ask.ids))
            finally:
                retriever.close()
        elif self._folder.exists(facts):
            retriever.facts = orjson.loads(self._folder.read(facts))
        return [name for name, _ in blocks]

    def read(self, files: Sequence[str], queries: Sequence[str] | None = None) -> pl.DataFrame:
        """Answers of some files, for some queries or all."""
        import polars as pl

        parts = []
        for name in files:
            with self._folder.open(name) as file:
                part = pl.read_parquet(file)
            if queries is not None:
                part = part.join(pl.DataFrame({"query_id": list(queries)}), on="query_id", how="semi")
            parts.append(part)
        return pl.concat(parts)

    def files_of(self, files: Sequence[str], retriever: Retriever, first: int, last: int) -> list[str]:
        """Which of a retriever's files hold answers of the queries numbered `first` to `last` (not included)."""
        size = retriever.block
        return list(files[first // size : -(-last // size)])

    def _home(self, retriever: Retriever) -> str:
        decides = {
            "settings": retriever.settings,
            "kind": retriever.kind,
            "depth": retriever.depth,
            "corpus": self._corpus.key,
            "drop_self": self._drop_self,
        }
        return f"{retriever.kind}-{config_hash(decides)[:16]}"

    def _blocks(self, retriever: Retriever) -> Iterator[tuple[str, Ask]]:
        home = self._home(retriever)
        for number, start in enumerate(range(0, len(self._queries), retriever.block)):
            block = self._queries[start : start + retriever.block]
            ids, texts = [q for q, _ in block], [t for _, t in block]
            watched = {q: self._watched[q] for q in ids if q in self._watched}
            mark = fingerprint(*(x for q, t in block for x in (q, t, *watched.get(q, ()), "")))
            yield f"{home}/{number:05d}-{mark[:16]}.parquet", Ask(ids, texts, watched, self._drop_self)
