"""Nearest documents of query vectors by looking at every vector of an embedded corpus, exactly and in one order.

Float32 products differ in their last bit with the shape of the matrices they are part of, so documents of equal text could
change places from one sharding to another. Here a float32 product only rules out what is clearly behind; what is left is
scored again in float64, rounded, and equal scores are ordered by document id. One pass over the vectors answers all
queries of a call; held are the best k of each, and one block of vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transforms.embed.exact import Metric, check_dimension, prepare, similarities
from transforms.embed.vectors import Block, FloatArray, IntArray, VectorShards

Doubles = npt.NDArray[np.float64]

DIGITS = 7  # of a score: far above what float64 sums of thousands of products lose, far below what tells documents apart
_SLACK = 3e-5  # of |q||d|: more than float32 sums of products lose
_BLOCK = 16_384  # vectors compared at once


@dataclass(frozen=True)
class Nearest:
    """What was found for q queries.

    Attributes:
        numbers: (q, k) int64: document numbers, best first, -1 behind the last.
        scores: (q, k) float64: cosine, inner product, or minus the squared distance.
        watched: For each query, rank (1 = best) and score of the documents that were watched and have a vector.
    """

    numbers: IntArray
    scores: Doubles
    watched: list[dict[int, tuple[int, float]]]


class Vectors:
    """The vectors of an output as a retriever sees them: each row under the number of its document.

    Args:
        shards: An output of `tamis embed`.
        numbers: int64 by vector of the output: its document's number, -1 where the document is not looked for.
        order: int64 by document number: its place among equals (of its id).
        metric: How vectors are compared.
    """

    def __init__(self, shards: VectorShards, numbers: IntArray, order: IntArray, metric: Metric) -> None:
        self.shards, self.order, self.metric = shards, order, metric
        self.numbers = numbers.copy()
        known = np.flatnonzero(numbers >= 0)
        _, first = np.unique(numbers[known], return_index=True)
        again = np.ones(len(known), bool)
        again[first] = False
        self.numbers[known[again]] = -1  # a second row of one id
        self._place = np.full(len(order), -1, np.int64)
        here = np.flatnonzero(self.numbers >= 0)
        self._place[self.numbers[here]] = here

    def search(
        self,
        queries: FloatArray,
        k: int,
        *,
        watched: Sequence[Sequence[int]] | None = None,
        without: IntArray | None = None,
    ) -> Nearest:
        """The k nearest documents of each query.

        Args:
            queries: float32 (q, dimension).
            k: How many at most.
            watched: For each query, numbers of documents whose place is wanted wherever it is.
            without: int64 (q,): a document that is not looked at (the query itself); -1 for none.
        """
        check_dimension(queries, self.shards.dimension)
        queries = prepare(queries, self.metric)
        best = _Best(len(queries), k)
        marks = self._marks(queries, watched) if watched else None
        lengths = np.linalg.norm(queries, axis=1)
        for numbers, vectors in self._blocks():
            rough = similarities(queries, vectors, self.metric)
            slack = _SLACK * (1 + lengths * float(np.linalg.norm(vectors, axis=1).max(initial=0)))
            if self.metric == "l2":
                slack = slack + _SLACK * (lengths**2 + float((vectors**2).sum(axis=1).max(initial=0)))
            if without is not None:
                place = np.searchsorted(numbers, without)
                place[place == len(numbers)] = 0
                mine = np.flatnonzero((without >= 0) & (numbers[place] == without))
                rough[mine, place[mine]] = -np.inf
            for row in range(len(queries)):
                self._offer(best, row, queries[row], rough[row], float(slack[row]), numbers, vectors)
                if marks is not None and marks[row].numbers.size:
                    marks[row].count(
                        self, queries[row], rough[row], float(slack[row]), numbers, vectors, self.order
                    )
        found = [m.places() for m in marks] if marks is not None else [{} for _ in range(len(queries))]
        return Nearest(best.numbers, best.scores, found)

    def score(self, query: FloatArray, vectors: FloatArray) -> Doubles:
        """Scores of prepared vectors, the same bits in any company: float64 (n,)."""
        q, v = query.astype(np.float64), vectors.astype(np.float64)
        if self.metric == "l2":
            return np.round(-np.einsum("ij,ij->i", v - q, v - q), DIGITS)
        return np.round(np.einsum("ij,j->i", v, q), DIGITS)

    def scores_of(self, queries: FloatArray, watched: Sequence[Sequence[int]]) -> list[dict[int, float]]:
        """Scores alone of documents by number, for each query those that have a vector."""
        marks = self._marks(prepare(queries, self.metric), watched)
        return [dict(zip(m.numbers.tolist(), m.scores.tolist(), strict=True)) for m in marks]

    def _offer(
        self,
        best: _Best,
        row: int,
        query: FloatArray,
        rough: FloatArray,
        slack: float,
        numbers: IntArray,
        vectors: FloatArray,
    ) -> None:
        least = best.scores[row, -1]
        if np.isneginf(least) and len(rough) > best.k:
            least = np.partition(rough, len(rough) - best.k)[len(rough) - best.k]
        close = np.flatnonzero((rough >= least - slack) & (rough > -np.inf))
        if close.size:
            best.offer(row, self.score(query, vectors[close]), numbers[close], self.order)

    def _marks(self, queries: FloatArray, watched: Sequence[Sequence[int]]) -> list[_Marks]:
        """Scores of watched documents, by one look at the blocks they lie in."""
        wanted = np.unique(np.asarray([n for w in watched for n in w], np.int64))
        wanted = wanted[self._place[wanted] >= 0] if wanted.size else wanted
        places = self._place[wanted]
        vectors = np.zeros((len(wanted), self.shards.dimension), np.float32)
        order = np.argsort(places)
        for block, batch in self._read(places):
            low, high = np.searchsorted(places[order], [block.first, block.first + block.vectors])
            rows = order[low:high]
            vectors[rows] = prepare(batch[places[rows] - block.first], self.metric)
        marks = []
        for query, own in zip(queries, watched, strict=True):
            mine = np.asarray([n for n in dict.fromkeys(own) if self._place[n] >= 0], np.int64)
            at = np.searchsorted(wanted, mine)
            marks.append(_Marks(mine, self.score(query, vectors[at])))
        return marks

    def _read(self, places: IntArray) -> Iterator[tuple[Block, FloatArray]]:
        wanted = np.unique(places)
        blocks = [
            b
            for b, _, _ in self.shards.ids()
            if np.searchsorted(wanted, b.first) < np.searchsorted(wanted, b.first + b.vectors)
        ]
        for block, batch in self.shards.read(blocks):
            yield block, batch.vectors

    def _blocks(self) -> Iterator[tuple[IntArray, FloatArray]]:
        """Known vectors by the block, in the order of their numbers within it."""
        waiting: list[tuple[IntArray, FloatArray]] = []
        held = 0
        for batch, first in self._batches():
            numbers = self.numbers[first : first + len(batch)]
            keep = numbers >= 0
            waiting.append((numbers[keep], batch[keep] if not keep.all() else batch))
            held += len(waiting[-1][0])
            if held >= _BLOCK:
                yield self._one(waiting)
                waiting, held = [], 0
        if held:
            yield self._one(waiting)

    def _batches(self) -> Iterator[tuple[FloatArray, int]]:
        first = 0
        for batch in self.shards.batches():
            yield batch.vectors, first
            first += len(batch.vectors)

    def _one(self, parts: list[tuple[IntArray, FloatArray]]) -> tuple[IntArray, FloatArray]:
        numbers = np.concatenate([n for n, _ in parts])
        vectors = np.concatenate([v for _, v in parts])
        order = np.argsort(numbers)
        return numbers[order], prepare(vectors[order], self.metric)


class _Best:
    """The k best of each query, by score and then by the order of ids."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf)
        self.numbers = np.full((queries, k), -1, np.int64)

    def offer(self, row: int, scores: Doubles, numbers: IntArray, order: IntArray) -> None:
        held = self.numbers[row] >= 0
        scores = np.concatenate([self.scores[row][held], scores])
        numbers = np.concatenate([self.numbers[row][held], numbers])
        best = np.lexsort((order[numbers], -scores))[: self.k]
        self.scores[row, : len(best)], self.numbers[row, : len(best)] = scores[best], numbers[best]


class _Marks:
    """Watched documents of one query, and how many others are ahead of each."""

    def __init__(self, numbers: IntArray, scores: Doubles) -> None:
        self.numbers, self.scores = numbers, scores
        self.ahead = np.zeros(len(numbers), np.int64)

    def count(
        self,
        space: Vectors,
        query: FloatArray,
        rough: FloatArray,
        slack: float,
        numbers: IntArray,
        vectors: FloatArray,
        order: IntArray,
    ) -> None:
        by_score = np.argsort(rough, kind="stable")
        sorted_ = rough[by_score]
        low = np.searchsorted(sorted_, self.scores - slack, "left")
        high = np.searchsorted(sorted_, self.scores + slack, "right")
        self.ahead += len(rough) - high
        for i in np.flatnonzero(high > low).tolist():
            near = by_score[low[i] : high[i]]
            exact = space.score(query, vectors[near])
            tied = (exact == self.scores[i]) & (order[numbers[near]] < order[self.numbers[i]])
            self.ahead[i] += int(((exact > self.scores[i]) | tied).sum())

    def places(self) -> dict[int, tuple[int, float]]:
        return {
            int(n): (int(a) + 1, float(s))
            for n, a, s in zip(self.numbers, self.ahead, self.scores, strict=True)
        }
