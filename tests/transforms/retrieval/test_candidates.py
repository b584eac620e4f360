"""One pool of several lists: sources kept, budgets spent by fusion, recall of what was found."""

from __future__ import annotations

import polars as pl
import pytest

from transforms.retrieval.candidates import assemble, found, fuse, hits, overlap, recalls

A = hits([("q", "a", 1, 9.0), ("q", "b", 2, 8.0), ("q", "z", 7, 1.0)])  # z: known to be good, behind depth 2
B = hits([("q", "c", 1, 0.9), ("q", "a", 2, 0.8)])
DEPTHS = {"x": 2, "y": 2}
Z = pl.DataFrame({"query_id": ["q"], "doc_id": ["z"]})


def test_sources_of_a_document_all_stay():
    pool = assemble({"x": A, "y": B}, DEPTHS, ["q"], human=Z)
    assert pool.select("doc_id", "source", "rank").rows() == [
        ("a", "x", 1), ("b", "x", 2), ("z", "x", 7), ("c", "y", 1), ("a", "y", 2), ("z", "human", None),
    ]  # fmt: skip
    assert set(found(pool, DEPTHS)["doc_id"]) == {"a", "b", "c"}


def test_without_people_a_list_ends_at_its_depth():
    pool = assemble({"x": A, "y": B}, DEPTHS, ["q"])
    assert "z" not in pool["doc_id"].to_list()


def test_a_budget_keeps_the_best_of_all_and_never_cuts_people():
    pool = assemble({"x": A, "y": B}, DEPTHS, ["q"], human=Z, budget=1)
    assert pool.select("doc_id", "source").rows() == [("a", "x"), ("z", "x"), ("a", "y"), ("z", "human")]


def test_reciprocal_rank_fusion_by_hand():
    whole = pl.concat([A.with_columns(source=pl.lit("x")), B.with_columns(source=pl.lit("y"))])
    fused = fuse(found(whole, DEPTHS), "rrf", ["x", "y"])
    assert fused["doc_id"].to_list() == ["a", "c", "b"]
    assert fused["score"].to_list() == pytest.approx([1 / 61 + 1 / 62, 1 / 61, 1 / 62])
    assert fuse(found(whole, DEPTHS), "interleave", ["x", "y"])["doc_id"].to_list() == ["a", "c", "b"]
    assert fuse(found(whole, DEPTHS), "interleave", ["y", "x"])["doc_id"].to_list() == ["c", "a", "b"]


def test_recall_counts_what_was_not_found_and_queries_without_hits():
    positives = pl.DataFrame({"query_id": ["q", "q", "r"], "doc_id": ["a", "z", "a"]})
    assert recalls(A, positives, ["q", "r"], [1, 10]) == {1: [0.5, 0.0], 10: [1.0, 0.0]}


def test_overlap_counts_what_two_sources_share():
    whole = pl.concat([A.with_columns(source=pl.lit("x")), B.with_columns(source=pl.lit("y"))])
    assert overlap(whole, ["x", "y", "z"]).tolist() == [[3, 1, 0], [1, 2, 0], [0, 0, 0]]
