"""Spans of toxic characters: by lexicon, by occlusion, and their union; and the score that judges them."""

from __future__ import annotations

import itertools

import pytest
from detox_parts import WordLexicon, WordScorer, in_flight
from hypothesis import given
from hypothesis import strategies as st

from schemas import flight
from transforms.detox.gate import gate_toxicity
from transforms.detox.localize import (
    LexiconLocalizer,
    OcclusionLocalizer,
    Span,
    find_spans,
    localize_toxic_spans,
    spans_for_text,
    unite,
)
from transforms.detox.segment import segment_text
from transforms.detox.span_f1 import character_f1, mean_character_f1, offsets_of

FILLER = "and the rain fell on the quiet town while nobody spoke "


def words_of(text, spans):
    return [text[s.start : s.end] for s in spans]


def test_occlusion_finds_the_words_that_carry_the_score():
    text = "What a stupid rule, said the idiot."
    spans = spans_for_text(text, [OcclusionLocalizer(WordScorer())])
    assert words_of(text, spans) == ["stupid", "idiot"]
    assert all(0 < s.score <= 1 and s.source == "occlusion" for s in spans)


@pytest.mark.parametrize("repeats", [4, 100, 1_000])
@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
def test_occlusion_of_a_whole_document_costs_a_bounded_number_of_copies(repeats, place):
    before = round(repeats * place)
    text = FILLER * before + "what a stupid rule it was " + FILLER * (repeats - before)
    scorer = WordScorer()
    (spans,) = OcclusionLocalizer(scorer).find([text])
    assert words_of(text, spans) == ["stupid"]
    assert sum(len(t) for call in scorer.calls for t in call) < 300 * len(text)
    assert max(sum(map(len, call)) for call in scorer.calls) <= 66 * len(text)


def test_occlusion_finds_words_that_hide_each_other():
    # Either word alone keeps the score at 0.9 or more: leaving out just one moves it by less than a tenth.
    text = "The idiot met a moron today."
    localizer = OcclusionLocalizer(WordScorer(), min_drop=0.2)
    assert words_of(text, localizer.find([text])[0]) == ["idiot", "moron"]


def test_neighbouring_hot_words_are_one_span_and_punctuation_stays_outside():
    text = "You “stupid idiot”!"
    assert words_of(text, spans_for_text(text, [OcclusionLocalizer(WordScorer())])) == ["stupid idiot"]


def test_a_long_text_is_searched_by_windows_first():
    text = FILLER * 30 + "you idiot " + FILLER * 30
    scorer = WordScorer()
    spans = OcclusionLocalizer(scorer).find([text])[0]
    assert words_of(text, spans) == ["idiot"]
    assert sum(len(c) for c in scorer.calls) < len(text.split()) / 3


def test_a_text_the_classifier_finds_harmless_has_no_spans():
    assert OcclusionLocalizer(WordScorer()).find(["All is well.", "", "...", "   "]) == [[], [], [], []]


def test_the_searches_of_a_batch_share_their_calls():
    scorer = WordScorer()
    texts = [f"You idiot number {i}." for i in range(20)]
    assert all(
        words_of(t, s) == ["idiot"]
        for t, s in zip(texts, OcclusionLocalizer(scorer).find(texts), strict=True)
    )
    assert len(scorer.calls) <= 4


def test_the_union_keeps_who_said_so():
    text = "A stupid, damn rule"
    found = find_spans(
        [text], [LexiconLocalizer(WordLexicon(["stupid", "rule"])), OcclusionLocalizer(WordScorer())]
    )
    assert [(text[s.start : s.end], s.source) for s in found[0]] == [
        ("stupid", "lexicon+occlusion"),
        ("damn", "occlusion"),
        ("rule", "lexicon"),
    ]


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 8), st.floats(0, 1), st.sampled_from("abc")), max_size=12
    )
)
def test_united_spans_are_disjoint_ascending_and_cover_the_same_characters(raw):
    spans = [Span(start, start + width, score, source) for start, width, score, source in raw]
    united = unite(spans)
    assert offsets_of(united) == offsets_of(spans)
    assert all(a.end <= b.start for a, b in itertools.pairwise(united))
    assert unite(united) == united


def test_spans_are_in_document_offsets_and_only_in_flagged_segments():
    texts = ["😀 Fine rule. You stupid idiot, rule. ", None, "", "A rule."]
    batch = segment_text(in_flight(texts), text_column="text")
    batch = gate_toxicity(batch, text_column="text", classifier=WordScorer())
    counts: dict[str, int] = {}
    localizers = [LexiconLocalizer(WordLexicon(["rule"])), OcclusionLocalizer(WordScorer())]
    batch = localize_toxic_spans(
        batch, text_column="text", localizers=localizers, count=lambda k, n: counts.update({k: n})
    )
    rows = flight.attribute(batch, "spans").to_pylist()
    assert [texts[0][s["start"] : s["end"]] for s in rows[0]] == ["stupid idiot", "rule"]
    assert rows[1:] == [None, [], []]
    assert counts == {"localize.segments": 1, "localize.spans": 2, "localize.none": 0}


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        ([], [], 1.0),
        ([1], [], 0.0),
        ([], [1], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [3, 4, 5, 6], 0.5),
        ([1, 2], [1, 2, 3, 4, 5, 6], 0.5),  # precision 1, recall 1/3
        ([1, 1, 1, 2], [1, 2], 1.0),
        ([7], [8], 0.0),
    ],
)
def test_character_f1_by_hand(predicted, gold, expected):
    assert character_f1(predicted, gold) == pytest.approx(expected)


def test_the_mean_is_over_posts():
    assert mean_character_f1([[], [1, 2]], [[], [2, 3]]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="as many predictions as posts"):
        mean_character_f1([[1]], [])
