"""What a report is made of: word differences, heat, histograms, samples, numbers as people read them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.report.formatting import count, heat_pieces, percent, seconds, size
from pipelines.report.stats import Agreement, Histogram, Smallest, row_hashes
from pipelines.report.words import tokenize, word_diff

words = st.text(alphabet=st.sampled_from("ab .,!'’\nße_<&"), max_size=40)


@given(words, words)
def test_differences_join_to_both_texts(before, after):
    pieces = word_diff(before, after)
    assert "".join(t for k, t in pieces if k != "insert") == before
    assert "".join(t for k, t in pieces if k != "delete") == after
    assert all(t for _, t in pieces)
    assert before != after or all(k == "equal" for k, _ in pieces)


@given(st.text(max_size=60))
def test_tokens_join_to_the_text(text):
    assert "".join(tokenize(text)) == text


def test_differences_show_phrases_not_patchwork():
    pieces = word_diff("You are a damn fool, sir.", "You are mistaken, sir.")
    assert pieces == [
        ("equal", "You are "),
        ("delete", "a damn fool"),
        ("insert", "mistaken"),
        ("equal", ", sir."),
    ]


def test_very_long_texts_are_compared_by_head_and_tail():
    common = "word " * 15_000
    pieces = word_diff(common + "old " + common, common + "new " + common)
    assert [(k, t) for k, t in pieces if k != "equal"] == [("delete", "old"), ("insert", "new")]


spans = st.lists(
    st.tuples(st.integers(-5, 45), st.integers(0, 30), st.one_of(st.none(), st.floats(0, 1))), max_size=5
)


@given(st.text(min_size=0, max_size=30), spans, st.integers(0, 10))
def test_heat_covers_the_text_once_with_the_largest_score(text, drawn, offset):
    found = [{"start": s, "end": s + n, "score": score} for s, n, score in drawn]
    pieces = heat_pieces(text, found, offset=offset)
    assert "".join(t for t, _ in pieces) == text
    at = 0
    for piece, heat in pieces:
        for i in range(at, at + len(piece)):
            over = [
                1.0 if f["score"] is None else f["score"]
                for f in found
                if f["start"] <= i + offset < f["end"]
            ]
            assert heat == (max(over) if over else None)
        at += len(piece)


@given(st.lists(st.floats(-0.5, 1.5) | st.just(float("nan")), max_size=60), st.integers(1, 7))
def test_histograms_do_not_depend_on_batches(values, step):
    whole, parts = Histogram(), Histogram()
    whole.add(np.array(values))
    for i in range(0, len(values), step):
        parts.add(np.array(values[i : i + step]))
    assert whole.counts.tolist() == parts.counts.tolist()
    assert whole.counts.sum() == whole.n == sum(v == v for v in values)
    assert whole.above == parts.above


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1) | st.just(float("nan"))), min_size=3, max_size=50))
def test_agreement_is_pearsons_r_over_what_both_scored(pairs):
    a, b = (np.array(c) for c in zip(*pairs, strict=True))
    agreement = Agreement(["a", "b"])
    for part in (slice(0, 2), slice(2, None)):
        agreement.add([a[part], b[part]])
    both = ~np.isnan(b)
    assert agreement.count(0, 1) == both.sum()
    r = agreement.correlation(0, 1)
    if r is not None:
        assert r == pytest.approx(np.corrcoef(a[both], b[both])[0, 1], abs=1e-3)
    only_a = ((a >= 0.5) & (b < 0.5) & both).sum()
    assert agreement.table[0, 1, 1, 0] == only_a == agreement.table[1, 0, 1, 1]


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=60), st.integers(1, 8), st.integers(1, 9))
def test_the_smallest_are_kept_whatever_the_batches(keys, k, step):
    kept = Smallest(k)
    for i in range(0, len(keys), step):
        part = np.array(keys[i : i + step])
        kept.offer(part, list(range(i, i + len(part))))
    order = sorted((v, i) for i, v in enumerate(keys) if v == v)
    assert kept.items == [i for _, i in order[:k]]


def test_row_hashes_are_uniform_and_fixed():
    hashes = row_hashes("a/b.parquet", np.arange(10_000))
    assert hashes[:3] == pytest.approx(row_hashes("a/b.parquet", np.array([0, 1, 2])))
    assert row_hashes("x", np.array([5]))[0] != row_hashes("y", np.array([5]))[0]
    assert abs(hashes.mean() - 0.5) < 0.01
    assert len(np.unique(hashes)) == 10_000


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 %"), (1, "100 %"), (0.5, "50.0 %"), (0.99996, "99.996 %"), (0.0004, "0.04 %")]
)
def test_shares_are_never_rounded_to_all_or_nothing(value, text):
    assert percent(value) == text


def test_numbers_read_well():
    assert count(1234567) == "1,234,567"
    assert seconds(0.25) == "250 ms" and seconds(61) == "61.0 s" and seconds(3_725) == "1 h 02 min"
    assert size(999) == "999 B" and size(1_234_567) == "1.2 MB"
    assert count(None) == percent(None) == seconds(None) == size(None) == "–"
