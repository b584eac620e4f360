"""How much of what people judged good each retriever found, and all of them together, with intervals by query."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.metrics.bootstrap import DRAWS, mean_interval, paired_difference
from transforms.retrieval.candidates import found, fuse, overlap, recalls

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

FUSED, UNION = "fused", "union"
_CELLS = 20_000_000  # queries times draws: of a million queries 200 draws say enough
_CUTS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)


class Recalls:
    """Recall by retriever, of their fusion at the same depth, and of the pool.

    Args:
        depths: Depth by retriever.
        positives: query_id, doc_id judged good; those of documents that are not there count as not found.
        fusion: rrf or interleave.
    """

    def __init__(self, depths: Mapping[str, int], positives: pl.DataFrame, fusion: str) -> None:
        self.depths, self.positives, self.fusion = dict(depths), positives, fusion
        self.judged = set(positives["query_id"])
        deepest = max(depths.values(), default=0)
        self.cuts = sorted({k for k in _CUTS if k <= deepest} | set(depths.values()))
        self.at = 100 if 100 in self.cuts else deepest  # the cut-off figures are quoted at
        self.queries: list[str] = []
        self.found_in_all: list[int] = []
        self._values: dict[str, dict[int | None, array[float]]] = {}
        self._shared = np.zeros((len(depths), len(depths)), np.int64)

    def look(self, parts: Mapping[str, pl.DataFrame], pool: pl.DataFrame, ids: Sequence[str]) -> None:
        """Take a block of queries.

        Args:
            parts: By retriever: query_id, doc_id, rank, score.
            pool: What became of them.
            ids: The queries.
        """
        import polars as pl

        if not self.depths:
            return
        whole = pl.concat([p.with_columns(pl.lit(n).alias("source")) for n, p in parts.items()])
        whole = found(whole, self.depths)
        self._shared += overlap(whole, list(self.depths))
        mine = [q for q in ids if q in self.judged]
        if not mine:
            return
        self.queries += mine
        positives = self.positives.join(pl.DataFrame({"query_id": mine}), on="query_id", how="semi")
        for name, depth in self.depths.items():
            cuts = [k for k in self.cuts if k <= depth]
            self._add(name, recalls(whole.filter(pl.col("source") == name), positives, mine, cuts))
        if len(self.depths) > 1:
            fused = fuse(whole, self.fusion, list(self.depths)).rename({"place": "rank"})
            self._add(FUSED, recalls(fused, positives, mine, self.cuts))
            in_pool = pool.join(
                whole.select("query_id", "doc_id").unique(), on=["query_id", "doc_id"], how="semi"
            )
            every = in_pool.select("query_id", "doc_id", pl.lit(1, pl.Int32).alias("rank")).unique()
            self._add(UNION, {None: recalls(every, positives, mine, [1])[1]})
            sizes = dict(every.group_by("query_id").len().iter_rows())
            self.found_in_all += [sizes.get(q, 0) for q in mine]

    def record(self, seed: int = 0) -> dict[str, Any] | None:
        """Figures for the manifest; None where nobody judged anything."""
        if not self.queries:
            return None
        draws = max(200, min(DRAWS, _CELLS // len(self.queries)))
        systems = {
            name: {
                ("all" if k is None else str(k)): mean_interval(
                    np.asarray(v), seed=seed, draws=draws
                ).as_dict()
                for k, v in cuts.items()
            }
            for name, cuts in self._values.items()
        }
        against = {}
        for name, cuts in self._values.items():
            at = min(self.at, self.depths.get(name, 0))  # as many documents of both
            for other in (FUSED, UNION):
                theirs = self._values.get(other, {}).get(at if other == FUSED else None)
                own = cuts.get(at)
                if theirs is not None and own is not None:
                    against[f"{other} - {name}"] = paired_difference(
                        np.asarray(theirs), np.asarray(own), seed=seed, draws=draws
                    ).as_dict()
        return {
            "queries": len(self.queries),
            "positives": self.positives.height,
            "at": self.at,
            "fusion": self.fusion,
            "systems": systems,
            "differences": against,
            "candidates_in_union": sum(self.found_in_all) / len(self.found_in_all)
            if self.found_in_all
            else None,
        }

    def overlaps(self) -> dict[str, Any] | None:
        """Share of what the first source found that the second found too; None for fewer than two retrievers."""
        if len(self.depths) < 2:
            return None
        shares = [
            [int(n) / int(line[i]) if line[i] else None for n in line] for i, line in enumerate(self._shared)
        ]
        return {"sources": list(self.depths), "shared": shares}

    def table(self) -> pa.Table | None:
        """One row a query, system and cut-off (null: however deep); None where nobody judged anything."""
        if not self.queries:
            return None
        import pyarrow as pa

        columns: dict[str, list[Any]] = {"query_id": [], "system": [], "k": [], "recall": []}
        for name, cuts in self._values.items():
            for k, values in cuts.items():
                columns["query_id"] += self.queries
                columns["system"] += [name] * len(values)
                columns["k"] += [k] * len(values)
                columns["recall"] += values.tolist()
        types = (pa.string(), pa.string(), pa.int32(), pa.float64())
        return pa.table({n: pa.array(v, t) for (n, v), t in zip(columns.items(), types, strict=True)})

    def _add(self, name: str, values: Mapping[int | None, list[float]] | Mapping[int, list[float]]) -> None:
        held = self._values.setdefault(name, {})
        for k, numbers in values.items():
            held.setdefault(k, array("d")).extend(numbers)
