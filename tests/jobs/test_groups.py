"""Judgments to training groups, as a user makes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from models.training.groups import DrawPolicy, sample_group
from models.training.shards import ShardReader, list_shards
from pipelines import groups, judgments_import
from pipelines.groups import GroupsConfig
from pipelines.judgments_import import ImportConfig
from pipelines.report import write_report
from pipelines.verify import verify_output
from schemas.errors import InputError, OutputError, TamisError
from schemas.groups import GROUP_SCHEMA
from tests.conftest import ROOT
from tests.helpers import files_below

SAMPLE = ROOT / "examples" / "retrieval"
RUN = str(SAMPLE / "bm25.run")


def make(out: Path, *judgments: Path | str, dry_run: bool = False, **settings):
    sources = tuple(str(j) for j in judgments or (SAMPLE,))
    return groups.run(GroupsConfig(judgments=sources, output=str(out), **settings), dry_run=dry_run)


def read(out: Path) -> list[dict]:
    return list(ShardReader(list_shards(str(out))).rows())


def by_query(out: Path) -> dict[str, dict]:
    return {row["query_id"]: row for row in read(out)}


def ids(row: dict, name: str) -> list[str]:
    return [d["doc_id"] for d in row[name]]


def side(out: Path, table: str) -> pl.DataFrame:
    files = sorted((out / table).rglob("*.parquet"))
    return pl.concat([pl.read_parquet(f) for f in files])


def corpus(folder: Path, docs: dict[str, str], **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"doc_id": d, "text": t, **more.get(d, {})}) for d, t in docs.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder / "corpus.jsonl"


def table(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_groups_hold_whole_lists_with_provenance(tmp_path):
    result = make(tmp_path / "out", pools=(RUN,))
    found = by_query(tmp_path / "out")
    assert set(found) == {"q1", "q2", "q3", "q4", "q5", "q6"}
    q1, q4 = found["q1"], found["q4"]
    assert ids(q1, "positives") == ["bread-1", "bread-3"]
    assert [p["quality_rank"] for p in q1["positives"]] == [1, 2]
    assert q1["positives"][0]["title"] == "Sourdough"
    assert q1["query"] == "why does sourdough rise"
    assert [(n["doc_id"], n["source"], n["rank"], n["score"]) for n in q1["negatives"]] == [
        ("bread-4", "bm25", 3, 5.5),
        ("bread-2", "bm25", 4, 3.75),
        ("bicycle-4", "bm25", 5, 1.5),
    ]
    assert ids(q4, "negatives") == ["river-3", "river-4", "river-1"]
    assert q4["negatives"][0]["grade"] == 0  # it was judged, wherever it was found
    dropped = side(tmp_path / "out", "dropped")
    assert dropped.select("query_id", "reason").rows() == [("q7", "no_label")]
    assert result.manifest["totals"]["groups"] == 6
    schema = pq.read_schema(next((tmp_path / "out" / "data").rglob("*.parquet")))
    assert schema.equals(GROUP_SCHEMA)


def test_the_page_shows_groups_and_what_was_left_out(tmp_path):
    make(tmp_path / "out", pools=(RUN,), relative_margin=0.5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "6 training groups" in page
    assert "why does sourdough rise" in page
    assert "relative_margin" in page
    assert "no_label" in page


def test_the_trainer_draws_from_what_is_there(tmp_path):
    make(tmp_path / "out", pools=(RUN,))
    row = by_query(tmp_path / "out")["q1"]
    policy = DrawPolicy("random_one", 2, 3)
    drawn = [sample_group(row, 0, epoch, policy) for epoch in range(2)]
    assert {p[0]["doc_id"] for p, _ in drawn} == {"bread-1", "bread-3"}
    assert all(len(n) == 2 and not {d["doc_id"] for d in n} & set(ids(row, "positives")) for _, n in drawn)


def test_any_number_of_shards_holds_the_same_groups(tmp_path):
    make(tmp_path / "one", pools=(RUN,), random_negatives=3, seed=5)
    make(tmp_path / "many", pools=(RUN,), random_negatives=3, seed=5, queries_per_shard=2)
    assert len(list((tmp_path / "many" / "data").rglob("*.parquet"))) == 4
    assert read(tmp_path / "one") == read(tmp_path / "many")
    for name in ("mask", "dropped", "rejected"):
        one, many = side(tmp_path / "one", name), side(tmp_path / "many", name)
        assert one.equals(many), name


def test_two_runs_write_the_same_bytes_and_a_finished_one_is_left_alone(tmp_path):
    make(tmp_path / "a", pools=(RUN,), random_negatives=2)
    make(tmp_path / "b", pools=(RUN,), random_negatives=2)
    data = {n: c for n, c in files_below(tmp_path / "a").items() if n.endswith(".parquet")}
    assert data == {n: c for n, c in files_below(tmp_path / "b").items() if n.endswith(".parquet")}
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    assert make(tmp_path / "a", pools=(RUN,), random_negatives=2).state == "already finished"
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    with pytest.raises(OutputError, match="--overwrite"):
        make(tmp_path / "a", pools=(RUN,), random_negatives=4)
    assert make(tmp_path / "a", pools=(RUN,), random_negatives=4, overwrite=True).state == "finished"


def test_a_run_that_was_killed_is_made_whole(tmp_path):
    make(tmp_path / "whole", pools=(RUN,))
    make(tmp_path / "out", pools=(RUN,))
    for name in ("_SUCCESS", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "mask")
    make(tmp_path / "out", pools=(RUN,))
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert side(tmp_path / "out", "mask").equals(side(tmp_path / "whole", "mask"))


def test_verify_knows_a_changed_byte_in_any_table(tmp_path):
    make(tmp_path / "out", pools=(RUN,))
    assert verify_output(str(tmp_path / "out")).problems == []
    mask = next((tmp_path / "out" / "mask").rglob("*.parquet"))
    mask.write_bytes(mask.read_bytes()[:-1] + b"?")
    assert verify_output(str(tmp_path / "out")).problems == [
        "mask/part-00000.parquet: its sha256 is not the manifest's"
    ]
    with pytest.raises(OutputError, match="writes its page itself"):
        write_report(str(tmp_path / "out"))


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    planned = make(tmp_path / "out", pools=(RUN,), dry_run=True)
    assert not (tmp_path / "out").exists()
    done = make(tmp_path / "out", pools=(RUN,))
    assert planned.state == "planned"
    assert planned.manifest["stages"] == done.manifest["stages"]


# ------------------------------------------------------------------------------------------------- stages and labels


def test_llm_labels_come_before_human_ones(tmp_path):
    result = make(tmp_path / "out", SAMPLE, SAMPLE / "llm.jsonl", positive_from={"": 1, "llm": 2})
    rows = read(tmp_path / "out")
    assert [s["name"] for s in result.manifest["stages"]] == ["llm", "human"]
    assert {(r["stage"], r["stage_number"]) for r in rows} == {("llm", 0), ("human", 1)}
    llm = {r["query_id"]: r for r in rows if r["stage"] == "llm"}
    assert ids(llm["q1"], "positives") == ["bread-1", "bread-3"]  # graded 3 and 2, and not bread-4, graded 1
    assert ids(llm["q1"], "negatives") == ["bread-2", "bicycle-4"]
    assert [p["annotator"] for p in llm["q1"]["positives"]] == ["sample-judge"] * 2
    human = {r["query_id"]: r for r in rows if r["stage"] == "human"}
    assert ids(human["q1"], "negatives") == [
        "bread-2",
        "bicycle-4",
    ]  # what the judge said no to, and nobody yes
    reasons = side(tmp_path / "out", "rejected").filter(pl.col("stage") == "llm")
    found = {(q, d): r for q, d, r in reasons.select("query_id", "doc_id", "reason").rows()}
    assert found["q1", "bread-4"] == "positive"  # somewhat relevant: neither a positive nor a negative


def test_a_label_nobody_could_read_is_neither_positive_nor_negative(tmp_path):
    make(tmp_path / "out", SAMPLE / "llm.jsonl", corpus=str(SAMPLE / "corpus.jsonl"), queries=str(SAMPLE / "queries.jsonl"), pools=(RUN,))  # fmt: skip
    q4 = by_query(tmp_path / "out")["q4"]
    assert "river-4" not in ids(q4, "positives") + ids(q4, "negatives")
    rejected = side(tmp_path / "out", "rejected")
    assert ("q4", "river-4", "unreadable_label") in rejected.select("query_id", "doc_id", "reason").rows()


def test_union_is_made_and_warned_of(tmp_path):
    result = make(tmp_path / "out", SAMPLE, SAMPLE / "llm.jsonl", regime="union")
    assert [s["name"] for s in result.manifest["stages"]] == ["union"]
    assert any("33.2 against 38.2" in note for note in result.manifest["notes"])
    found = by_query(tmp_path / "out")
    # The winner keeps its name: the judge's 3 stands above the 2 people gave, and of equals people's stands.
    assert [(p["doc_id"], p["grade"], p["label_source"]) for p in found["q6"]["positives"]] == [
        ("bicycle-3", 3, "llm"),
        ("bicycle-2", 1, "human"),
    ]


def test_a_stage_nothing_is_left_of_is_said(tmp_path):
    rows = [
        {"query_id": "q", "doc_id": d, "grade": g, "label_source": s}
        for d, g, s in (("a", 2, "llm"), ("b", 0, "llm"), ("c", 1, "human"))
    ]
    rows[2]["query_id"] = "r"
    result = make(tmp_path / "out", table(tmp_path / "l.jsonl", rows), with_text=False)
    assert any(n.startswith("stage 'human' has no group: pass --pool") for n in result.manifest["notes"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"regime": "single"}, "choose with --label-source"),
        ({"regime": "both"}, "single, curriculum, union"),
        ({"annotators": ("nobody",)}, "no label is of the chosen"),
        ({"positive_from": {"teacher": 1}}, "the stages are llm and human"),
    ],
)
def test_stages_that_cannot_be_are_refused(tmp_path, settings, says):
    with pytest.raises(InputError, match=says):
        make(tmp_path / "out", SAMPLE, SAMPLE / "llm.jsonl", **settings)
    assert not (tmp_path / "out").exists()


def test_a_curriculum_needs_both(tmp_path):
    with pytest.raises(InputError, match="only human ones"):
        make(tmp_path / "out", regime="curriculum")


def test_two_judges_in_a_stage_are_not_merged_unasked(tmp_path):
    rows = [json.loads(x) for x in (SAMPLE / "llm.jsonl").open()]
    other = [{**r, "annotator": "another", "grade": 0} for r in rows if r["grade"] is not None]
    both = table(tmp_path / "both.jsonl", rows + other)
    texts = {"corpus": str(SAMPLE / "corpus.jsonl"), "queries": str(SAMPLE / "queries.jsonl")}
    with pytest.raises(InputError, match=r"stage 'llm'.*2 annotators.*--unify"):
        make(tmp_path / "out", both, **texts)
    make(tmp_path / "one", both, annotators=("sample-judge",), **texts)
    make(tmp_path / "max", both, unify="max", **texts)
    assert [ids(r, "positives") for r in read(tmp_path / "one")] == [
        ids(r, "positives") for r in read(tmp_path / "max")
    ]


def test_a_known_query_is_dropped_by_that_name(tmp_path):
    rows = [
        {
            "query_id": q,
            "doc_id": "d",
            "value": v,
            "label_source": "llm",
            "annotator": "m",
            "signal": "gain",
            "target_model": "m",
            "known_query": q == "known",
        }
        for q, v in (("known", -1.0), ("open", 1.0), ("vain", 0.0))
    ]
    make(tmp_path / "out", table(tmp_path / "l.jsonl", rows), with_text=False, min_negatives=0)
    assert [r["query_id"] for r in read(tmp_path / "out")] == ["open"]
    assert dict(side(tmp_path / "out", "dropped").select("query_id", "reason").rows()) == {
        "known": "known_query_needs_no_document",
        "vain": "no_positive",
    }


# --------------------------------------------------------------------------------------------------------- negatives


def test_what_any_judge_found_good_is_masked_for_that_query_alone(tmp_path):
    make(tmp_path / "out", SAMPLE, SAMPLE / "llm.jsonl", positive_from={"": 2})
    mask = dict(side(tmp_path / "out", "mask").select("query_id", "doc_ids").rows())
    assert mask["q1"] == ["bread-1", "bread-3", "bread-4"]  # by people (2, 1) and by the judge (3, 2, 1)
    assert mask["q4"] == [
        "river-2",
        "river-3",
    ]  # graded 1 by the judge, 0 by people: no negative all the same
    negatives = {(r["query_id"], d) for r in read(tmp_path / "out") for d in ids(r, "negatives")}
    assert not negatives & {(q, d) for q, docs in mask.items() for d in docs}
    assert ("q2", "bread-1") in negatives  # masked for q1 is not masked for q2


def test_documents_of_equal_text_and_rewrites_of_a_positive_are_no_negatives(tmp_path):
    docs = {"a": "Rivers  bend.", "b": "rivers bend.", "c": "Bread rises.", "a-lm": "The river curves."}
    where = corpus(tmp_path / "c", docs, **{"a": {"base_id": "a"}, "a-lm": {"base_id": "a"}})
    labels = table(tmp_path / "l.jsonl", [{"query_id": "q", "doc_id": "a", "grade": 1}])
    pool = table(
        tmp_path / "p.jsonl",
        [{"query_id": "q", "doc_id": d, "source": "s", "rank": i} for i, d in enumerate("bc", 1)]
        + [{"query_id": "q", "doc_id": "a-lm", "source": "s", "rank": 3}],
    )
    queries = table(tmp_path / "q.jsonl", [{"query_id": "q", "text": "why"}])
    more = {"corpus": str(where), "queries": str(queries), "pools": (str(pool),)}
    make(tmp_path / "out", labels, **more)
    assert ids(by_query(tmp_path / "out")["q"], "negatives") == ["c"]
    reasons = dict(side(tmp_path / "out", "rejected").select("doc_id", "reason").rows())
    assert reasons == {"b": "same_text_as_positive", "a-lm": "copy_of_positive"}
    assert side(tmp_path / "out", "mask")["doc_ids"].to_list() == [["a", "a-lm", "b"]]
    make(tmp_path / "plain", labels, mask_copies=False, **more)
    assert ids(by_query(tmp_path / "plain")["q"], "negatives") == ["b", "c", "a-lm"]


def test_margins_are_read_from_the_pool_and_every_rejection_is_logged(tmp_path):
    make(tmp_path / "out", pools=(RUN,), relative_margin=0.5, splits=("train",))
    q1 = by_query(tmp_path / "out")["q1"]
    assert ids(q1, "negatives") == ["bread-2", "bicycle-4"]  # below half of bread-3's 8.25
    rejected = side(tmp_path / "out", "rejected").filter(pl.col("query_id") == "q1")
    row = rejected.row(0, named=True)
    assert (row["doc_id"], row["reason"], row["limit"]) == ("bread-4", "relative_margin", 4.125)


def test_random_negatives_are_drawn_by_seed_and_never_masked(tmp_path):
    make(tmp_path / "a", random_negatives=5, seed=1)
    make(tmp_path / "b", random_negatives=5, seed=2)
    a, b = by_query(tmp_path / "a"), by_query(tmp_path / "b")
    assert all(len(ids(r, "negatives")) >= 5 for r in a.values())
    assert any(ids(a[q], "negatives") != ids(b[q], "negatives") for q in a)
    for row in a.values():
        assert not set(ids(row, "positives")) & set(ids(row, "negatives"))


def test_without_negatives_the_user_is_told_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no_negative.*--pool.*--random-negatives.*--min-negatives 0"):
        make(tmp_path / "out", SAMPLE, splits=("test",))
    make(tmp_path / "out", SAMPLE, splits=("test",), min_negatives=0)
    assert all(r["negatives"] == [] for r in read(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------------------- texts


def test_documents_and_queries_without_text_are_set_aside_not_emptied(tmp_path):
    docs = {"a": "Rivers bend.", "c": "Bread rises."}
    labels = table(
        tmp_path / "l.jsonl",
        [
            {"query_id": q, "doc_id": d, "grade": g}
            for q in "qr"
            for d, g in (("a", 1), ("c", 0), ("gone", 1))
        ],
    )
    queries = table(tmp_path / "q.jsonl", [{"query_id": "q", "text": "why"}])
    make(tmp_path / "out", labels, corpus=str(corpus(tmp_path / "c", docs)), queries=str(queries))
    assert [ids(r, "positives") for r in read(tmp_path / "out")] == [["a"]]
    assert side(tmp_path / "out", "dropped").select("query_id", "reason").rows() == [("r", "no_query_text")]
    assert ("gone", "no_text") in side(tmp_path / "out", "rejected").select("doc_id", "reason").rows()


def test_ids_alone_need_no_texts(tmp_path):
    make(tmp_path / "out", SAMPLE / "llm.jsonl", with_text=False)
    row = by_query(tmp_path / "out")["q1"]
    assert row["query"] is None
    assert {p["text"] for p in row["positives"]} == {None}
    with pytest.raises(InputError, match="--ids-only"):
        make(tmp_path / "texts", SAMPLE / "llm.jsonl")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"positives": "random_one", "max_positives": -1}, "needs a cap"),
        ({"max_positives": 8}, "no slot for a negative"),
        ({"relative_margin": 0.1, "margin_against": "best"}, "weakest, strongest, mean"),
        ({"pools": (str(SAMPLE / "llm.jsonl"),)}, "holds no candidates"),
        ({"random_negatives": 2, "sources": ("bm25",)}, "--negatives-from random"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_written(tmp_path, settings, says):
    with pytest.raises(TamisError, match=says):
        make(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ import


def test_an_import_can_be_read_by_every_job(tmp_path):
    config = ImportConfig(source=str(SAMPLE), output=str(tmp_path / "lab"))
    first = judgments_import.run(config)
    assert first.manifest["totals"] == {
        "judgments": 9,
        "queries": 7,
        "judged_queries": 6,
        "candidates": 0,
        "documents": 12,
        "dead": 0,
    }
    assert judgments_import.run(config).state == "already finished"
    make(tmp_path / "direct", pools=(RUN,))
    make(tmp_path / "by-tables", tmp_path / "lab", pools=(RUN,))
    assert read(tmp_path / "direct") == read(tmp_path / "by-tables")


def test_an_import_keeps_bad_lines_and_refuses_what_holds_nothing(tmp_path):
    (tmp_path / "bad.qrels").write_text("q 0 d 1\nq 0 e 2\nq 0 f\n")
    made = judgments_import.run(
        ImportConfig(source=str(tmp_path / "bad.qrels"), output=str(tmp_path / "out"))
    )
    assert made.manifest["totals"]["dead"] == 1
    dead = pl.read_parquet(tmp_path / "out" / "dead" / "judgments.parquet")
    assert dead.select("line", "content").rows() == [(3, "q 0 f")]
    with pytest.raises(InputError, match=r"neither a judgment nor a candidate \(line 1"):
        judgments_import.run(
            ImportConfig(source=str(tmp_path / "bad.qrels"), format="trec-run", output=str(tmp_path / "none"))
        )
    with pytest.raises(OutputError, match="pass another -o"):
        make(tmp_path / "out", pools=(RUN,))


def test_nfcorpus_in_seconds(shared_data, tmp_path):
    archive = shared_data / "retrieval" / "cocktail_nfcorpus.zip"
    if not archive.exists():
        pytest.skip("NFCorpus is not here")
    shutil.unpack_archive(archive, tmp_path / "nf")
    result = make(
        tmp_path / "out", tmp_path / "nf", corpus_source="human", splits=("train",), random_negatives=8
    )
    figures = result.manifest["stages"][0]
    assert (figures["groups"], figures["positives"], figures["dropped"]) == (2590, 110575, 0)
