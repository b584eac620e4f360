"""Formats: what we write, the libraries whose formats they are can read; what we read back is what was there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import InputError, OutputError
from tests.transforms.retrieval.sample import SAMPLE, documents, export, labels, read
from transforms.retrieval import formats
from transforms.retrieval.collection import frame

QUERIES = {json.loads(line)["_id"]: json.loads(line)["text"] for line in (SAMPLE / "queries.jsonl").open()}
CORPUS = {json.loads(line)["_id"]: json.loads(line) for line in (SAMPLE / "corpus.jsonl").open()}
JOINED = {k: f"{d['title']} {d['text']}" for k, d in CORPUS.items()}
GRADES = {
    ("q1", "bread-1", 2, "train"),
    ("q1", "bread-3", 1, "train"),
    ("q2", "bread-2", 2, "train"),
    ("q3", "river-1", 2, "train"),
    ("q4", "river-2", 2, "train"),
    ("q4", "river-3", 0, "train"),
    ("q5", "bicycle-1", 2, "test"),
    ("q6", "bicycle-3", 2, "test"),
    ("q6", "bicycle-2", 1, "test"),
}


def load_dataset(tmp_path: Path, *args, **kwargs):
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(*args, cache_dir=str(tmp_path / "cache"), **kwargs)


# -------------------------------------------------------------------------------------------------------------- BEIR


def test_beir_comes_back_as_it_was(tmp_path):
    result = export(tmp_path / "out", "beir")
    first, again = read(SAMPLE), read(tmp_path / "out")
    assert result.lost == []
    assert labels(first) == GRADES
    assert again.judgments.equals(first.judgments)
    assert again.queries.equals(first.queries)
    assert documents(again) == documents(first)
    assert first.queries.filter(pa.compute.equal(first.queries["query_id"], "q7"))[
        "known_to"
    ].to_pylist() == [["tiny-reader"]]


def test_beir_itself_reads_what_we_write(tmp_path):
    from beir.datasets.data_loader import GenericDataLoader

    export(tmp_path / "out", "beir")
    corpus, queries, qrels = GenericDataLoader(data_folder=str(tmp_path / "out")).load(split="train")
    assert corpus == {k: {"title": d["title"], "text": d["text"]} for k, d in CORPUS.items()}
    assert queries == {q: QUERIES[q] for q in ("q1", "q2", "q3", "q4")}
    assert {(q, d, g, "train") for q, ds in qrels.items() for d, g in ds.items()} == {
        x for x in GRADES if x[3] == "train"
    }


ids = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=8
)


@settings(max_examples=25)
@given(st.dictionaries(st.tuples(ids, ids), st.integers(-2, 5), min_size=1, max_size=12))
def test_any_ids_and_grades_pass_through_a_qrels_file(tmp_path_factory, given_labels):
    root = tmp_path_factory.mktemp("beir")
    table = pa.table(
        {
            "query_id": [q for q, _ in given_labels],
            "doc_id": [d for _, d in given_labels],
            "grade": list(given_labels.values()),
        }
    )
    pq.write_table(table, root / "labels.parquet")
    export(root / "out", "beir", root / "labels.parquet")
    dead: list = []
    from transforms.retrieval.formats.beir import read_qrels_tsv
    from transforms.shards.files import Folder

    again = {(q, d): g for q, d, g in read_qrels_tsv(Folder(root / "out"), "qrels/test.tsv", dead)}
    assert not dead
    assert again == given_labels


def test_copies_of_documents_are_chosen_or_kept_apart(tmp_path):
    (tmp_path / "c" / "qrels").mkdir(parents=True)
    (tmp_path / "c" / "corpus").mkdir()
    (tmp_path / "c" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    (tmp_path / "c" / "queries.jsonl").write_text('{"_id": "q", "text": "rivers"}\n')
    for source in ("human", "tiny-lm"):
        lines = [json.dumps({"_id": f"d{i}", "title": "", "text": f"{source} {i}"}) for i in range(3)]
        (tmp_path / "c" / "corpus" / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"human, tiny-lm.*--source"):
        read(tmp_path / "c")
    human = read(tmp_path / "c", corpus_source="human")
    assert [d["doc_id"] for d in documents(human)] == ["d0", "d1", "d2"]
    both = read(tmp_path / "c", corpus_source="all")
    assert [(d["doc_id"], d["base_id"], d["source"]) for d in documents(both)][3] == (
        "d0-tiny-lm",
        "d0",
        "tiny-lm",
    )
    assert labels(both, "doc_id", "signal") == {("d1-human", "qrels"), ("d1-tiny-lm", "qrels:inherited")}
    export(tmp_path / "out", "beir", tmp_path / "c", corpus_source="all")
    for name in ("corpus/human.jsonl", "corpus/tiny-lm.jsonl", "queries.jsonl", "qrels/test.tsv"):
        ours = (tmp_path / "out" / name).read_text().splitlines()
        theirs = (tmp_path / "c" / name).read_text().splitlines()
        if name.endswith("jsonl"):
            assert [json.loads(x) for x in ours] == [json.loads(x) for x in theirs]
        else:
            assert ours == theirs


def test_bad_lines_are_set_aside_with_their_number(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq\td\t1\nq d 1\nq\te\tvery\nq\tf\t2.0\n"
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\nnot json\n{"text": "no id"}\n[1]\n')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "one"}\n{"_id": "e", "text": 7}\n')
    data = read(tmp_path)
    assert len(documents(data)) == 1
    assert len(documents(data)) == 1  # a second pass sets nothing aside twice
    assert labels(data, "doc_id", "grade") == {("d", 1), ("f", 2)}
    assert [(d.file, d.line) for d in data.dead] == [
        ("qrels/test.tsv", 3),
        ("qrels/test.tsv", 4),
        ("queries.jsonl", 2),
        ("queries.jsonl", 3),
        ("queries.jsonl", 4),
        ("corpus.jsonl", 2),
    ]


# -------------------------------------------------------------------------------------------------------------- TREC


def test_trec_qrels_are_read_by_ir_measures_and_by_us(tmp_path):
    import ir_measures

    result = export(tmp_path / "out", "trec-qrels")
    theirs = {
        (q.query_id, q.doc_id, q.relevance, s)
        for s in ("train", "test")
        for q in ir_measures.read_trec_qrels(str(tmp_path / "out" / f"{s}.qrels"))
    }
    ours = labels(read(tmp_path / "out" / "train.qrels", splits=("train",)))
    assert theirs == GRADES
    assert ours == {x for x in GRADES if x[3] == "train"}
    assert any("texts of documents" in line for line in result.lost)


def test_a_run_is_read_by_ir_measures_and_ranked_by_its_scores(tmp_path):
    import ir_measures

    (tmp_path / "mixed.run").write_text("q Q0 b 1 0.5 tag\nq Q0 a 2 2.5 tag\nq Q0 c 3 0.5 tag\nbroken line\n")
    data = read(tmp_path / "mixed.run")
    assert [(r["doc_id"], r["rank"], r["score"], r["source"]) for r in data.pool.to_pylist()] == [
        ("b", 2, 0.5, "tag"),
        ("a", 1, 2.5, "tag"),
        ("c", 3, 0.5, "tag"),
    ]
    assert data.dead[0].line == 4
    export(tmp_path / "out", "trec-run", tmp_path / "mixed.run")
    theirs = list(ir_measures.read_trec_run(str(tmp_path / "out" / "tag.run")))
    assert {(r.doc_id, r.score) for r in theirs} == {("a", 2.5), ("b", 0.5), ("c", 0.5)}
    assert read(tmp_path / "out" / "tag.run").pool.equals(data.pool)


def test_a_space_in_an_id_is_refused_where_spaces_part_columns(tmp_path):
    pq.write_table(
        pa.table({"query_id": ["a b"], "doc_id": ["d"], "grade": [1]}), tmp_path / "labels.parquet"
    )
    with pytest.raises(InputError, match="holds a space"):
        export(tmp_path / "out", "trec-qrels", tmp_path / "labels.parquet")


# ---------------------------------------------------------------------------------------------------------- datasets


def test_datasets_reads_the_subsets(tmp_path):
    result = export(tmp_path / "out", "datasets")
    assert result.lost == []
    out = str(tmp_path / "out")
    corpus = load_dataset(tmp_path, out, "corpus", split="corpus")
    queries = load_dataset(tmp_path, out, "queries", split="queries")
    test = load_dataset(tmp_path, out, "default", split="test")
    assert {r["_id"]: r["text"] for r in corpus} == {k: d["text"] for k, d in CORPUS.items()}
    assert {r["_id"]: r["text"] for r in queries} == QUERIES
    assert {(r["query-id"], r["corpus-id"], r["score"], "test") for r in test} == {
        x for x in GRADES if x[3] == "test"
    }
    first, again = read(SAMPLE), read(out)
    assert labels(again) == GRADES
    assert again.queries.equals(first.queries)
    assert documents(again) == documents(first)


# ---------------------------------------------------------------------------------------------------- training files


def test_sentence_transformers_takes_every_layout(tmp_path):
    """Its own collator tells anchor, positive, negatives and labels of our columns apart."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    collate = SentenceTransformerDataCollator(preprocess_fn=lambda texts, **_: {"texts": list(texts)})
    widths = {}
    for layout in ("pair", "triplet", "n-tuple", "labeled-pair"):
        out = tmp_path / layout
        more = {"negatives": 2} if layout == "n-tuple" else {}
        export(
            out,
            "sentence-transformers",
            pools=(str(SAMPLE / "bm25.run"),),
            layout=layout,
            splits=("train",),
            **more,
        )
        found = load_dataset(tmp_path, "parquet", data_files=str(out / "train.parquet"), split="train")
        batch = collate([found[i] for i in range(len(found))])
        columns = [k[: -len("_texts")] for k in batch if k.endswith("_texts")]
        widths[layout] = (columns, "label" in batch)
        assert batch[f"{columns[0]}_texts"][0] == QUERIES["q1"]
        assert batch[f"{columns[1]}_texts"][0] == JOINED["bread-1"]
    assert widths == {
        "pair": (["anchor", "positive"], False),
        "triplet": (["anchor", "positive", "negative"], False),
        "n-tuple": (["anchor", "positive", "negative_1", "negative_2"], False),
        "labeled-pair": (["anchor", "passage"], True),
    }


def test_sentence_transformers_columns_come_back(tmp_path):
    result = export(
        tmp_path / "out", "sentence-transformers", pools=(str(SAMPLE / "bm25.run"),), layout="triplet"
    )
    again = read(tmp_path / "out" / "train.parquet")
    texts = dict(zip(again.queries["query_id"].to_pylist(), again.queries["text"].to_pylist(), strict=True))
    found = {d["doc_id"]: d["text"] for d in documents(again)}
    assert {(texts[q], found[d]) for q, d in labels(again, "query_id", "doc_id")} == {
        (QUERIES[q], JOINED[d]) for q, d, g, _ in GRADES if g
    }
    pool = again.pool.to_pylist()
    q1 = [found[r["doc_id"]] for r in pool if texts[r["query_id"]] == QUERIES["q1"]]
    assert q1 == [
        JOINED["bread-4"],
        JOINED["bread-2"],
        JOINED["bicycle-4"],
    ]  # hardest first, as BM25 ranked them
    assert any("ids of queries" in line for line in result.lost)


def test_lists_with_labels_keep_their_grades(tmp_path):
    export(tmp_path / "out", "sentence-transformers", layout="labeled-list")
    again = read(tmp_path / "out" / "train.parquet")
    grades = sorted(g for (g,) in frame(again.judgments).select("grade").iter_rows())
    assert grades == sorted(g for *_, g, _ in GRADES)


def test_scores_that_are_no_whole_numbers_are_values(tmp_path):
    table = pa.table({"sentence1": ["a", "a"], "sentence2": ["b", "c"], "score": [0.75, -0.5]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    data = read(tmp_path / "pairs.parquet")
    assert labels(data, "grade", "value") == {(None, 0.75), (None, -0.5)}


def test_tevatron_rows_come_back_with_ids_titles_and_candidates(tmp_path):
    pool = (str(SAMPLE / "bm25.run"),)
    export(tmp_path / "v1", "tevatron", pools=pool, splits=("train",))
    found = load_dataset(tmp_path, "json", data_files=str(tmp_path / "v1" / "train.jsonl"), split="train")
    # The joins Tevatron does while training.
    passage = found[0]["positive_passages"][1]
    assert passage["title"] + " " + passage["text"] == JOINED["bread-3"]
    again = read(tmp_path / "v1")
    train = {x for x in GRADES if x[3] == "train" and x[2] > 0}
    assert labels(again, "query_id", "doc_id") == {x[:2] for x in train}
    ranks = frame(again.judgments).filter(pl.col("query_id") == "q1").sort("rank")
    assert ranks["doc_id"].to_list() == ["bread-1", "bread-3"]  # order is quality
    assert "river-3" in again.pool["doc_id"].to_pylist()  # a judged negative is read back as a candidate
    assert {d["doc_id"]: d["title"] for d in documents(again)}["bread-4"] == "Oven steam"


def test_tevatron_2_rows_find_their_documents(tmp_path):
    export(tmp_path / "v2", "tevatron-v2", pools=(str(SAMPLE / "bm25.run"),))
    rows = load_dataset(tmp_path, "json", data_files=str(tmp_path / "v2" / "train.jsonl"), split="train")
    corpus = load_dataset(tmp_path, "json", data_files=str(tmp_path / "v2" / "corpus.jsonl"), split="train")
    place = {d: i for i, d in enumerate(corpus["docid"])}
    assert corpus[place[rows[0]["positive_document_ids"][0]]]["text"] == JOINED["bread-1"]
    again = read(tmp_path / "v2")
    assert labels(again, "query_id", "doc_id") == {x[:2] for x in GRADES if x[2] > 0}
    assert {d["doc_id"]: d["text"] for d in documents(again)} == JOINED


def test_flagembedding_rows_with_scores_prompt_and_type(tmp_path):
    row = {
        "query": "why do rivers bend",
        "pos": ["The outside of a curve wears away.", "Sand settles inside."],
        "neg": ["Bread rises."],
        "pos_scores": [0.9, 0.8],
        "neg_scores": [0.1],
        "prompt": "Represent this sentence",
        "type": "normal",
    }
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as out:
        out.write(json.dumps(row) + "\n" + json.dumps({"query": "x", "pos": "a", "neg": []}) + "\n")
    data = read(tmp_path / "train.jsonl.gz")
    assert len(data.dead) == 1
    assert data.dead[0].line == 2
    assert sorted(labels(data, "value", "rank", "grade")) == [(0.8, 2, 1), (0.9, 1, 1)]
    assert data.pool.to_pylist()[0]["score"] == 0.1
    judged = read(tmp_path / "train.jsonl.gz", negatives="judged")
    assert sorted(labels(judged, "grade", "value")) == [(0, 0.1), (1, 0.8), (1, 0.9)]
    result = export(tmp_path / "out", "flagembedding", tmp_path / "train.jsonl.gz")
    assert json.loads((tmp_path / "out" / "train.jsonl").read_text()) == row
    assert not any("scores" in line for line in result.lost)


def test_pylate_scores_are_a_teacher_s_values(tmp_path):
    for name, table in {
        "train": {"query_id": [1, 2], "document_ids": [[10, 11], [12]], "scores": [[0.5, -1.25], [2.0]]},
        "queries": {"query_id": [1, 2], "text": ["one", "two"]},
        "documents": {"document_id": [10, 11, 12], "text": ["ten", "eleven", "twelve"]},
    }.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    data = read(tmp_path)
    assert labels(data, "query_id", "doc_id", "value", "label_source", "signal") == {
        ("1", "10", 0.5, "llm", "teacher_score"),
        ("1", "11", -1.25, "llm", "teacher_score"),
        ("2", "12", 2.0, "llm", "teacher_score"),
    }
    export(tmp_path / "out", "pylate", tmp_path)
    rows = load_dataset(
        tmp_path, "parquet", data_files=str(tmp_path / "out" / "train.parquet"), split="train"
    )
    assert rows[0] == {"query_id": "1", "document_ids": ["10", "11"], "scores": [0.5, -1.25]}
    again = read(tmp_path / "out")
    assert labels(again, "query_id", "doc_id", "value") == labels(data, "query_id", "doc_id", "value")
    assert [d["text"] for d in documents(again)] == ["ten", "eleven", "twelve"]


# ------------------------------------------------------------------------------------------------- tables and asking


def test_a_bare_table_says_who_judged_or_is_told(tmp_path):
    lines = [json.dumps({"query_id": "q", "doc_id": f"d{i}", "label": i, "note": "kept"}) for i in range(3)]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    data = read(tmp_path / "labels.jsonl", annotator="nadia", signal="graded")
    assert labels(data, "doc_id", "grade", "annotator", "signal", "parse_status") == {
        (f"d{i}", i, "nadia", "graded", "ok") for i in range(3)
    }
    assert data.judgments["note"].to_pylist() == ["kept"] * 3  # columns nobody knows are kept


def test_contradictions_are_not_chosen_between(tmp_path):
    (tmp_path / "labels.jsonl").write_text(
        '{"query_id": "q", "doc_id": "d", "grade": 1}\n{"query_id": "q", "doc_id": "d", "grade": 0}\n'
    )
    with pytest.raises(InputError, match="contradict"):
        read(tmp_path / "labels.jsonl")
    (tmp_path / "labels.jsonl").write_text('{"query_id": "q", "doc_id": "d", "grade": 1}\n' * 3)
    data = read(tmp_path / "labels.jsonl")
    assert data.judgments.num_rows == 1
    assert data.notes == ["2 rows said the same again and were left out"]


@pytest.mark.parametrize("name", ["nothing.txt", "bike.csv"])
def test_what_is_not_known_is_said(tmp_path, name):
    (tmp_path / name).write_text("gears,chains\n1,2\n")
    with pytest.raises(InputError, match="no format known"):
        read(tmp_path / name)
    with pytest.raises(InputError, match="no such input"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match="no format 'csv'"):
        read(tmp_path / name, "csv")


def test_every_format_is_told_by_looking(tmp_path):
    pool = (str(SAMPLE / "bm25.run"),)
    for name in formats.names(writable=True):
        export(tmp_path / name, name, pools=pool)
        files = sorted(p for p in (tmp_path / name).iterdir() if p.suffix in (".qrels", ".run"))
        source = files[0] if files else tmp_path / name
        assert formats.read(str(source))[1] == name


def test_an_export_replaces_only_an_export(tmp_path):
    export(tmp_path / "out", "beir")
    with pytest.raises(OutputError, match="--overwrite"):
        export(tmp_path / "out", "beir")
    export(tmp_path / "out", "trec-qrels", overwrite=True)
    assert not (tmp_path / "out" / "corpus.jsonl").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="pass another -o"):
        export(tmp_path / "mine", "beir", overwrite=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_a_format_cannot_hold_is_said(tmp_path):
    result = export(tmp_path / "out", "beir", SAMPLE / "llm.jsonl")
    said = "\n".join(result.lost)
    assert "1 replies that could not be read" in said
    assert "annotator of 25 labels (sample-judge)" in said
    assert "pool_rank of 25 labels" in said
    assert "label_source of 25 labels (llm)" in said
