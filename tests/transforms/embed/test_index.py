"""Indexes against the truth: FAISS parts, memory-mapped, say what looking at every vector says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import flight
from schemas.errors import OutputError, TamisError
from tests.helpers import run_plainly, write_parquet
from transforms.embed import build as builder
from transforms.embed.build import build_index
from transforms.embed.exact import TopK, exact_search, similarities
from transforms.embed.faiss_parts import IndexSpec
from transforms.embed.index import VectorIndex, metric_of
from transforms.embed.vectors import EMPTY, INFO_TYPE, OK, VectorShards, to_arrow
from transforms.shards.formats import UnitLimits

D, N = 16, 400


@dataclass(frozen=True)
class RandomVectors:
    """A vector made of the row's text, in clusters; every 50th row has none."""

    store: str = "float32"
    label: str = "RandomVectors"

    def setup(self, context) -> None: ...

    def __call__(self, batch, context):
        texts = [int(t) for t in batch.column("text").to_pylist()]
        vectors = np.array([vector_of(t) for t in texts], np.float32).reshape(-1, D)
        missing = np.array([t % 50 == 7 for t in texts], bool)
        values, scales = to_arrow(vectors, missing, self.store)
        status = pa.array([EMPTY if m else OK for m in missing], pa.string())
        zero = pa.array(np.zeros(len(texts), np.int32))
        norm = pa.array(np.zeros(len(texts), np.float32))
        info = pa.StructArray.from_arrays([status, zero, zero, norm], fields=list(INFO_TYPE))
        batch = flight.set_attribute(batch, "embedding", values)
        if scales is not None:
            batch = flight.set_attribute(batch, "embedding_scale", scales)
        return flight.set_attribute(batch, "embedding_info", info)


def vector_of(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    centre = np.random.default_rng(1_000_000 + number % 12).standard_normal(D)
    return 3 * centre + rng.standard_normal(D)


def make_output(folder: Path, *, shards: int = 2, store: str = "float32", unit_rows: int = 64) -> Path:
    """An output with embeddings, made by the engine's pure functions."""
    numbers = np.array_split(np.arange(N), shards)
    for i, part in enumerate(numbers):
        path = folder / "in" / f"{i:02d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"doc": [f"d{n}" for n in part], "text": [str(n) for n in part]}), path)
    run_plainly(
        folder / "in",
        folder / "out",
        (RandomVectors(store),),
        limits=UnitLimits(rows=unit_rows),
        id_column="doc",
    )
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    manifest["config"] = {"attribute": "embedding"}
    (folder / "out" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "out"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return make_output(tmp_path_factory.mktemp("vectors"))


QUERIES = np.random.default_rng(5).standard_normal((6, D)).astype(np.float32)


def brute(queries, metric, k):
    """The truth, in one line of NumPy over all vectors."""
    numbers = [n for n in range(N) if n % 50 != 7]
    vectors = np.array([vector_of(n) for n in numbers], np.float32)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    order = np.argsort(-similarities(queries, vectors, metric), axis=1, kind="stable")[:, :k]
    return [[f"d{numbers[i]}" for i in row] for row in order]


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_exact_search_finds_the_true_neighbours(output, metric):
    hits = exact_search(VectorShards(str(output)), QUERIES, 7, metric)
    assert hits.ids.tolist() == brute(QUERIES, metric, 7)
    assert (np.diff(hits.scores, axis=1) <= 0).all()


def test_ordinals_lead_back_to_rows(output):
    shards = VectorShards(str(output))
    hits = exact_search(shards, QUERIES, 3, "dot")
    places = shards.locate(hits.ordinals)
    for ordinal, id_ in zip(hits.ordinals.ravel().tolist(), hits.ids.ravel().tolist(), strict=True):
        place = places[ordinal]
        assert place.id == id_ == f"d{place.position + (200 if place.shard == '01.parquet' else 0)}"


def test_fewer_vectors_than_asked_for_leave_gaps(output):
    hits = exact_search(VectorShards(str(output)), QUERIES[:1], N, "dot")
    assert hits.ids[0, 391] != "" and hits.ids[0, 392] == "" and np.isneginf(hits.scores[0, 392])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 7))
def test_the_best_are_kept_in_whatever_portions_they_come(values, k, size):
    best = TopK(1, k)
    scores = np.array(values, np.float32)
    for at in range(0, len(scores), size):
        best.offer(scores[None, at : at + size], np.arange(at, min(at + size, len(scores))))
    order = np.argsort(-scores, kind="stable")[:k]
    assert best.ordinals[0, : len(order)].tolist() == order.tolist()


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_in_parts_says_what_exact_search_says(tmp_path, kind, metric):
    out = make_output(tmp_path)
    # Parts of two units, and so much looked at that nothing is missed.
    spec = IndexSpec(kind=kind, part_mb=1, recall=1.0, lists=4, queries=50)
    entry = build_index(str(out), spec, metric=metric)
    index = VectorIndex.open(str(out))
    probe = index.probes()[-1] if index.probes() else None
    hits = index.search(QUERIES, 7, probe)
    truth = exact_search(VectorShards(str(out)), QUERIES, 7, metric)
    assert hits.ids.tolist() == truth.ids.tolist()
    np.testing.assert_allclose(hits.scores, truth.scores, rtol=1e-4, atol=1e-4)
    assert entry["recall"]["value"] == 1.0 and entry["vectors"] == 392 and index.size == 392
    assert index.locate(hits.ordinals) == VectorShards(str(out)).locate(hits.ordinals)


def test_parts_are_searched_together(tmp_path, monkeypatch):
    out = make_output(tmp_path)
    monkeypatch.setattr(IndexSpec, "part_vectors", lambda self, dimension: 100)
    entry = build_index(str(out), IndexSpec(kind="ivf", lists=3, recall=1.0))
    assert [p["vectors"] for p in entry["parts"]] == [125, 117, 150] or len(entry["parts"]) >= 3
    assert sum(p["vectors"] for p in entry["parts"]) == 392
    hits = VectorIndex.open(str(out)).search(QUERIES, 9, probe=3)
    assert hits.ids.tolist() == brute(QUERIES, "cosine", 9)


@pytest.mark.parametrize(("codec", "least"), [("float16", 0.95), ("int8", 0.85)])
def test_a_smaller_codec_costs_a_little_recall_and_says_so(tmp_path, codec, least):
    out = make_output(tmp_path)
    entry = build_index(str(out), IndexSpec(kind="flat", codec=codec))
    assert least <= entry["recall"]["value"] <= 1.0
    assert entry["parts"][0]["bytes"] < 392 * D * 4 * (0.7 if codec == "float16" else 0.45)


def test_the_probe_is_the_least_that_reaches_the_recall(tmp_path):
    out = make_output(tmp_path)
    entry = build_index(str(out), IndexSpec(kind="ivf", lists=8, recall=0.9))
    tried = entry["recall"]["tried"]
    assert tried[-1]["recall"] >= 0.9 and all(step["recall"] < 0.9 for step in tried[:-1])
    assert entry["probe"] == tried[-1]["probe"]
    fixed = build_index(str(out), IndexSpec(kind="ivf", lists=8, probe=1))
    assert fixed["probe"] == 1 and len(fixed["recall"]["tried"]) == 1


def test_an_ivf_index_does_not_depend_on_how_the_corpus_is_cut(tmp_path):
    found = []
    for name, shards, rows in (("a", 1, 400), ("b", 5, 30)):
        out = make_output(tmp_path / name, shards=shards, unit_rows=rows)
        build_index(str(out), IndexSpec(kind="ivf", lists=8, probe=2))
        found.append(VectorIndex.open(str(out)).search(QUERIES, 8))
    assert found[0].ids.tolist() == found[1].ids.tolist()
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_int8_vectors_are_indexed_with_their_scales(tmp_path):
    out = make_output(tmp_path, store="int8")
    build_index(str(out), IndexSpec(kind="flat"), metric="dot")
    hits = VectorIndex.open(str(out)).search(QUERIES, 5)
    assert hits.ids.tolist() == exact_search(VectorShards(str(out)), QUERIES, 5, "dot").ids.tolist()
    assert (
        np.mean([len(set(a) & set(b)) / 5 for a, b in zip(hits.ids, brute(QUERIES, "dot", 5), strict=True)])
        > 0.8
    )


def test_a_killed_build_goes_on_where_it_was_and_readers_see_the_old_index(tmp_path, monkeypatch):
    out = make_output(tmp_path)
    monkeypatch.setattr(IndexSpec, "part_vectors", lambda self, dimension: 100)
    old = build_index(str(out), IndexSpec(kind="flat"))
    write, made = builder.faiss_parts.write, []

    def dies(index, path):
        if len(made) == 2:  # trained, and one part
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(path)
        write(index, path)

    monkeypatch.setattr(builder.faiss_parts, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        build_index(str(out), IndexSpec(kind="ivf", lists=4))
    assert VectorIndex.open(str(out)).entry == old
    assert not any(f.read_bytes() == b"half" for f in out.rglob("*") if f.is_file())
    again = []
    monkeypatch.setattr(builder.faiss_parts, "write", lambda i, p: (again.append(p), write(i, p)))
    entry = build_index(str(out), IndexSpec(kind="ivf", lists=4))
    assert len(again) == len(entry["parts"]) - 1  # neither training nor the first part again
    assert sorted(p.name for p in (out / "index").iterdir()) == [entry["folder"].split("/")[1]]
    assert (
        build_index(str(out), IndexSpec(kind="ivf", lists=4)) == entry
        and len(again) == len(entry["parts"]) - 1
    )


def test_what_cannot_be_searched_says_what_to_do(tmp_path, output):
    with pytest.raises(OutputError, match="has no index; run: tamis index"):
        VectorIndex.open(str(output))
    with pytest.raises(OutputError, match="not a finished tamis output"):
        VectorShards(str(tmp_path))
    write_parquet(tmp_path / "in" / "a.parquet", ["one"])
    run_plainly(tmp_path / "in", tmp_path / "plain", ())
    with pytest.raises(OutputError, match=r"no embedding 'embedding'.*run `tamis embed` first"):
        VectorShards(str(tmp_path / "plain"))
    with pytest.raises(TamisError, match="cannot be compared with vectors of 16"):
        exact_search(VectorShards(str(output)), np.zeros((1, 3), np.float32), 1, "dot")
    with pytest.raises(TamisError, match="neither flat, ivf, hnsw nor a FAISS factory string"):
        build_index(str(output), IndexSpec(kind="tree"))


def test_the_metric_is_the_models_own():
    manifest = {"models": [{"kind": "encoder", "extra": {"similarity": "euclidean"}}]}
    assert metric_of(manifest) == "l2" and metric_of(manifest, "dot") == "dot" and metric_of({}) == "cosine"
    with pytest.raises(TamisError, match="compares by manhattan"):
        metric_of({"models": [{"kind": "encoder", "extra": {"similarity": "manhattan"}}]})


def test_a_faiss_factory_string_is_taken(tmp_path):
    out = make_output(tmp_path)
    entry = build_index(str(out), IndexSpec(kind="IVF4,SQ8", recall=0.8))
    assert entry["factory"] == "IVF4,SQ8" and entry["folder"].startswith("index/factory-")
    assert VectorIndex.open(str(out)).search(QUERIES, 3).ids.shape == (6, 3)


def test_an_output_in_an_object_store_is_indexed_and_searched(output):
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(output), "/vectors", recursive=True)
    try:
        build_index("memory://vectors", IndexSpec(kind="ivf", lists=4))
        index = VectorIndex.open("memory://vectors")
        hits = index.search(QUERIES, 5, probe=4)
        assert hits.ids.tolist() == brute(QUERIES, "cosine", 5)
        assert index.locate(hits.ordinals[:1]) == VectorShards(str(output)).locate(hits.ordinals[:1])
        again = build_index("memory://vectors", IndexSpec(kind="ivf", lists=4))
        assert again == index.entry
    finally:
        store.rm("/vectors", recursive=True)
