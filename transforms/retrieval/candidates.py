"""From what each retriever found to one pool: every candidate with all its sources, cut to a budget where one is set.

A retriever's list may hold documents behind its depth: those somebody judged good, with the rank and score the retriever
gives them, which is what margins of hard-negative mining are read against. They are in the pool because people put them
there; they do not count as found by the retriever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from schemas.pools import POOL_SCHEMA

HUMAN, RANDOM = "human", "random"
RRF = 60  # of reciprocal rank fusion (G. V. Cormack, C. L. A. Clarke, S. Büttcher, SIGIR 2009)
FUSIONS = ("rrf", "interleave")
HIT_SCHEMA = {"query_id": pl.String, "doc_id": pl.String, "rank": pl.Int32, "score": pl.Float64}


def hits(rows: Sequence[tuple[str, str, int | None, float | None]]) -> pl.DataFrame:
    """query_id, doc_id, rank, score as a frame."""
    return pl.DataFrame(rows, schema=HIT_SCHEMA, orient="row")


def found(pool: pl.DataFrame, depths: Mapping[str, int]) -> pl.DataFrame:
    """The rows of a pool that a retriever found within its depth.

    Args:
        pool: Of `POOL_SCHEMA`.
        depths: Depth by source; other sources (human, random) are left out.
    """
    depth = pl.col("source").replace_strict(dict(depths), default=0, return_dtype=pl.Int32)
    return pool.filter((pl.col("rank") <= depth).fill_null(False))


def fuse(pool: pl.DataFrame, method: str, sources: Sequence[str], k: int = RRF) -> pl.DataFrame:
    """One ranking of what several retrievers found.

    Args:
        pool: query_id, doc_id, source, rank; every row counts.
        method: `rrf`: sum over sources of 1 / (k + rank). `interleave`: by best rank, sources taking turns in the
            given order.
        sources: Their order.
        k: Of `rrf`.

    Returns:
        query_id, doc_id, score, place (from 1); of equals the document whose id comes first is ahead.
    """
    if method == "rrf":
        score = (1.0 / (k + pl.col("rank"))).sum().round(12)
    else:
        turn = pl.col("source").replace_strict({s: i for i, s in enumerate(sources)}, return_dtype=pl.Int32)
        score = -(pl.col("rank") * len(sources) + turn).min().cast(pl.Float64)
    fused = pool.group_by("query_id", "doc_id", maintain_order=True).agg(score.alias("score"))
    fused = fused.sort("query_id", "score", "doc_id", descending=[False, True, False])
    return fused.with_columns((pl.int_range(pl.len()).over("query_id") + 1).cast(pl.Int32).alias("place"))


def assemble(
    parts: Mapping[str, pl.DataFrame],
    depths: Mapping[str, int],
    queries: Sequence[str],
    *,
    human: pl.DataFrame | None = None,
    budget: int | None = None,
    fusion: str = "rrf",
) -> pl.DataFrame:
    """The pool of some queries.

    Args:
        parts: By source, in order of preference: query_id, doc_id, rank, score.
        depths: How deep each retriever was asked.
        queries: Their order.
        human: query_id, doc_id somebody judged good; never cut.
        budget: Documents a query keeps of what was found, the best of all sources fused; None = all.
        fusion: How they are fused.

    Returns:
        Of `POOL_SCHEMA`: by query, source, rank and document id; `human` last but for random documents.
    """
    frames = [frame.with_columns(pl.lit(name).alias("source")) for name, frame in parts.items()]
    if human is not None:
        frames.append(
            human.select(
                "query_id",
                "doc_id",
                pl.lit(None, pl.Int32).alias("rank"),
                pl.lit(None, pl.Float64).alias("score"),
                pl.lit(HUMAN).alias("source"),
            )
        )
    columns = [f.name for f in POOL_SCHEMA]
    empty = pl.DataFrame(schema={**HIT_SCHEMA, "source": pl.String})
    pool = pl.concat([f.select(columns) for f in frames] or [empty.select(columns)])
    kept = found(pool, depths).select("query_id", "doc_id").unique()
    if budget is not None:
        fused = fuse(found(pool, depths), fusion, list(parts))
        kept = fused.filter(pl.col("place") <= budget).select("query_id", "doc_id")
    if human is not None:
        kept = pl.concat([kept, human.select("query_id", "doc_id")]).unique()
    pool = pool.join(kept, on=["query_id", "doc_id"], how="semi")
    return in_order(pool, queries, [*parts, HUMAN])


def in_order(pool: pl.DataFrame, queries: Sequence[str], sources: Sequence[str]) -> pl.DataFrame:
    """A pool by query, source, rank and document id."""
    place = pl.col("query_id").replace_strict({q: i for i, q in enumerate(queries)}, return_dtype=pl.Int64)
    turn = pl.col("source").replace_strict(
        {s: i for i, s in enumerate(dict.fromkeys([*sources, HUMAN, RANDOM]))}, return_dtype=pl.Int32
    )
    return pool.sort(place, turn, "rank", "doc_id", nulls_last=True)


def to_arrow(pool: pl.DataFrame) -> pa.Table:
    """A pool as a table of `POOL_SCHEMA`."""
    return pool.select([f.name for f in POOL_SCHEMA]).to_arrow().cast(POOL_SCHEMA)


def recalls(
    ranked: pl.DataFrame, positives: pl.DataFrame, queries: Sequence[str], cut_offs: Sequence[int]
) -> dict[int, list[float]]:
    """Share of each query's positives among its first k documents.

    Args:
        ranked: query_id, doc_id, rank.
        positives: query_id, doc_id.
        queries: Queries that have positives, in the order wanted.
        cut_offs: The k.

    Returns:
        By cut-off, one number a query; a query nothing was found for has 0.
    """
    held = ranked.join(positives.select("query_id", "doc_id"), on=["query_id", "doc_id"], how="semi")
    held = held.group_by("query_id", "doc_id").agg(pl.col("rank").min())
    total: dict[str, int] = dict(positives.group_by("query_id").len().iter_rows())
    by_query: dict[str, list[int]] = dict(held.group_by("query_id").agg("rank").iter_rows())
    return {k: [sum(r <= k for r in by_query.get(q, ())) / total[q] for q in queries] for k in cut_offs}


def overlap(pool: pl.DataFrame, sources: Sequence[str]) -> npt.NDArray[np.int64]:
    """How many candidates any two sources share.

    Args:
        pool: query_id, doc_id, source: within depth, each once.
        sources: Rows and columns.

    Returns:
        int64 (s, s): shared candidates; on the diagonal those of one source. Counts of several pools add up.
    """
    shared = np.zeros((len(sources), len(sources)), np.int64)
    pairs = [pool.filter(pl.col("source") == s).select("query_id", "doc_id") for s in sources]
    for i, mine in enumerate(pairs):
        for j in range(i, len(pairs)):
            both = mine.join(pairs[j], on=["query_id", "doc_id"], how="semi").height
            shared[i, j] = shared[j, i] = both
    return shared
