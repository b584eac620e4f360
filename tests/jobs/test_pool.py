"""`tamis pool` as a user runs it: several retrievers, one pool, every candidate with its sources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipelines import groups, pool
from pipelines.embed import EmbedConfig
from pipelines.embed import run as embed
from pipelines.groups import GroupsConfig
from pipelines.pool import PoolConfig
from pipelines.run import RunSettings
from pipelines.verify import verify_output
from schemas.errors import InputError, OutputError, TamisError
from schemas.pools import POOL_SCHEMA, check_pool
from tests.conftest import ROOT
from tests.helpers import files_below
from tests.models.tiny_classifier import WORDS
from tests.models.tiny_encoder import PROMPTS, save_encoder
from transforms.retrieval import formats

SAMPLE = ROOT / "examples" / "retrieval"
RUN = str(SAMPLE / "bm25.run")


def make(out: Path, collection: Path | str | None = SAMPLE, *, dry_run: bool = False, **settings):
    settings = {"progress": "quiet", "depth": {"": 4}, **settings}
    given = None if collection is None else str(collection)
    return pool.run(PoolConfig(collection=given, output=str(out), **settings), dry_run=dry_run)


def read(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(f) for f in sorted((out / "data").glob("*.parquet"))])


def rows(out: Path, query: str, source: str) -> list[tuple[str, int | None]]:
    mine = read(out).filter((pl.col("query_id") == query) & (pl.col("source") == source))
    return mine.select("doc_id", "rank").rows()


def write(
    folder: Path, docs: list[dict], queries: list[dict], qrels: list[tuple[str, str, int]] = ()
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, r)) for r in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("model"), prompts=PROMPTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A pool of BM25, a tiny encoder by name, a ranking, people's positives and random documents."""
    out = tmp_path_factory.mktemp("pool") / "out"
    result = make(out, dense={"tiny": str(model)}, runs={"given": RUN}, human=True, random=2)
    return out, result


def test_every_candidate_has_all_its_sources(made):
    out, result = made
    table = read(out)
    assert pq.read_schema(next((out / "data").glob("*.parquet"))).equals(POOL_SCHEMA)
    check_pool(table.to_arrow().cast(POOL_SCHEMA))
    assert set(table["source"]) == {"bm25", "tiny", "given", "human", "random"}
    assert rows(out, "q1", "given")[:4] == [("bread-1", 1), ("bread-3", 2), ("bread-4", 3), ("bread-2", 4)]
    assert set(rows(out, "q1", "human")) == {("bread-1", None), ("bread-3", None)}
    assert result.manifest["totals"]["candidates"] == table.select("query_id", "doc_id").n_unique()
    drawn = table.filter(pl.col("source") == "random")
    others = table.filter(pl.col("source") != "random")
    assert drawn.group_by("query_id").len()["len"].unique().to_list() == [2]
    assert drawn.join(others, on=["query_id", "doc_id"], how="semi").height == 0


def test_what_people_judged_good_has_its_place_in_every_retriever(made):
    """Margins of hard-negative mining are read against the scores positives have in the same source."""
    out, _ = made
    table = read(out)
    human = table.filter(pl.col("source") == "human").select("query_id", "doc_id")
    tiny = table.filter(pl.col("source") == "tiny").join(human, on=["query_id", "doc_id"], how="semi")
    assert tiny.height == human.height  # whatever its rank
    assert tiny["score"].null_count() == 0
    whole = make(out.parent / "whole", depth={"": 12})
    everything = read(Path(whole.output)).select("query_id", "doc_id", "rank", "score")
    mine = table.filter(pl.col("source") == "bm25").join(human, on=["query_id", "doc_id"], how="semi")
    same = mine.join(everything, on=["query_id", "doc_id"])
    assert same.height == mine.height
    assert (same["rank"] == same["rank_right"]).all()


def test_a_label_job_and_groups_read_it_as_it_stands(made, tmp_path):
    out, _ = made
    data, kind = formats.read(str(out))
    assert kind == "tamis"
    assert data.pool.num_rows == read(out).height
    assert data.queries["text"].null_count == 0
    assert data.documents is not None
    ids = {d for batch in data.documents() for d in batch.column("doc_id").to_pylist()}
    assert ids == set(read(out)["doc_id"])
    config = GroupsConfig(
        judgments=(str(SAMPLE),),
        pools=(str(out),),
        output=str(tmp_path / "g"),
        sources=("tiny",),
        relative_margin=0.0,
    )
    assert groups.run(config).manifest["totals"]["groups"] > 0


def test_a_second_run_changes_nothing_and_other_settings_are_refused(made, model):
    out, _ = made
    before = files_below(out)
    same = {"dense": {"tiny": str(model)}, "runs": {"given": RUN}, "human": True, "random": 2}
    assert make(out, **same).state == "already finished"
    assert files_below(out) == before
    with pytest.raises(OutputError, match="--overwrite"):
        make(out, **{**same, "random": 3})
    assert verify_output(str(out)).problems == []


def test_a_killed_run_goes_on_and_asks_nothing_twice(made, model, tmp_path, monkeypatch):
    out, _ = made
    again = tmp_path / "again"
    shutil.copytree(out, again)
    for name in ("_SUCCESS", "manifest.json", "report.html"):
        (again / name).unlink()
    shutil.rmtree(again / "data")
    monkeypatch.setattr(
        "pipelines.retrieval.dense.DenseRetriever.open", lambda *_: pytest.fail("asked again")
    )
    same = {"dense": {"tiny": str(model)}, "runs": {"given": RUN}, "human": True, "random": 2}
    result = make(again, **same)
    assert result.state == "finished"
    assert read(again).equals(read(out))
    first = json.loads((out / "manifest.json").read_text())
    assert result.manifest["sources"] == first["sources"]
    assert result.manifest["recall"] == first["recall"]


KILLED = """
import sys, time
from pipelines import pool
from pipelines.pool import PoolConfig
from pipelines.retrieval.retrievers import BM25Retriever

BM25Retriever.block = 1
search = BM25Retriever.search
def slow(self, ask):
    time.sleep(0.5)
    return search(self, ask)
BM25Retriever.search = slow
pool.run(PoolConfig(collection=sys.argv[1], output=sys.argv[2], progress="quiet", depth={"": 4}))
"""


def test_a_run_killed_in_the_middle_asks_only_for_the_rest(tmp_path, monkeypatch):
    from pipelines.retrieval.retrievers import BM25Retriever

    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(SAMPLE), str(out)], cwd=ROOT)
    try:
        until = time.monotonic() + 120
        while len(list((out / "_tamis").rglob("hits/bm25-*/*.parquet"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    answered = len(list((out / "_tamis").rglob("hits/bm25-*/*.parquet")))
    assert 2 <= answered < 7
    assert not (out / "_SUCCESS").exists()
    asked: list[str] = []
    search = BM25Retriever.search

    def counted(self, ask):
        asked.extend(ask.ids)
        return search(self, ask)

    monkeypatch.setattr(BM25Retriever, "block", 1)
    monkeypatch.setattr(BM25Retriever, "search", counted)
    monkeypatch.setattr(
        "pipelines.retrieval.corpus.IndexBuilder.save", lambda *_: pytest.fail("indexed again")
    )
    assert make(out).state == "finished"
    assert len(asked) == 7 - answered
    monkeypatch.undo()
    make(tmp_path / "whole")
    assert read(out).equals(read(tmp_path / "whole"))


def test_any_number_of_shards_in_and_out_gives_the_same_pool(tmp_path, model):
    docs = [
        {"_id": f"d{i}", "text": " ".join(WORDS[5 + (i * 7 + j) % 20] for j in range(4))} for i in range(40)
    ]
    docs += [{"_id": f"c{i}", "text": docs[i]["text"]} for i in range(10)]  # ties
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    (tmp_path / "one" / "a.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for i in range(5):
        (tmp_path / "many" / f"{i}.jsonl").write_text("\n".join(map(json.dumps, docs[i::5])))
    queries = tmp_path / "q.jsonl"
    lines = [json.dumps({"_id": f"q{i}", "text": docs[i]["text"]}) for i in range(7)]
    queries.write_text("\n".join(lines))
    common = {"queries": str(queries), "dense": {"tiny": str(model)}, "random": 2, "depth": {"": 6}}
    make(tmp_path / "p1", None, corpus=str(tmp_path / "one"), **common)
    make(tmp_path / "p2", None, corpus=str(tmp_path / "many"), queries_per_shard=3, **common)
    assert len(list((tmp_path / "p2" / "data").glob("*.parquet"))) == 3
    assert read(tmp_path / "p1").equals(read(tmp_path / "p2"))


# ------------------------------------------------------------------------------------------------------ odd collections


def test_an_embedded_corpus_is_searched_by_its_index_or_vector_by_vector(tmp_path, model):
    pytest.importorskip("faiss")
    docs = [{"_id": f"d{i}", "text": f"{WORDS[5 + i % 20]} {WORDS[6 + i % 13]}"} for i in range(30)]
    place = write(tmp_path / "c", docs, [{"_id": "q", "text": docs[3]["text"]}], [("q", "d29", 1)])
    config = EmbedConfig(
        input=str(place / "corpus.jsonl"), output=str(tmp_path / "v"), encoder=str(model), id_column="_id",
        index={"kind": "flat"},
    )  # fmt: skip
    embed(config, RunSettings(progress="quiet"))
    common = {"dense": {"v": str(tmp_path / "v")}, "bm25": False, "human": True}
    by_index = make(tmp_path / "i", place, **common)
    exact = make(tmp_path / "e", place, exact=True, **common)
    assert [r.manifest["sources"][0]["search"] for r in (by_index, exact)] == ["Flat", "exact"]
    one, other = (read(p).filter(pl.col("source") == "v") for p in (tmp_path / "i", tmp_path / "e"))
    assert one["doc_id"].to_list()[:4] == other["doc_id"].to_list()[:4]
    behind = {
        p: read(p).filter((pl.col("source") == "v") & (pl.col("doc_id") == "d29"))
        for p in (tmp_path / "i", tmp_path / "e")
    }
    (approximate,), (whole,) = (f.rows(named=True) for f in behind.values())
    assert approximate["score"] == pytest.approx(whole["score"], abs=1e-5)
    assert whole["rank"] is not None


def test_blank_texts_repeated_ids_and_the_query_itself(tmp_path, model):
    docs = [
        {"_id": "a", "text": "nice garden"},
        {"_id": "a", "text": "another text under the same id"},
        {"_id": "b", "text": ""},
        {"_id": "c", "text": "nice garden"},
        {"_id": "q", "text": "nice garden"},
    ]
    queries = [{"_id": "q", "text": "nice garden"}, {"_id": "r", "text": " "}, {"_id": "s", "text": "zzzz"}]
    place = write(tmp_path / "c", docs, queries, [("q", "b", 1), ("q", "gone", 1)])
    result = make(tmp_path / "o", place, dense={"tiny": str(model)}, human=True, documents="all")
    m = result.manifest
    assert m["corpus"]["documents"] == 4
    assert [m["corpus"][k] for k in ("empty", "repeated_ids", "repeated_texts")] == [1, 1, 2]
    assert rows(tmp_path / "o", "q", "bm25") == [("a", 1), ("c", 2)]  # not q, not the second a
    assert rows(tmp_path / "o", "q", "human") == [("b", None)]
    assert rows(tmp_path / "o", "s", "bm25") == []  # no word of it is known
    assert m["totals"]["queries_without_text"] == 1
    dropped = pl.read_parquet(tmp_path / "o" / "dropped" / "queries.parquet")
    assert dropped.rows() == [("r", "no_text")]
    assert any("1 documents people judged good are not in the corpus" in n for n in m["notes"])
    kept = make(tmp_path / "k", place, keep_self=True)
    assert rows(Path(kept.output), "q", "bm25") == [("a", 1), ("c", 2), ("q", 3)]


def test_a_zip_is_read_as_it_stands(tmp_path):
    for name, root in (("flat", SAMPLE), ("nested", tmp_path / "up")):
        if name == "nested":
            shutil.copytree(SAMPLE, root / "inner")
        shutil.make_archive(str(tmp_path / name), "zip", root)
        make(tmp_path / f"{name}-out", tmp_path / f"{name}.zip")
    make(tmp_path / "plain")
    assert read(tmp_path / "flat-out").equals(read(tmp_path / "plain"))
    assert read(tmp_path / "nested-out").equals(read(tmp_path / "plain"))


def test_queries_are_chosen_by_split_and_drawn_by_id(tmp_path):
    by_split = make(tmp_path / "s", splits=("test",), dry_run=True)
    assert by_split.manifest["totals"]["queries"] == 2
    make(tmp_path / "d", sample_queries=3, seed=1)
    three = set(read(tmp_path / "d")["query_id"])
    make(tmp_path / "e", sample_queries=4, seed=1)
    assert three < set(read(tmp_path / "e")["query_id"])


def test_figures_are_recall_of_what_people_judged_good(tmp_path):
    result = make(tmp_path / "o", runs={"given": RUN}, depth={"": 2}, bm25=False)
    recall = result.manifest["recall"]
    table = read(tmp_path / "o").filter(pl.col("rank") <= 2)
    judged = [(r["query-id"], r["corpus-id"]) for f in sorted((SAMPLE / "qrels").glob("*.tsv"))
              for r in pl.read_csv(f, separator="\t").rows(named=True) if r["score"] > 0]  # fmt: skip
    shares = []
    for query in {q for q, _ in judged}:
        good = {d for q, d in judged if q == query}
        shares.append(len(good & set(table.filter(pl.col("query_id") == query)["doc_id"])) / len(good))
    assert recall["systems"]["given"]["2"]["mean"] == pytest.approx(sum(shares) / len(shares))
    page = (tmp_path / "o" / "report.html").read_text()
    assert f"{100 * sum(shares) / len(shares):.1f} % of what people judged good" in page
    assert "why does sourdough rise" in page
    assert "bread-1 (given 1, judged good)" in page
    assert "(query, document) pairs" in (tmp_path / "o" / "README.md").read_text()


def test_a_store_that_is_no_disk(tmp_path):
    import uuid

    import fsspec

    place = f"memory://{uuid.uuid4().hex}"
    result = pool.run(PoolConfig(collection=str(SAMPLE), output=place, progress="quiet", depth={"": 4}))
    make(tmp_path / "o")
    with fsspec.open(f"{place}/data/part-00000.parquet") as file:
        assert pl.read_parquet(file).equals(read(tmp_path / "o"))
    assert result.state == "finished"


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_dry_run_writes_nothing(tmp_path, model):
    planned = make(tmp_path / "o", dense={"tiny": str(model)}, dry_run=True)
    assert planned.state == "planned"
    assert [s["name"] for s in planned.manifest["sources"]] == ["bm25", "tiny"]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bm25": False}, "nothing to pool"),
        ({"runs": {"bm25": RUN}}, "two sources are called 'bm25'"),
        ({"runs": {"human": RUN}}, "two sources are called 'human'"),
        ({"depth": {"minilm": 3}}, "--depth minilm: no such source"),
        ({"fusion": "magic"}, "--fuse 'magic'"),
        ({"documents": "some"}, "--documents 'some'"),
        ({"dense_options": {"pool": "cls"}}, "no setting 'pool'"),
        ({"text": "{body}"}, "--text names 'body'"),
        ({"k1": -1.0}, "--k1 -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(tmp_path, settings, said):
    with pytest.raises(TamisError, match=said):
        make(tmp_path / "o", **settings)
    assert not (tmp_path / "o").exists()


def test_rankings_and_vectors_of_another_corpus_are_refused(tmp_path, model):
    (tmp_path / "other.run").write_text("q1 Q0 elsewhere 1 2.0 x\n")
    with pytest.raises(InputError, match="none of its documents"):
        make(tmp_path / "o", runs={"x": str(tmp_path / "other.run")})
    config = EmbedConfig(input=str(SAMPLE / "corpus.jsonl"), output=str(tmp_path / "v"), encoder=str(model))
    embed(config, RunSettings(progress="quiet"))  # rows are called corpus.jsonl#0 ...
    with pytest.raises(InputError, match="--id-column"):
        make(tmp_path / "p", dense={"v": str(tmp_path / "v")})


def test_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from pipelines.cli import app

    words = [
        "pool",
        str(SAMPLE),
        "--depth",
        "4",
        "--depth",
        "given=2",
        "--run",
        f"given={RUN}",
        "-o",
        str(tmp_path / "o"),
    ]
    ran = CliRunner().invoke(app, [*words, "--progress", "quiet"])
    assert ran.exit_code == 0, ran.output
    assert "finished:" in ran.output
    assert "given" in ran.output
    assert read(tmp_path / "o").filter(pl.col("source") == "given")["rank"].max() == 2
