"""BM25: words, scores against the formula, ties, and an index that is found again."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from schemas.errors import InputError, ModelError
from transforms.retrieval.lexical import Analyzer, BM25Settings, IndexBuilder, LexicalIndex

TEXTS = ["the cat sat on the mat", "a cat and a cat", "dogs bark", "", "the mat of the dog"]


def build(folder, texts=TEXTS, settings=None):
    settings = settings or BM25Settings()
    builder = IndexBuilder(settings)
    added = [builder.add(i, t) for i, t in enumerate(texts)]
    builder.save(folder)
    return LexicalIndex(folder, settings.analyzer), added


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cats' MAT, 2nd-best", ["cats", "mat", "2nd", "best"]),
        ("ﬁne Ångström Straße", ["fine", "ångström", "strasse"]),
        ("वह हिन्दी बोलती है", ["वह", "हिन्दी", "बोलती", "है"]),  # vowel signs stay with their letters
        ("東京大学", ["東京", "京大", "大学"]),
        ("iPhone用ケース", ["iphone", "用ケ", "ケー", "ース"]),
        ("", []),
    ],
)
def test_words(text, words):
    assert Analyzer().words(text) == words


def test_stemmer_and_stop_words_are_named_or_refused():
    pytest.importorskip("Stemmer")
    assert Analyzer("none", "english").words("the running dogs") == ["the", "run", "dog"]
    assert "stemmer_version" in Analyzer("en", "english").settings
    with pytest.raises(InputError, match="no stemmer 'klingon'"):
        Analyzer("en", "klingon")
    with pytest.raises(InputError, match="no stop words for 'xx'"):
        Analyzer("xx")


def test_scores_are_lucene_s_formula(tmp_path):
    index, added = build(tmp_path / "i")
    assert added == [True, True, True, False, True]
    words = [Analyzer().words(t) for t in TEXTS if t]
    mean = sum(map(len, words)) / len(words)

    def bm25(query: list[str], doc: list[str]) -> float:
        total = 0.0
        for w in query:
            df = sum(w in d for d in words)
            tf = doc.count(w)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(doc) / mean))
        return total

    expected = [bm25(["cat", "mat"], d) for d in words]
    assert index.scores("cat mat") == pytest.approx(expected, rel=1e-5)
    assert index.scores("zebra") is None


def test_best_orders_ties_by_id_and_leaves_out_what_shares_no_word(tmp_path):
    index, _ = build(tmp_path / "i", ["x y", "x y", "x y", "z"])
    order = np.array([2, 0, 1, 3])  # the places of the ids
    numbers, scores, seen = index.best("x", 2, order, watched=[0, 3])
    assert numbers.tolist() == [1, 2]
    assert seen == {
        0: (3, pytest.approx(float(scores[0])))
    }  # behind the cut, with its rank; 3 shares no word
    numbers, _, seen = index.best("x", 3, order, without=1, watched=[2])
    assert numbers.tolist() == [2, 0]
    assert seen[2][0] == 1


def test_an_index_of_no_words_is_refused(tmp_path):
    with pytest.raises(InputError, match="no document has a word"):
        build(tmp_path / "i", ["", "..."])


def test_a_missing_stemmer_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    assert Analyzer().words("running dogs") == ["running", "dogs"]
    with pytest.raises(ModelError, match=r"PyStemmer: pip install 'tamis\[retrieval\]'"):
        Analyzer("en", "english")
