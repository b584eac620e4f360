"""Agreement of labels: figures that other libraries compute too, and what they say of a judge that guesses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipelines import judgments_agree
from pipelines.cli import app
from pipelines.judgments_agree import AgreeConfig
from schemas.errors import InputError
from tests.conftest import ROOT
from transforms.retrieval.agreement import (
    How,
    binary_figures,
    by_query,
    graded_figures,
    order_figures,
    set_figures,
)

SAMPLE = ROOT / "examples" / "retrieval"
QUICK = How(draws=200)


def agree(out: Path, a: Path | str, b: Path | str, **more):
    return judgments_agree.run(AgreeConfig(a=str(a), b=str(b), output=str(out), draws=300, **more))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def paired(grades: list[tuple[int, int]], queries: int = 3) -> pl.DataFrame:
    rows = [
        {
            "query_id": f"q{i % queries}",
            "doc_id": f"d{i}",
            "grade_a": a,
            "grade_b": b,
            "value_a": None,
            "rank_a": None,
            "positive_a": a >= 1,
            "positive_b": b >= 1,
            "held": True,
        }
        for i, (a, b) in enumerate(grades)
    ]
    return pl.DataFrame(rows, schema_overrides={"value_a": pl.Float64, "rank_a": pl.Int32})


grades = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=40)


@settings(max_examples=40)
@given(grades)
def test_figures_are_those_scikit_learn_computes(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    table = paired(pairs)
    a, b = np.array(pairs).T
    found = {**binary_figures(by_query(table), QUICK), **graded_figures(table, QUICK)}

    def same(name, value):
        got = found[name]
        assert (got is None) == (not np.isfinite(value)), name
        if got is not None:
            assert got.mean == pytest.approx(value), name
            assert got.low - 1e-12 <= got.mean <= got.high + 1e-12

    same("precision", metrics.precision_score(b >= 1, a >= 1, zero_division=np.nan))
    same("recall", metrics.recall_score(b >= 1, a >= 1, zero_division=np.nan))
    same("accuracy", (np.sign(a) == np.sign(b)).mean())
    if len({*np.sign(a), *np.sign(b)}) > 1:
        same("kappa", metrics.cohen_kappa_score(a >= 1, b >= 1))
    if len({*a, *b}) > 1:
        same("weighted_kappa", metrics.cohen_kappa_score(a, b, weights="quadratic", labels=range(4)))


@settings(max_examples=40)
@given(grades)
def test_alpha_is_krippendorff_s(pairs):
    """By its definition: 1 - (mean squared gap within pairs) / (mean squared gap between any two values)."""
    a, b = np.array(pairs, dtype=float).T
    values = np.concatenate([a, b])
    gaps = (values[:, None] - values[None, :]) ** 2
    expected = gaps.sum() / (len(values) * (len(values) - 1))
    got = graded_figures(paired(pairs), QUICK)["alpha"]
    if expected == 0:
        assert got is None
    else:
        assert got.mean == pytest.approx(1 - ((a - b) ** 2).mean() / expected)


@settings(max_examples=40)
@given(grades)
def test_order_is_counted_within_queries(pairs):
    table = paired(pairs)
    areas = []
    for _, own in table.group_by("query_id", maintain_order=True):
        yes = own.filter(pl.col("positive_b"))["grade_a"].to_list()
        no = own.filter(~pl.col("positive_b"))["grade_a"].to_list()
        if yes and no:
            areas.append(np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in yes for y in no]))
    got = order_figures(table, QUICK)["auc"]
    assert (got is None) == (not areas)
    if areas:
        assert got.mean == pytest.approx(np.mean(areas))


def test_a_judge_that_guesses_is_at_chance_and_one_that_knows_is_not(tmp_path):
    draw = random.Random(0)
    human, guess, know = [], [], []
    for i in range(60):
        for d in range(10):
            pair = {"query_id": f"q{i}", "doc_id": f"d{d}"}
            grade = draw.choice([0, 0, 1, 2])
            human.append({**pair, "grade": grade})
            guess.append(
                {**pair, "grade": draw.choice([0, 0, 1, 2]), "label_source": "llm", "annotator": "guess"}
            )
            better = grade if draw.random() < 0.8 else draw.choice([0, 1, 2])
            know.append({**pair, "grade": better, "label_source": "llm", "annotator": "know"})
    a = write(tmp_path / "a.jsonl", guess + know)
    result = agree(tmp_path / "out", a, write(tmp_path / "b.jsonl", human))
    found = {s.name.split()[1]: s for s in result.sets}
    assert result.best.name == "llm know qrels"
    assert found["guess"].figures["kappa"].low < 0 < found["guess"].figures["kappa"].high
    assert found["guess"].figures["auc"].low < 0.5 < found["guess"].figures["auc"].high
    assert found["know"].figures["kappa"].low > 0.5
    assert found["know"].figures["auc"].low > 0.8
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["best"] == "llm know qrels"
    assert pq.read_table(tmp_path / "out" / "pairs.parquet").num_rows == 1200
    assert "kappa" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_unreadable_replies_are_counted_and_never_labels(tmp_path):
    result = agree(tmp_path / "out", SAMPLE / "llm.jsonl", SAMPLE)
    (found,) = result.sets
    assert (found.asked, found.unreadable) == (26, 1)
    compared = pl.read_parquet(tmp_path / "out" / "pairs.parquet").select("query_id", "doc_id").rows()
    assert ("q3", "river-4") in compared
    assert ("q4", "river-4") not in compared  # the reply about this pair was no label


def test_what_is_not_listed_is_negative_skipped_or_as_it_seems(tmp_path):
    """The sample's people list positives and a single negative: what they do not list they would have called none."""
    seems = agree(tmp_path / "a", SAMPLE / "llm.jsonl", SAMPLE).sets[0]
    skipped = agree(tmp_path / "b", SAMPLE / "llm.jsonl", SAMPLE, unjudged="skip").sets[0]
    negative = agree(tmp_path / "c", SAMPLE / "llm.jsonl", SAMPLE, unjudged="negative").sets[0]
    assert (seems.pairs, skipped.pairs, negative.pairs) == (25, 9, 25)
    assert (seems.filled, skipped.filled) == (16, 0)
    assert seems.figures["precision"].mean == pytest.approx(8 / 11)
    assert skipped.figures["precision"].mean == pytest.approx(8 / 9)
    assert seems.confusion[1] == ["not judged", "0", "1", "2"]
    with pytest.raises(InputError, match="auto, skip, negative"):
        agree(tmp_path / "d", SAMPLE / "llm.jsonl", SAMPLE, unjudged="perhaps")


def test_cut_offs_trade_recall_for_precision(tmp_path):
    (found,) = agree(tmp_path / "out", SAMPLE / "llm.jsonl", SAMPLE).sets
    by_grade = {g: f for g, f, _ in found.cuts}
    assert sorted(by_grade) == [1, 2, 3]
    assert by_grade[1]["recall"].mean == 1.0
    assert by_grade[3]["precision"].mean == 1.0
    assert by_grade[3]["recall"].mean == pytest.approx(6 / 8)


def test_runs_are_scored_as_trec_eval_does(tmp_path):
    import ir_measures

    runs = {"bm25": str(SAMPLE / "bm25.run"), "reversed": str(SAMPLE / "reversed.run")}
    (found,) = agree(tmp_path / "out", SAMPLE / "llm.jsonl", SAMPLE, runs=runs).sets
    qrels = [
        ir_measures.Qrel(q, d, int(g))
        for split in ("train", "test")
        for q, d, g in (
            line.split("\t") for line in (SAMPLE / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]
        )
    ]
    for name, path in runs.items():
        theirs = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, ir_measures.read_trec_run(path))
        assert found.runs[name].b.mean == pytest.approx(theirs[ir_measures.nDCG @ 10])
    assert found.order.mean == 1.0
    with pytest.raises(InputError, match="no measure"):
        agree(tmp_path / "bad", SAMPLE / "llm.jsonl", SAMPLE, runs=runs, measure="niceness@10")


def test_labels_that_share_nothing_are_no_disagreement(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"query_id": "other", "doc_id": "d", "grade": 1}])
    with pytest.raises(InputError, match="are query and document ids the same"):
        agree(tmp_path / "out", a, SAMPLE)


def test_several_people_are_not_merged_unasked(tmp_path):
    rows = [
        {"query_id": "q1", "doc_id": "bread-1", "grade": g, "annotator": n}
        for n, g in (("ana", 0), ("bo", 2))
    ]
    b = write(tmp_path / "b.jsonl", rows)
    with pytest.raises(InputError, match="2 annotators"):
        agree(tmp_path / "out", SAMPLE / "llm.jsonl", b)
    assert agree(tmp_path / "max", SAMPLE / "llm.jsonl", b, unify_b="max").sets[0].pairs == 5


def test_sets_where_nothing_is_needed_are_counted_by_themselves(tmp_path):
    # Of B, q1 has two positives and q2 none; A finds one and one too many in q1, and in q2 what it should have left alone.
    counts = pl.DataFrame(
        {"query_id": ["q1", "q2", "q3"], "tp": [1, 0, 0], "fp": [1, 2, 0], "fn": [1, 0, 0], "tn": [0, 1, 3]}
    )
    figures = {k: v.mean for k, v in set_figures(counts, QUICK).items()}
    assert figures == {
        "precision": 0.5, "recall": 0.5, "f1": 0.5, "selected": 2, "empty_accuracy": 0.5, "empty_selected": 1,
    }  # fmt: skip
    assert set_figures(counts.head(1), QUICK)["empty_accuracy"] is None
    nothing = set_figures(
        pl.DataFrame({"query_id": ["q"], "tp": [0], "fp": [0], "fn": [2], "tn": [0]}), QUICK
    )
    assert nothing["precision"].mean == nothing["f1"].mean == 0  # of a set without a member, nothing is right
    rows = [
        {"query_id": q, "doc_id": d, "binary": yes}
        for q, d, yes in (("q1", "a", True), ("q1", "b", False), ("q2", "a", False), ("q2", "b", False))
    ]
    write(tmp_path / "b.jsonl", rows)
    write(tmp_path / "a.jsonl", [r | {"binary": True} for r in rows])
    result = agree(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert result.sets[0].by_set["empty_accuracy"].mean == 0
    assert "none found either" in (tmp_path / "out" / "report.html").read_text()


def test_the_command_compares_labels_and_rankings(tmp_path):
    out = tmp_path / "out"
    command = ["judgments", "agree", SAMPLE / "llm.jsonl", SAMPLE, "-o", out, "--draws", 100]
    command += ["--run", SAMPLE / "bm25.run", "--run", f"back={SAMPLE / 'reversed.run'}"]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    assert (out / "report.html").exists() and "kappa" in done.output
    assert "bm25" in done.output and "back" in done.output
