"""A corpus as retrievers see it: numbers, order, and what is built by which pass."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipelines.retrieval.corpus import CorpusSource, Workshop, documents_in
from schemas.errors import InputError, ModelError
from schemas.judgments import DOCUMENT_SCHEMA
from transforms.embed.text import TextTemplate
from transforms.retrieval.lexical import BM25Settings, LexicalIndex
from transforms.shards.files import Folder

ROWS = [
    ("c", "t", "one two"),
    ("a", None, "two"),
    ("c", None, "repeated id"),
    ("b", "", None),
    ("d", None, " two"),
]


class Documents:
    """Documents in batches of two; counts how often it is read."""

    def __init__(self, rows=ROWS) -> None:
        self.rows, self.passes = list(rows), 0

    def __call__(self):
        self.passes += 1
        for i in range(0, len(self.rows), 2):
            part = [{"doc_id": d, "title": t, "text": x} for d, t, x in self.rows[i : i + 2]]
            yield pa.RecordBatch.from_pylist(part, schema=DOCUMENT_SCHEMA)


def source(documents, mark="m"):
    return CorpusSource(documents, TextTemplate("{title} {text}"), mark)


def test_ids_numbers_and_counts(tmp_path):
    corpus = Workshop(Folder(str(tmp_path))).prepare(source(Documents()))
    assert corpus.ids.to_pylist() == ["c", "a", "b", "d"]
    assert corpus.numbers(["d", "nobody", "c"]).tolist() == [3, -1, 0]
    assert corpus.order.tolist() == [2, 0, 1, 3]  # places of the ids in alphabetical order
    assert corpus.sorted_ids() == ["a", "b", "c", "d"]
    assert corpus.names(np.array([1, 3])) == ["a", "d"]
    assert corpus.counts == {"documents": 4, "empty": 1, "repeated_ids": 1, "repeated_texts": 1}


def test_a_pass_builds_what_is_missing_and_no_more(tmp_path):
    pytest.importorskip("bm25s")
    documents = Documents()
    shop, one, other = Workshop(Folder(str(tmp_path))), BM25Settings(), BM25Settings(k1=1.5)
    shop.prepare(source(documents), bm25=[one])
    assert documents.passes == 2  # the second leaves out the repeated id
    shop.prepare(source(documents), bm25=[one])
    assert documents.passes == 2
    corpus = shop.prepare(source(documents), bm25=[one, other], texts=True)
    assert documents.passes == 3
    for settings in (one, other):
        index = LexicalIndex(shop.index_place(source(documents), settings), settings.analyzer)
        numbers, _, _ = index.best("two", 9, corpus.order)
        assert sorted(corpus.names(numbers)) == ["a", "c", "d"]
        assert index.scores("repeated") is None
    parts = sorted((tmp_path).rglob("text/*.parquet"))
    assert pa.parquet.read_table(parts[0])["doc_id"].to_pylist() == ["c", "a", "b", "d"]


def test_a_corpus_without_text_or_documents_is_refused(tmp_path):
    shop = Workshop(Folder(str(tmp_path)))
    with pytest.raises(InputError, match="no documents"):
        shop.prepare(source(Documents([])))
    with pytest.raises(InputError, match="none of 1 documents has text"):
        shop.prepare(source(Documents([("a", None, " ")])))


def test_a_missing_library_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ModelError, match=r"BM25 needs bm25s: pip install 'tamis\[retrieval\]'"):
        BM25Settings()


def test_documents_are_picked_once_each():
    batches = list(documents_in(["c", "d"], Documents()))
    assert [r["text"] for b in batches for r in b.to_pylist()] == ["one two", " two"]
