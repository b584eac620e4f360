"""`tamis pool` as a user runs it: several retrievers, one pool, every candidate with its sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipelines import groups, pool
from pipelines.groups import GroupsConfig
from pipelines.pool import PoolConfig
from pipelines.verify import verify_output
from schemas.errors import OutputError
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
        "pipelines.retrieval.retrievers.DenseRetriever.open", lambda *_: pytest.fail("asked again")
    )
    same = {"dense": {"tiny": str(model)}, "runs": {"given": RUN}, "human": True, "random": 2}
    result = make(again, **same)
    assert result.state == "finished"
    assert read(again).equals(read(out))
    first = json.loads((out / "manifest.json").read_text())
    assert result.manifest["sources"] == first["sources"]
    assert result.manifest["recall"] == first["recall"]


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
