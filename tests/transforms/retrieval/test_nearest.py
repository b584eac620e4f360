"""Exact nearest documents: the order numpy finds, whatever the blocks, with ties by document id."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.embed.exact import prepare
from transforms.embed.vectors import Block, VectorBatch
from transforms.retrieval import nearest
from transforms.retrieval.nearest import Vectors


class Shards:
    """Vectors in blocks, as `VectorShards` gives them."""

    def __init__(self, vectors: np.ndarray, size: int) -> None:
        self.vectors, self.size, self.dimension = vectors.astype(np.float32), size, vectors.shape[1]
        starts = range(0, len(vectors), size)
        self._blocks = [
            Block("a", i, s, min(size, len(vectors) - s), s, min(size, len(vectors) - s))
            for i, s in enumerate(starts)
        ]

    def ids(self):
        for b in self._blocks:
            yield b, pa.array([str(i) for i in range(b.first, b.first + b.rows)]), np.ones(b.rows, bool)

    def read(self, blocks):
        for b in blocks:
            yield b, VectorBatch("a", np.arange(b.rows), self.vectors[b.first : b.first + b.rows])

    def batches(self):
        for _, batch in self.read(self._blocks):
            yield batch


def brute(vectors, queries, order, metric):
    v, q = prepare(vectors, metric).astype(float), prepare(queries, metric).astype(float)
    scores = -((q[:, None] - v[None]) ** 2).sum(-1) if metric == "l2" else q @ v.T
    scores = np.round(scores, 7)
    return [np.lexsort((order, -s)) for s in scores], scores


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 60),
    block=st.integers(1, 70),
    metric=st.sampled_from(["cosine", "dot", "l2"]),
    k=st.integers(1, 12),
)
def test_finds_what_looking_at_all_finds(seed, size, block, metric, k):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (size, 3)).astype(np.float32) + 0.1  # small integers: many ties
    queries = rng.standard_normal((3, 3)).astype(np.float32)
    order = rng.permutation(size)
    held, nearest._BLOCK = nearest._BLOCK, block
    try:
        space = Vectors(Shards(vectors, block), np.arange(size), order, metric)
        found = space.search(queries, k, watched=[range(size)] * 3)
    finally:
        nearest._BLOCK = held
    best, scores = brute(vectors, queries, order, metric)
    for row in range(3):
        expected = best[row][:k].tolist()
        assert found.numbers[row][: len(expected)].tolist() == expected
        assert (found.numbers[row][len(expected) :] == -1).all()
        places = {int(n): r for r, n in enumerate(best[row], 1)}
        assert {n: r for n, (r, _) in found.watched[row].items()} == places
        assert [s for _, s in found.watched[row].values()] == pytest.approx(scores[row].tolist(), abs=2e-6)


def test_other_documents_second_rows_and_the_query_itself_are_left_out():
    vectors = np.eye(4, dtype=np.float32)
    space = Vectors(Shards(vectors, 2), np.array([0, -1, 0, 1]), np.array([0, 1]), "dot")
    found = space.search(np.ones((2, 4), np.float32), 3, without=np.array([1, -1]))
    assert found.numbers.tolist() == [[0, -1, -1], [0, 1, -1]]
    assert np.isneginf(found.scores[0, 1:]).all()


def test_equal_vectors_stay_in_the_order_of_ids_in_large_blocks():
    rng = np.random.default_rng(1)
    one = rng.standard_normal((1, 64)).astype(np.float32)
    vectors = np.repeat(one, 3001, axis=0)
    order = rng.permutation(3001)
    queries = rng.standard_normal((5, 64)).astype(np.float32)
    found = Vectors(Shards(vectors, 777), np.arange(3001), order, "cosine").search(queries, 50)
    for row in found.numbers:
        assert order[row].tolist() == list(range(50))
