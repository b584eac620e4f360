"""DPR rows: gold answers, candidates in order, labels only where somebody said so."""

from __future__ import annotations

import gzip
import json

import pytest

from schemas.errors import InputError
from tests.conftest import ROOT
from tests.transforms.retrieval.sample import SAMPLE, documents, export, labels, read
from transforms.retrieval import formats

READER = {
    "question": "where does the bicycle come from",
    "answers": ["Karlsruhe", "Baden"],
    "ctxs": [
        {"id": "w1", "title": "Trains", "text": "Trains came first.", "score": "3.5", "hasanswer": False},
        {
            "id": 7,
            "title": "",
            "text": "It was built in Karlsruhe.",
            "score": 2,
            "hasanswer": True,
            "isgold": True,
        },
        {"title": "Karlsruhe", "text": "A town.", "hasanswer": True},
    ],
    "note": 1,
}


def test_a_readers_rows(tmp_path):
    (tmp_path / "nq.jsonl").write_text(
        json.dumps(READER) + "\nnonsense\n" + json.dumps({"question": "x", "ctxs": 3})
    )
    data, name = formats.read(str(tmp_path / "nq.jsonl"))
    assert name == "dpr" and [d.line for d in data.dead] == [2, 3]
    assert [d for _, d in labels(data, "query_id", "doc_id")] == [
        "7"
    ]  # hasanswer is a string match, no judgment
    pool = data.pool.to_pylist()
    assert [(p["doc_id"][:2], p["rank"], p["score"]) for p in pool] == [
        ("w1", 1, 3.5),
        ("7", 2, 2.0),
        ("d-", 3, None),
    ]
    (query,) = data.queries.to_pylist()
    assert query["text"] == READER["question"]
    assert json.loads(query["extra"]) == {"answers": ["Karlsruhe", "Baden"], "note": 1}
    assert [(d["title"], d["text"]) for d in documents(data)] == [
        (None, "It was built in Karlsruhe."), ("Trains", "Trains came first."), ("Karlsruhe", "A town."),
    ]  # fmt: skip


def test_training_rows_as_one_gzipped_array(tmp_path):
    row = {
        "question": "who",
        "answers": ["Ada"],
        "positive_ctxs": [{"title": "A", "text": "Ada did.", "score": 1000, "passage_id": "1"}],
        "negative_ctxs": [{"title": "B", "text": "Bo did.", "passage_id": "2"}],
        "hard_negative_ctxs": [{"title": "C", "text": "Cy did.", "passage_id": "3"}],
    }
    with gzip.open(tmp_path / "train.json.gz", "wt") as file:
        json.dump([row, "x"], file)
    data, name = formats.read(str(tmp_path))
    assert name == "dpr" and len(data.dead) == 1
    assert labels(data, "doc_id", "grade", "value") == {("1", 1, None)}  # the score is a retriever's
    assert data.pool["doc_id"].to_pylist() == ["3", "2"]


def test_rows_come_back_with_answers(tmp_path):
    (tmp_path / "nq.jsonl").write_text(json.dumps(READER))
    export(tmp_path / "out", "dpr", tmp_path / "nq.jsonl")
    again = read(tmp_path / "out")
    first = read(tmp_path / "nq.jsonl")
    assert labels(again, "query_id", "doc_id") == labels(first, "query_id", "doc_id")
    assert again.queries.equals(first.queries)
    export(tmp_path / "sample", "dpr", pools=(str(SAMPLE / "bm25.run"),))
    row = json.loads((tmp_path / "sample" / "train.jsonl").read_text().split("\n")[0])
    assert set(row) >= {"question", "answers", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}


def test_a_broken_array_is_said(tmp_path):
    (tmp_path / "x.json").write_text('[{"question": "q", "ctxs": []}')
    with pytest.raises(InputError, match="array"):
        read(tmp_path / "x.json", "dpr")


def test_the_real_file():
    path = ROOT.parent / "shared" / "data" / "retrieval" / "nq_open_oracle.jsonl.gz"
    if not path.exists():
        pytest.skip("no NQ-open file beside the repository")
    data, name = formats.read(str(path))
    assert name == "dpr" and not data.dead
    assert data.pool.num_rows == data.judgments.num_rows == 2655
    assert "answers" in json.loads(data.queries["extra"][0].as_py())
