"""Exact nearest neighbours: every vector is looked at, a block at a time, straight from the shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.errors import TamisError
from transforms.embed.vectors import FloatArray, IntArray, VectorShards

Metric = Literal["cosine", "dot", "l2"]
METRICS = ("cosine", "dot", "l2")


class Hits(NamedTuple):
    """The k nearest of each of q queries, best first; equal scores in the order of the output's rows.

    Attributes:
        ids: (q, k) row ids, "" behind the last hit where there are fewer than k vectors.
        scores: float32 (q, k): cosine, inner product, or minus the squared distance; -inf where there is no hit.
        ordinals: int64 (q, k): the vector's number among all vectors of the output, -1 where there is no hit.
    """

    ids: npt.NDArray[np.object_]
    scores: FloatArray
    ordinals: IntArray


class TopK:
    """Keeps the k best of what it is offered, for each of q queries.

    Args:
        queries: q.
        k: How many to keep.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf, np.float32)
        self.ordinals = np.full((queries, k), -1, np.int64)

    def offer(self, scores: FloatArray, ordinals: IntArray) -> None:
        """Offer candidates: scores (q, m) and their ordinals, (m,) or (q, m); -1 is nobody."""
        for row in range(len(scores)):
            numbers = ordinals if ordinals.ndim == 1 else ordinals[row]
            all_scores = np.concatenate([self.scores[row], scores[row]])
            all_ordinals = np.concatenate([self.ordinals[row], numbers])
            all_scores[all_ordinals < 0] = -np.inf
            if len(all_scores) > 2 * self.k:
                least = np.partition(all_scores, len(all_scores) - self.k)[len(all_scores) - self.k]
                good = np.flatnonzero(all_scores >= least)
            else:
                good = np.arange(len(all_scores))
            order = good[np.lexsort((all_ordinals[good], -all_scores[good]))][: self.k]
            self.scores[row], self.ordinals[row] = all_scores[order], all_ordinals[order]
        self.ordinals[np.isneginf(self.scores)] = -1


def prepare(vectors: FloatArray, metric: Metric) -> FloatArray:
    """Vectors as they are compared: float32, of unit length for cosine (null ones stay null)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "cosine":
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A unit vector is left as it is: divided again it would be another in its last bit.
    norms[(norms == 0) | (np.abs(norms - 1) < 1e-6)] = 1
    return (vectors / norms).astype(np.float32, copy=False)


def similarities(queries: FloatArray, vectors: FloatArray, metric: Metric) -> FloatArray:
    """Scores (q, n) of prepared vectors; higher is nearer."""
    scores = queries @ vectors.T
    if metric == "l2":
        scores = 2 * scores - (queries**2).sum(axis=1)[:, None] - (vectors**2).sum(axis=1)[None, :]
    return scores.astype(np.float32, copy=False)


def exact_search(shards: VectorShards, queries: FloatArray, k: int, metric: Metric) -> Hits:
    """The k nearest vectors of an output, by looking at all of them; memory does not grow with their number.

    Args:
        shards: An output's vectors.
        queries: float32 (q, dimension).
        k: Hits a query.
        metric: `cosine`, `dot` or `l2`.

    Raises:
        TamisError: The queries have another dimension.
    """
    check_dimension(queries, shards.dimension)
    queries = prepare(queries, metric)
    best = TopK(len(queries), k)
    names: dict[int, str] = {}
    for block, ids, present in shards.ids():
        if not block.vectors:
            continue
        (_, batch), *_ = shards.read([block])
        scores = similarities(queries, prepare(batch.vectors, metric), metric)
        best.offer(scores, block.first + np.arange(block.vectors))
        held = np.unique(best.ordinals)
        rows = np.flatnonzero(present)
        new = held[(held >= block.first) & (held < block.first + block.vectors)]
        names = {o: names[o] for o in held.tolist() if o in names}
        names |= {o: ids[int(rows[o - block.first])].as_py() for o in new.tolist()}
    return Hits(name_hits(best.ordinals, names), best.scores, best.ordinals)


def name_hits(ordinals: IntArray, names: dict[int, str]) -> npt.NDArray[np.object_]:
    """Ids in the shape of ordinals, "" for -1."""
    ids = np.full(ordinals.shape, "", object)
    for place, ordinal in np.ndenumerate(ordinals):
        if ordinal >= 0:
            ids[place] = names[int(ordinal)]
    return ids


def check_dimension(vectors: FloatArray | Sequence[Sequence[float]], dimension: int) -> None:
    """Refuse vectors of another space.

    Raises:
        TamisError: They have another dimension.
    """
    shape = np.shape(vectors)
    if len(shape) != 2 or shape[1] != dimension:
        raise TamisError(
            f"queries of shape {shape} cannot be compared with vectors of {dimension} dimensions"
        )
