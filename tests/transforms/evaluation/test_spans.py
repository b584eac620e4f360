"""Spans in every form, mixes of sources, the shared task's score."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InputError
from transforms.evaluation.spans import (
    ScoredSpan,
    mix_offsets,
    mixes_of,
    parse_spans,
    score_mix,
    sources_of,
    sweep,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        ("[]", []),
        ("[3, 4, 5, 9]", [(3, 6), (9, 10)]),
        ([5, 3, 4, 4], [(3, 6)]),
        ([[3, 6], (9, 10)], [(3, 6), (9, 10)]),
        ("[(9, 10), (3, 6)]", [(3, 6), (9, 10)]),
        ([{"start": 3, "end": 6}], [(3, 6)]),
        ("[{'start': 3, 'end': 6, 'score': None}]", [(3, 6)]),
    ],
)
def test_every_form_is_read(value, expected):
    assert [(s.start, s.end) for s in parse_spans(value)] == expected


def test_scores_and_sources_come_along():
    [span] = parse_spans([{"start": 0, "end": 4, "score": 0.25, "source": "lexicon+occlusion"}])
    assert span == ScoredSpan(0, 4, 0.25, "lexicon+occlusion")


@pytest.mark.parametrize("value", ["[1, 2", "abc", [1.5, 2.5], [{"start": 1}], [True], ["a"]])
def test_what_is_no_span_is_said_with_its_place(value):
    with pytest.raises(InputError, match="row 7"):
        parse_spans(value, "row 7")


@given(st.sets(st.integers(0, 60)))
def test_offsets_survive(offsets):
    spans = parse_spans(str(sorted(offsets)))
    assert {i for s in spans for i in range(s.start, s.end)} == offsets
    assert all(a.end < b.start for a, b in itertools.pairwise(spans))


POST = [
    ScoredSpan(0, 4, 0.9, "lexicon"),
    ScoredSpan(6, 9, 0.3, "occlusion"),
    ScoredSpan(10, 12, 0.5, "lexicon+occlusion"),
]


def test_mixes_are_unions_and_united_spans_count_for_each_source():
    assert sources_of([POST, []]) == ["lexicon", "occlusion"]
    assert mixes_of(["a", "b", "c"]) == [
        ("a",),
        ("b",),
        ("c",),
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
        ("a", "b", "c"),
    ]
    assert len(mixes_of(list("abcdef"))) == 7 and mixes_of([]) == []
    lexicon, occlusion = mix_offsets(POST, ["lexicon"]), mix_offsets(POST, ["occlusion"])
    assert lexicon == {0, 1, 2, 3, 10, 11} and occlusion == {6, 7, 8, 10, 11}
    assert mix_offsets(POST, ["lexicon", "occlusion"]) == lexicon | occlusion
    assert mix_offsets(POST, ["lexicon", "occlusion"], 0.5) == lexicon


def test_the_shared_tasks_rules_for_empty_posts():
    gold = [set(), set(), {1, 2}, {0, 1, 2, 3}]
    predicted = [set(), {4}, set(), {2, 3, 4, 5}]
    figures = score_mix(predicted, gold, draws=200)
    assert figures.each.tolist() == [1, 0, 0, 0.5]
    assert figures.f1.mean == 0.375 and figures.f1_toxic.mean == 0.25
    assert figures.precision.mean == pytest.approx(2 / 5) and figures.recall.mean == pytest.approx(2 / 6)
    assert figures.empty == 2


def test_nothing_predicted_and_nothing_to_find():
    figures = score_mix([set(), set()], [set(), set()], draws=200)
    assert figures.f1.mean == 1 and figures.f1_toxic is None and figures.precision is None


def test_a_sweep_falls_back_to_nothing():
    points = dict(sweep([POST], [{0, 1, 2, 3}], ["lexicon", "occlusion"], [0.0, 0.6, 0.95]))
    assert points[0.6] == 1 and 0 < points[0.0] < 1 and points[0.95] == 0
