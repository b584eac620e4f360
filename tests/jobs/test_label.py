"""Labelling a pool, as a user does it: with a judge behind a server that counts what it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import registry
from models.lm.dummy_server import DummyOptions, DummyServer
from pipelines import label
from pipelines.cli import main
from pipelines.label_config import LabelConfig, default_method
from pipelines.run import RunSettings
from pipelines.verify import verify_output
from schemas.errors import InputError, ModelError, OutputError, TamisError
from schemas.judgments import READABLE, check_judgments
from tests.models.tiny_lm import save_tiny_lm
from transforms.retrieval import formats
from transforms.retrieval.labelling.texts import TextStore
from transforms.shards.files import Folder

QUIET = RunSettings(progress="quiet")
WORDS = ["bread", "river", "stone", "cloud", "apple", "table", "window", "garden", "paper", "music"]
QUERIES, DEPTH = 5, 6


def make_pool(folder: Path, *, files: int = 1, queries: int = QUERIES, mark: str = "") -> Path:
    """Queries of two words; of the documents of each, the first holds both, the second one, the others none."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, documents, asked = [], [], []
    for q in range(queries):
        first, second = WORDS[q % 10], WORDS[(q + 3) % 10]
        asked.append({"query_id": f"q{q}", "text": f"{first} {second}"})
        for d in range(DEPTH):
            held = {0: f"{first} and {second}", 1: f"only {first}"}.get(d, "nothing of the kind")
            number = q * DEPTH + d
            noisy = f" {mark}" if mark and number % 10 == 9 else ""
            documents.append(
                {"doc_id": f"d{q}-{d}", "title": f"Page {number}", "text": f"Here is {held}.{noisy}"}
            )
            rows.append(
                {
                    "query_id": f"q{q}",
                    "doc_id": f"d{q}-{d}",
                    "source": "bm25",
                    "rank": d + 1,
                    "score": 9.0 - d,
                }
            )
    step = -(-len(rows) // files)
    (folder / "pool").mkdir(exist_ok=True)
    for i in range(files):
        _lines(folder / "pool" / f"part-{i}.jsonl", rows[i * step : (i + 1) * step])
    _lines(folder / "corpus.jsonl", documents)
    _lines(folder / "queries.jsonl", asked)
    return folder


def _lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def make(pool: Path, out: Path, model: str, *, run: RunSettings = QUIET, **more):
    given = {
        "pools": (str(pool / "pool"),),
        "output": str(out),
        "corpus": str(pool / "corpus.jsonl"),
        "queries": str(pool / "queries.jsonl"),
        "model": model,
    }
    return label.run(LabelConfig(**{**given, **more}), run)


def read(out: Path, table: str = "data") -> pl.DataFrame:
    return pl.concat([pl.read_parquet(f) for f in sorted((out / table).glob("*.parquet"))])


def name_of(server: DummyServer) -> str:
    return f"openai:{server.url}#dummy"


@pytest.fixture(autouse=True)
def _forget():
    yield
    registry.forget()


@pytest.fixture
def server():
    with DummyServer(DummyOptions(mode="judge")) as running:
        yield running


def test_labels_are_judgments_any_job_reads(tmp_path, server):
    pool = make_pool(tmp_path / "in")
    result = make(pool, tmp_path / "out", name_of(server), method="graded")
    rows = read(tmp_path / "out")
    assert result.state == "finished" and rows.height == QUERIES * DEPTH
    check_judgments(rows.to_arrow())
    best = rows.filter(pl.col("doc_id").str.ends_with("-0"))
    rest = rows.filter(~pl.col("doc_id").str.contains("-0|-1"))
    assert best["grade"].to_list() == [3] * QUERIES and set(rest["grade"]) == {0}
    one = best.row(0, named=True)
    assert one["label_source"] == "llm" and one["signal"] == "graded" and one["signal_class"] == "A"
    assert one["annotator"].endswith("@dummy") and one["prompt_hash"].startswith("graded-relevance-v1@")
    assert (one["pool_source"], one["pool_rank"], one["parse_status"], one["truncated"]) == (
        "bm25",
        1,
        "ok",
        False,
    )
    assert one["prompt_tokens"] > 20 and one["completion_tokens"] >= 1
    data, _ = formats.read(str(tmp_path / "out"))
    assert (
        data.judgments.num_rows == rows.height
        and data.pool.num_rows == rows.height
        and data.documents is not None
    )
    assert data.queries["query_id"].to_pylist() == [f"q{i}" for i in range(QUERIES)]
    assert not verify_output(str(tmp_path / "out")).problems
    assert all("response_format" in b for b in server.bodies) and server.stats.repeated == 0


def test_a_finished_run_asks_nothing_again(tmp_path, server):
    pool = make_pool(tmp_path / "in")
    make(pool, tmp_path / "out", name_of(server))
    asked = server.stats.answered
    assert make(pool, tmp_path / "out", name_of(server)).state == "already finished"
    with pytest.raises(OutputError, match="--overwrite"):
        make(pool, tmp_path / "out", name_of(server), depth=3)
    # A new threshold is a new label set, of answers that are there already.
    again = make(pool, tmp_path / "out", name_of(server), method_options={"threshold": 0.9}, overwrite=True)
    assert (
        again.state == "finished" and server.stats.answered == asked and again.manifest["cost"]["asked"] == 0
    )


def test_an_output_that_was_moved_goes_on_with_the_answers_it_has(tmp_path, server):
    pool = make_pool(tmp_path / "in", queries=2)
    make(pool, tmp_path / "out", name_of(server), method="graded")
    asked = server.stats.answered
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert make(pool, moved, name_of(server), method="graded").state == "already finished"
    less = make(pool, moved, name_of(server), method="graded", depth=2, overwrite=True)
    assert less.manifest["totals"]["labels"] == 4 and server.stats.answered == asked


def test_a_judge_that_talks_nonsense_about_every_tenth_pair_costs_those_pairs(tmp_path):
    pool = make_pool(tmp_path / "in", mark="zzz")
    with DummyServer(DummyOptions(mode="judge", nonsense="zzz")) as server:
        for method, status in (
            ("graded", "unparseable"),
            ("yes_no", "error"),
            ("graded_verbal", "unparseable"),
        ):
            out = tmp_path / method
            result = make(pool, out, name_of(server), method=method)
            rows = read(out)
            bad = rows.filter(~pl.col("parse_status").is_in(READABLE))
            assert set(bad["doc_id"]) == {"d1-3", "d3-1", "d4-5"}  # pairs 9, 19, 29
            assert set(bad["parse_status"]) == {status} and bad["error"].null_count() == 0
            assert (
                bad.select(pl.col("grade", "binary", "value", "rank").is_null().all()).row(0) == (True,) * 4
            )
            assert rows.height == QUERIES * DEPTH
            assert result.manifest["totals"]["unreadable"] == 3 and result.manifest["statuses"][status] == 3
        # Unreadable text is asked about once more, and only that.
        repeats = [b for b in server.bodies if len(b["messages"]) > 2]
        assert len(repeats) == 6


def test_one_shard_or_seven_and_one_worker_or_two_give_the_same(tmp_path, server):
    outs = []
    for name, files, workers in (("one", 1, 1), ("seven", 7, 2)):
        pool = make_pool(tmp_path / name, files=files, queries=18)
        make(
            pool,
            tmp_path / f"{name}-out",
            name_of(server),
            run=RunSettings(workers=workers, progress="quiet"),
            method="graded",
            queries_per_shard=18 if files == 1 else 5,
        )
        outs.append(read(tmp_path / f"{name}-out").sort("query_id", "doc_id"))
    assert outs[0].equals(outs[1])


def test_a_killed_run_goes_on_and_pays_for_no_pair_twice(tmp_path, monkeypatch):
    pool = make_pool(tmp_path / "in", queries=20)
    whole = 20 * DEPTH
    # A refusal of the disk in the middle of a unit: what had been answered by then is kept.
    with DummyServer(DummyOptions(mode="judge")) as server:
        make(pool, tmp_path / "expected", name_of(server), method="graded", model_options={"concurrency": 2})
        expected = read(tmp_path / "expected").drop("annotator")
        assert server.stats.answered == whole
    from transforms.shards.cache import RequestCache

    put = RequestCache.put_many
    calls = []

    def failing(self, items):
        calls.append(1)
        if len(calls) in (31, 75):
            raise OutputError("no room")
        put(self, items)

    monkeypatch.setattr(RequestCache, "put_many", failing)
    with DummyServer(DummyOptions(mode="judge")) as server:
        for _ in range(2):
            with pytest.raises(TamisError, match="no room"):
                make(
                    pool, tmp_path / "out", name_of(server), method="graded", model_options={"concurrency": 1}
                )
        result = make(
            pool, tmp_path / "out", name_of(server), method="graded", model_options={"concurrency": 1}
        )
        assert result.state == "finished"
        # Only an answer that came while the disk was full, or was under way when it was, had to be asked for again.
        assert whole <= server.stats.answered <= whole + 4
    assert read(tmp_path / "out").drop("annotator").equals(expected)


def test_a_budget_stops_asking_and_a_larger_one_goes_on(tmp_path, server):
    pool = make_pool(tmp_path / "in", queries=9)
    everything = make(pool, tmp_path / "all", name_of(server), method="graded").manifest
    tokens = everything["cost"]["tokens_spent"]
    before = server.stats.answered
    first = make(pool, tmp_path / "out", name_of(server), method="graded", budget_tokens=tokens).manifest
    totals = first["totals"]
    # Estimates are from above, so that it stops before the budget is passed.
    assert 0 < totals["labels"] < 9 * DEPTH and totals["labels"] + totals["unasked"] == 9 * DEPTH
    assert first["budget"]["spent"] <= tokens and any("--budget-tokens" in n for n in first["notes"])
    assert read(tmp_path / "out").height == totals["labels"]
    assert read(tmp_path / "out", "queries").height == 9
    assert (
        make(pool, tmp_path / "out", name_of(server), method="graded", budget_tokens=tokens).state
        == "already finished"
    )
    second = make(
        pool, tmp_path / "out", name_of(server), method="graded", budget_tokens=100 * tokens
    ).manifest
    assert second["totals"]["labels"] == 9 * DEPTH and second["totals"]["unasked"] == 0
    assert server.stats.answered - before == 9 * DEPTH and server.stats.repeated == 9 * DEPTH
    same = ["query_id", "doc_id", "grade", "parse_status"]
    assert read(tmp_path / "out").select(same).equals(read(tmp_path / "all").select(same))


def test_what_cannot_be_asked_is_said(tmp_path, server):
    pool = make_pool(tmp_path / "in", queries=1)
    documents = [json.loads(line) for line in (pool / "corpus.jsonl").read_text().splitlines()]
    documents[1] |= {"title": "", "text": "  "}
    documents[2]["text"] = "word " * 20_000
    del documents[3]
    _lines(pool / "corpus.jsonl", documents)
    queries = [{"query_id": "q0", "text": "bread cloud"}]
    _lines(pool / "queries.jsonl", queries)
    result = make(pool, tmp_path / "out", name_of(server), method="graded")
    rows = {r["doc_id"]: r for r in read(tmp_path / "out").to_dicts()}
    assert rows["d0-1"]["parse_status"] == "empty" and rows["d0-1"]["grade"] is None
    assert rows["d0-2"]["parse_status"] == "ok" and rows["d0-2"]["truncated"]
    assert rows["d0-3"]["parse_status"] == "error" and "corpus" in rows["d0-3"]["error"]
    assert any("not in the corpus" in n for n in result.notes)
    _lines(pool / "queries.jsonl", [{"query_id": "q0", "text": "bread " * 5000}])
    make(pool, tmp_path / "long", name_of(server), method="graded")
    assert set(read(tmp_path / "long").filter(pl.col("doc_id") == "d0-0")["parse_status"]) == {"too_long"}
    _lines(pool / "queries.jsonl", [{"query_id": "q0", "text": " "}])
    make(pool, tmp_path / "blank", name_of(server), method="graded")
    assert set(read(tmp_path / "blank")["parse_status"]) == {"empty"}


def test_what_is_wrong_is_said_before_work_starts(tmp_path, server):
    pool = make_pool(tmp_path / "in", queries=1)
    model = name_of(server)
    for more, error, said in (
        ({"method": "guess"}, TamisError, "choose one of: yes_no"),
        ({"method": "graded", "method_options": {"depth": 3}}, TamisError, "no option 'depth'"),
        ({"method_options": {"threshold": 2}}, TamisError, "between 0 and 1"),
        ({"method": "likelihood"}, ModelError, "needs log-probabilities of given text"),
        ({"prompts": {"nobody": "x.jinja"}}, TamisError, "no prompt 'nobody'"),
        ({"target_model": "smollm2"}, TamisError, "labels for any reader"),
        (
            {"queries": str(_lines(tmp_path / "other.jsonl", [{"query_id": "x", "text": "y"}]))},
            InputError,
            "pass --queries",
        ),
        (
            {"corpus": str(_lines(tmp_path / "docs.jsonl", [{"doc_id": "x", "text": "y"}]))},
            InputError,
            "none of the pool's",
        ),
        ({"model": f"openai:{server.url}#other"}, ModelError, "other"),
    ):
        with pytest.raises(error, match=said):
            make(pool, tmp_path / "out", **{"model": model, **more})
    assert server.stats.answered == 0


def test_a_dry_run_says_what_it_would_take_and_asks_nothing(tmp_path, server, capsys):
    pool = make_pool(tmp_path / "in", queries=60)
    plan = make(
        pool, tmp_path / "out", name_of(server), method="graded", price_in=2.0, price_out=8.0,
        run=RunSettings(dry_run=True, progress="quiet"),
    ).manifest  # fmt: skip
    assert server.stats.requests == 0 and not (tmp_path / "out").exists()
    assert plan["totals"]["pairs"] == plan["totals"]["requests"] == 60 * DEPTH and not plan["totals"]["exact"]
    expected = (plan["totals"]["prompt_tokens"] * 2 + plan["totals"]["completion_tokens"] * 8) / 1e6
    assert plan["price"] == pytest.approx(expected) and plan["price"] > 0
    done = make(pool, tmp_path / "out", name_of(server), method="graded").manifest
    assert plan["totals"]["prompt_tokens"] >= done["cost"]["prompt_tokens"]


def test_agreement_with_people_and_calibration_on_them(tmp_path, server):
    pool = make_pool(tmp_path / "in", queries=10)
    said = [
        {"query_id": f"q{q}", "doc_id": f"d{q}-{d}", "grade": int(d == 0), "label_source": "human"}
        for q in range(10)
        for d in range(DEPTH)
    ]
    everyone, some = (
        _lines(tmp_path / "human.jsonl", said),
        _lines(tmp_path / "some.jsonl", said[: 6 * DEPTH]),
    )
    plain = make(pool, tmp_path / "plain", name_of(server), human=(str(everyone),)).manifest
    (own,) = plain["agreement"]
    assert own["signal"] == "yes_no" and own["order"]["auc"]["mean"] == 1.0 and own["queries"] == 10
    assert own["binary"]["recall"]["mean"] == 1.0 and 0 < own["binary"]["kappa"]["mean"] < 1
    assert plain["positives"]["mean"]["mean"] == 2.0  # it takes half of the words for enough
    fitted = make(
        pool, tmp_path / "fitted", name_of(server), human=(str(everyone),), calibrate_on=str(some)
    ).manifest
    assert (
        fitted["calibration"]["queries"] == [f"q{q}" for q in range(6)] and fitted["calibration"]["slope"] > 0
    )
    assert fitted["agreement"][0]["queries"] == 4  # not those it was fitted on
    rows = read(tmp_path / "fitted")
    assert (rows["binary"] == (rows["probability"] > 0.5)).all() and (
        rows["binary"] == (rows["value"] > 0)
    ).all()
    page = (tmp_path / "fitted" / "report.html").read_text()
    assert "Agreement with people" in page and "auc" in page and "q0" in page


def test_a_pool_of_two_sources_is_one_list_in_its_best_order(tmp_path, server):
    pool = make_pool(tmp_path / "in", queries=1)
    more = [
        {"query_id": "q0", "doc_id": "d0-5", "source": "dense", "rank": 1, "score": 0.9},
        {"query_id": "q0", "doc_id": "d0-0", "source": "human", "rank": None, "score": None},
        {"query_id": "q0", "doc_id": "d0-4", "source": "human", "rank": None, "score": None},
    ]
    _lines(pool / "pool" / "more.jsonl", more)
    make(pool, tmp_path / "out", name_of(server), depth=3)
    rows = read(tmp_path / "out").to_dicts()
    assert [(r["doc_id"], r["pool_source"], r["pool_rank"]) for r in rows] == [
        ("d0-0", "bm25", 1),
        ("d0-5", "dense", 1),
        ("d0-1", "bm25", 2),
        ("d0-4", "bm25", 5),
    ]  # fmt: skip; what people put up is judged at any depth


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.text(max_size=20), min_size=1, max_size=30))
def test_texts_are_found_again_by_id(tmp_path_factory, documents):
    from transforms.retrieval.collection import document_batches
    from transforms.retrieval.labelling.texts import build_texts

    folder = Folder(str(tmp_path_factory.mktemp("texts")))
    rows = [{"doc_id": d, "title": None, "text": t} for d, t in documents.items()]
    first, missing = build_texts(folder, lambda: document_batches(rows), [*documents, "not there"])
    assert missing == ["not there"]
    assert TextStore(folder).get([*documents, "not there"]) == {d: ("", t) for d, t in documents.items()}
    again, _ = build_texts(folder, lambda: document_batches(rows[::-1]), [*documents, "not there"])
    assert again == first


def test_in_process_every_method_labels_with_a_tiny_model(tmp_path):
    pool = make_pool(tmp_path / "in", queries=3)
    model = str(save_tiny_lm(tmp_path / "tiny", tie_word_embeddings=False, max_position_embeddings=2048))
    for method, options in (
        ("yes_no", {"calibrate": "null"}),
        ("graded", {}),
        ("graded_verbal", {"reason_tokens": 8}),
        ("likelihood", {"calibrate": "null"}),
        ("likelihood", {"of": "answer", "answer_tokens": 8}),
    ):
        out = tmp_path / f"{method}{len(options)}"
        result = make(pool, out, model, method=method, method_options=options, dtype="float32")
        rows = read(out)
        assert result.manifest["totals"]["labels"] == rows.height == 3 * DEPTH, method
        assert rows["value"].null_count() == 0 and rows["value"].n_unique() > 3
        if method.startswith("graded"):
            assert set(rows["grade"]) <= {0, 1, 2, 3} and rows["grade"].null_count() == 0
    facts = json.loads(read(out, "queries")["extra"][0])
    assert (
        facts["pseudo_answer"]
        and rows["pseudo_answer_id"].null_count() == 0
        and set(rows["signal"]) == {"answer_likelihood"}
    )


def test_the_command_says_what_came_of_it(tmp_path, server, capsys):
    pool = make_pool(tmp_path / "in", queries=2)
    args = ["label", str(pool / "pool"), "-o", str(tmp_path / "out"), "--corpus", str(pool / "corpus.jsonl"), "--queries",
            str(pool / "queries.jsonl"), "--model", name_of(server), "--progress", "quiet"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main([*args, "--dry-run"])
    assert not done.value.code and "would judge 12 pairs of 2 queries" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main([*args, "--threshold", "0.4"])
    assert not done.value.code and "12 labels of 12 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit) as failed:
        main([*args, "--method", "nothing", "--overwrite"])
    assert failed.value.code == 2 and "choose one of" in capsys.readouterr().err


def test_the_embedded_model_judges_by_likelihood_where_no_method_is_named():
    assert default_method("smollm2") == "likelihood"
    assert default_method("openai:http://localhost/v1#m") == default_method("hf:some/model") == "yes_no"
