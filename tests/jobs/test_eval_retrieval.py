"""`tamis eval retrieval` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from pipelines import eval_retrieval
from pipelines.eval_retrieval import RetrievalEvalConfig
from schemas.errors import InputError, OutputError, TamisError
from tests.conftest import ROOT
from tests.models.tiny_encoder import PROMPTS, save_encoder

pytrec_eval = pytest.importorskip("pytrec_eval")
SAMPLE = ROOT / "examples" / "retrieval"
RUNS = {"given": str(SAMPLE / "bm25.run"), "reversed": str(SAMPLE / "reversed.run")}


def evaluate(out: Path, collection: Path | str = SAMPLE, *, dry_run: bool = False, **settings):
    settings = {"progress": "quiet", "draws": 200, **settings}
    config = RetrievalEvalConfig(collection=str(collection), output=str(out), **settings)
    return eval_retrieval.run(config, dry_run=dry_run)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("model"), prompts=PROMPTS)


@pytest.fixture(scope="module")
def done(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("eval") / "out"
    return out, evaluate(out, systems={"bm25": "bm25", "tiny": str(model)}, runs=RUNS, baseline="bm25")


def labels() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for file in sorted((SAMPLE / "qrels").glob("*.tsv")):
        for line in file.read_text().splitlines()[1:]:
            query, doc, grade = line.split("\t")
            found.setdefault(query, {})[doc] = int(grade)
    return {q: d for q, d in found.items() if max(d.values()) > 0}


def test_the_runs_written_out_score_the_same_with_pytrec_eval(done):
    out, result = done
    judged = labels()
    assert set(result.queries) == set(judged)
    names = {"ndcg_cut.10", "recip_rank", "map", "recall.100"}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, names)
    record = json.loads((out / "results.json").read_text())
    assert [s["name"] for s in record["systems"]] == ["bm25", "tiny", "given", "reversed"]
    for system in record["systems"]:
        with (out / system["settings"]["run"]).open() as file:
            theirs = evaluator.evaluate(pytrec_eval.parse_run(file))
        for ours, name in (("nDCG@10", "ndcg_cut_10"), ("AP", "map"), ("R@100", "recall_100")):
            mean = sum(theirs.get(q, {}).get(name, 0.0) for q in judged) / len(judged)
            assert system["measures"][ours]["mean"] == pytest.approx(mean, abs=1e-12)


def test_every_query_of_every_system_is_in_the_table(done):
    out, result = done
    table = pl.read_parquet(out / "per_query.parquet")
    assert table.height == len(result.queries) * len(result.systems) * len(result.measures)
    mean = table.filter((pl.col("system") == "given") & (pl.col("measure") == "nDCG@10"))["value"].mean()
    assert mean == pytest.approx(result.system("given").means["nDCG@10"].mean)


def test_systems_are_compared_by_pairs_and_the_page_says_by_which_rules(done):
    out, result = done
    x = result.comparisons["reversed", "given"]["nDCG@10"]
    assert x.bootstrap.difference.mean < 0
    record = result.record
    assert record["baseline"] == "bm25"
    assert len(record["comparisons"]) == 6
    assert "descending" in record["conventions"]["ties"]
    page = (out / "report.html").read_text()
    for said in record["conventions"].values():
        assert said.split(",")[0][:30] in page
    assert (out / "_SUCCESS").exists()


def test_again_costs_nothing_and_gives_the_same(done, model, monkeypatch):
    out, result = done
    monkeypatch.setattr(
        "pipelines.retrieval.dense.DenseRetriever.open", lambda *_: pytest.fail("asked again")
    )
    again = evaluate(out, systems={"bm25": "bm25", "tiny": str(model)}, runs=RUNS, baseline="bm25")
    assert again.record["systems"] == result.record["systems"]
    assert again.record["comparisons"] == result.record["comparisons"]


def test_a_shared_work_folder_serves_another_evaluation(done, model, tmp_path, monkeypatch):
    out, result = done
    monkeypatch.setattr("pipelines.embed.run", lambda *_: pytest.fail("embedded again"))
    more = evaluate(tmp_path / "b", systems={"t": str(model)}, work=str(out / "_tamis/cache/work"))
    assert more.system("t").means == result.system("tiny").means


def test_an_index_is_searched_where_it_is_asked_for(model, tmp_path, done):
    pytest.importorskip("faiss")
    _, result = done
    by_index = evaluate(tmp_path / "o", systems={"tiny": str(model)}, index="flat")
    assert by_index.record["systems"][0]["settings"]["search"] == "Flat"
    assert by_index.system("tiny").values == result.system("tiny").values


def test_prompts_of_the_model_make_a_difference(model, tmp_path, done):
    _, result = done
    settings = result.record["systems"][1]["settings"]
    assert settings["query_prompt"] == PROMPTS["query"]
    assert settings["prompt"] == PROMPTS["passage"]
    none = evaluate(
        tmp_path / "o", systems={"tiny": str(model)}, dense_options={"prefix": "", "query_prefix": ""}
    )
    assert none.record["systems"][0]["settings"]["query_prompt"] == ""


def test_rankings_alone_need_no_documents(tmp_path):
    qrels = tmp_path / "q.qrels"
    rows = [f"{q} 0 {d} {g}" for q, docs in labels().items() for d, g in docs.items()]
    qrels.write_text("\n".join(rows))
    result = evaluate(tmp_path / "o", qrels, runs=RUNS)
    assert result.system("given").means["nDCG@10"].mean > result.system("reversed").means["nDCG@10"].mean


def test_the_query_itself_is_left_out_unless_kept(tmp_path):
    (tmp_path / "q.qrels").write_text("x 0 y 1\n")
    (tmp_path / "a.run").write_text("x Q0 x 1 9.0 a\nx Q0 y 2 1.0 a\n")
    run = {"a": str(tmp_path / "a.run")}
    assert evaluate(tmp_path / "o", tmp_path / "q.qrels", runs=run).system("a").means["RR@10"].mean == 1.0
    kept = evaluate(tmp_path / "k", tmp_path / "q.qrels", runs=run, keep_self=True)
    assert kept.system("a").means["RR@10"].mean == 0.5
    assert kept.record["conventions"]["self_match"] == "kept"


def test_a_document_named_twice_counts_once_at_its_better_rank(tmp_path):
    (tmp_path / "q.qrels").write_text("x 0 y 1\n")
    (tmp_path / "a.run").write_text("x Q0 y 1 9.0 a\nx Q0 z 2 8.0 a\nx Q0 y 3 1.0 a\n")
    result = evaluate(tmp_path / "o", tmp_path / "q.qrels", runs={"a": str(tmp_path / "a.run")})
    assert result.system("a").means["RR@10"].mean == 1.0
    assert (tmp_path / "o" / "runs" / "a.run").read_text() == "x Q0 y 1 9.0 a\nx Q0 z 2 8.0 a\n"


def test_a_model_with_a_manifest_is_no_embedded_corpus(tmp_path):
    from pipelines.retrieval.dense import is_embedded

    (tmp_path / "manifest.json").write_text("{}")
    assert is_embedded(str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    assert not is_embedded(str(tmp_path))
    assert not is_embedded("hf:org/name")


def test_denominators(tmp_path):
    (tmp_path / "q.qrels").write_text("x 0 y 1\nz 0 y 1\nn 0 y 0\n")
    (tmp_path / "a.run").write_text("x Q0 y 1 9.0 a\n")
    run = {"a": str(tmp_path / "a.run")}
    judged = evaluate(tmp_path / "o", tmp_path / "q.qrels", runs=run)
    assert judged.system("a").means["RR@10"].mean == 0.5
    assert any("no positive label" in n for n in judged.record["notes"])
    assert any("no document for 1" in n for n in judged.record["notes"])
    answered = evaluate(tmp_path / "p", tmp_path / "q.qrels", runs=run, denominator="answered")
    assert answered.system("a").means["RR@10"].mean == 1.0


def test_what_cannot_be_is_said_in_one_line(tmp_path):
    with pytest.raises(TamisError, match="nothing to evaluate"):
        evaluate(tmp_path / "o")
    with pytest.raises(TamisError, match="--baseline 'x' is no system"):
        evaluate(tmp_path / "o", runs=RUNS, baseline="x")
    with pytest.raises(InputError, match="no measure"):
        evaluate(tmp_path / "o", runs=RUNS, measures=("nope",))
    with pytest.raises(InputError, match="no qrels of split"):
        evaluate(tmp_path / "o", runs=RUNS, splits=("nowhere",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        evaluate(tmp_path / "full", runs=RUNS)


def test_the_command_line_plans_and_runs(tmp_path):
    from pipelines.cli import app

    words = [
        "eval",
        "retrieval",
        str(SAMPLE),
        "--system",
        "bm25",
        "--run",
        RUNS["reversed"],
        "--draws",
        "200",
    ]
    planned = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "o"), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "planned: 6 queries, bm25 (bm25), reversed (run)" in planned.output
    assert not (tmp_path / "o").exists()
    ran = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "o"), "--progress", "quiet"])
    assert ran.exit_code == 0, ran.output
    assert "reversed - bm25: nDCG@10 -" in ran.output


def test_settings_of_one_bm25_beside_another(tmp_path):
    pytest.importorskip("Stemmer")
    systems = eval_retrieval.parse_systems(["plain=bm25", "bm25:stemmer=english,k1=1.2"])
    assert systems == {"plain": "bm25", "bm25:stemmer=english,k1=1.2": "bm25:stemmer=english,k1=1.2"}
    result = evaluate(tmp_path / "o", systems=systems)
    assert [s["settings"]["stemmer"] for s in result.record["systems"]] == ["none", "english"]
    assert (tmp_path / "o" / "runs" / "bm25-stemmer-english-k1-1.2.run").exists()
    with pytest.raises(TamisError, match="no setting 'stem'"):
        evaluate(tmp_path / "p", systems={"x": "bm25:stem=english"})


def test_a_store_that_is_no_disk(tmp_path):
    import uuid

    place = f"memory://{uuid.uuid4().hex}"
    result = evaluate(place, systems={"bm25": "bm25"})
    assert (
        result.system("bm25").means == evaluate(tmp_path / "o", systems={"bm25": "bm25"}).system("bm25").means
    )


@pytest.mark.models
def test_the_embedded_encoder_ranks_what_people_found_relevant_first(tmp_path):
    result = evaluate(tmp_path / "o", systems={"bm25": "bm25", "minilm": "minilm"})
    assert result.system("minilm").means["nDCG@10"].mean > 0.9
    assert result.system("minilm").answered == len(result.queries)
    assert result.record["models"]["minilm"]["revision"]
