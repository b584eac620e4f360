"""A few pools for people to read: the candidates most sources agree on, with who found them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transforms.retrieval.candidates import HUMAN, found, fuse

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

QUERIES, DOCUMENTS = 6, 6
_CHARACTERS = 300


@dataclass
class Example:
    """A query and some of its candidates.

    Attributes:
        query_id: Of the query.
        text: Of the query.
        candidates: How many it has.
        documents: Id and sources of those shown, best first.
        texts: Beginnings of their texts by id, as far as they have been seen.
    """

    query_id: str
    text: str
    candidates: int
    documents: list[tuple[str, str]]
    texts: dict[str, str] = field(default_factory=dict)

    def read(self, batch: pa.RecordBatch) -> None:
        """Take the texts a batch of documents has."""
        import pyarrow as pa
        import pyarrow.compute as pc

        mask = pc.is_in(batch.column("doc_id"), pa.array([d for d, _ in self.documents], pa.string()))
        if not pc.any(mask).as_py():
            return
        for row in batch.filter(mask).select(["doc_id", "title", "text"]).to_pylist():
            whole = ". ".join(filter(None, (row["title"], row["text"])))
            short = whole if len(whole) <= _CHARACTERS else whole[:_CHARACTERS] + " ..."
            self.texts.setdefault(row["doc_id"], short)


def look_at(
    pool: pl.DataFrame, texts: Mapping[str, str], depths: Mapping[str, int], positives: pl.DataFrame
) -> list[Example]:
    """The first queries of a pool that have candidates.

    Args:
        pool: Of `POOL_SCHEMA`, in order.
        texts: Of queries.
        depths: Depth by retriever.
        positives: query_id, doc_id judged good.
    """
    import polars as pl

    examples = []
    good = set(positives.rows())
    for query in pool["query_id"].unique(maintain_order=True).to_list()[:QUERIES]:
        mine = pool.filter(pl.col("query_id") == query)
        ranked = fuse(found(mine, depths), "rrf", list(depths))["doc_id"].to_list()
        others = [d for d in mine["doc_id"].unique(maintain_order=True).to_list() if d not in set(ranked)]
        shown = []
        for doc in [*ranked, *others][:DOCUMENTS]:
            rows = mine.filter((pl.col("doc_id") == doc) & (pl.col("source") != HUMAN))
            where = [f"{s} {r}" if r else str(s) for s, r in rows.select("source", "rank").iter_rows()]
            where += ["judged good"] if (query, doc) in good else []
            shown.append((doc, ", ".join(where)))
        examples.append(Example(query, texts[query], mine["doc_id"].n_unique(), shown))
    return examples
