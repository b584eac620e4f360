"""Minimal edits touch the toxic spans and mend what that breaks."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.detox.span_edits import (
    apply_hunks,
    delete_spans,
    join_spans,
    minimal_edits,
    neutralize_spans,
    redact_spans,
)


def at(text, *words):
    return [m.span() for w in words for m in re.finditer(re.escape(w), text)]


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("He is really dumb.", ["dumb"], "He is."),
        ("Damn, that was a damn good idea!", ["Damn", "damn"], "That was a good idea!"),
        ("What an awful stupid apple.", ["awful", "stupid"], "What an apple."),
        ("It was a stupid apple.", ["stupid"], "It was an apple."),
        ("It was an idiotic plan.", ["idiotic"], "It was a plan."),
        ("Shut up, moron, and go.", ["moron"], "Shut up, and go."),
        ("You are a stupid and noisy kid.", ["stupid"], "You are a noisy kid."),
        ("A dumb, slow bus.", ["dumb"], "A slow bus."),
        ("Idiots, all of them", ["Idiots"], "All of them"),
        ("Go home (you idiot).", ["you idiot"], "Go home ()."),
    ],
)
def test_deletion_mends_the_hole(text, words, expected):
    assert delete_spans(text, at(text, *words)) == expected


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("he is a moron who stole 40 euros", ["moron"], "he is a person who stole 40 euros"),
        ("Those morons lost it again.", ["morons"], "Those people lost it again."),
        ("Only an idiot would say so", ["idiot"], "Only a person would say so"),
        ("You are a stupid, noisy idiot.", ["stupid", "idiot"], "You are a noisy person."),
        ("That was a damn good idea", ["damn"], "That was a good idea"),
        ("Morons are odious, please go", ["Morons"], "People are odious, please go"),
        ("The smell of morons is bad", ["morons"], "The smell of people is bad"),
        ("I said that idiots have no say", ["idiots"], "I said that people have no say"),
        ("Stupid is as stupid does", ["Stupid"], "Is as stupid does"),
        ("I AM A FOOL", ["FOOL"], "I AM A PERSON"),
    ],
)
def test_a_noun_is_neutralised(text, words, expected):
    assert neutralize_spans(text, at(text, *words)) == expected


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        (
            "The FBI sent an SUV, an MP and one stupid agent to plan A or B.",
            ["stupid"],
            "The FBI sent an SUV, an MP and one agent to plan A or B.",
        ),
        (
            "Vitamin A is good, you fool, and take it daily.",
            ["fool"],
            "Vitamin A is good, you person, and take it daily.",
        ),
        (
            "Call std::sort ( v ) ; it works :) you idiot.",
            ["idiot"],
            "Call std::sort ( v ) ; it works :) you person.",
        ),
        ("... and  so\t he was a moron.", ["moron"], "... and  so\t he was a person."),
        ("And she was a stupid woman.", ["stupid"], "And she was a woman."),
        ("Quoi ? Non : he is a fool.", ["fool"], "Quoi ? Non : he is a person."),
    ],
)
def test_only_what_touches_the_hole_is_mended(text, words, expected):
    assert neutralize_spans(text, at(text, *words)) == expected


ODD = st.sampled_from(
    [
        "an SUV",
        "A or B",
        "a hour",
        ":)",
        "...",
        "std::sort",
        "( v )",
        "  ",
        "\t",
        " ?",
        " ;",
        ",",
        "“",
        "and",
        "an",
        "\n",
    ]
)
AROUND = st.lists(ODD, max_size=6).map(" ".join)


@given(AROUND, AROUND, AROUND, st.sampled_from(["idiot", "stupid", "fool"]))
def test_what_no_hole_touches_is_kept_to_the_byte(before, between, after, word):
    text = f"{before} alpha {word} beta {between} gamma {word} delta {after}"
    for edit in (delete_spans, neutralize_spans):
        done = edit(text, at(text, word))
        assert done.startswith(f"{before} alpha") or (before.isspace() and done.lstrip().startswith("alpha"))
        assert done.endswith(f"delta {after}") or not after.strip()
        assert f"beta {between} gamma" in done


def test_hunks_of_a_candidate_are_taken_at_the_spans_only():
    source = "Oh well, what a dumb rule, said Ben on May 4."
    candidate = "Well, what a poor rule, Ben said on May 5."
    assert (
        apply_hunks(source, candidate, at(source, "dumb")) == "Oh well, what a poor rule, said Ben on May 4."
    )
    assert apply_hunks(source, candidate, at(source, "rule")) == source
    assert apply_hunks(source, source, at(source, "dumb")) == source
    text = "He is a stupid idiot and took 4."
    other = "He is not so wise and stole 4."
    assert apply_hunks(text, other, at(text, "stupid", "idiot")) == "He is not so wise and took 4."


def test_redaction():
    text = "You stupid idiot! Such a moron."
    assert redact_spans(text, at(text, "stupid", "idiot", "moron")) == "You [redacted]! Such a [redacted]."
    assert redact_spans(text, at(text, "moron"), "***") == "You stupid idiot! Such a ***."
    assert redact_spans(text, [(5, 8)]) == "You [redacted] idiot! Such a moron."  # widened to the word


def test_minimal_edits_are_distinct_and_never_the_source():
    text = "You are an idiot."
    edits = minimal_edits(text, at(text, "idiot"), ["You are an angel.", "You are an ANGEL.", text])
    assert edits == ["You are an angel.", "You are a person.", "You are."]
    assert minimal_edits(text, [], ["Hi."]) == []
    assert minimal_edits("Idiot!", [(0, 5)], []) == []


TEXT = st.text(st.sampled_from("ab ,.aé😀\n’'(“")) | st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT, st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9))), TEXT)
def test_nothing_breaks_on_any_text(text, raw, candidate):
    spans = [(min(a, len(text)), min(a + n, len(text))) for a, n in raw]
    joined = join_spans(text, spans)
    assert all(a < b for a, b in joined)
    assert {i for s, e in spans for i in range(s, e)} <= {i for s, e in joined for i in range(s, e)}
    assert len(redact_spans(text, spans, "")) == len(text) - sum(b - a for a, b in joined)
    for edit in minimal_edits(text, spans, [candidate]):
        assert edit != text and edit.strip()
