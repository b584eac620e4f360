"""Segments tile the text exactly, whatever the text."""

from __future__ import annotations

import time

import pytest
from detox_parts import in_flight
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas import flight
from transforms.detox.options import SEGMENT_DEFAULTS, SegmentOptions
from transforms.detox.segment import segment_spans, segment_text

# What Arrow can hold: any code point but the surrogates.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WEBBY = st.lists(
    st.sampled_from(
        [
            "Hello there.",
            "You fool!",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\n\n",
            "\t",
            "\x00",
            "Dr. No",
            "😀",
            "👨‍👩‍👧",
            "e\u0301",
            "。",
            "“Yes.”",
            "x" * 90,
            "a, b; c",
        ]
    )
).map("".join)


def pieces(text: str, options: SegmentOptions = SEGMENT_DEFAULTS) -> list[str]:
    return [text[a:b] for a, b in segment_spans(text, options)]


@settings(max_examples=400, deadline=None)
@given(st.one_of(ANY_TEXT, WEBBY), st.sampled_from([40, 60, 600]))
@example("\r\n\r\n a\r\n\r\n", 40)
@example("\n" * 25_000, 600)
@example(" \n" * 6_000 + "a", 600)
@example("é\u0301" * 9_000, 600)
def test_segments_tile_the_text(text, max_chars):
    spans = segment_spans(text, SegmentOptions(max_chars=max_chars))
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(a < b for a, b in spans)
    assert [a for a, _ in spans] == [0, *(b for _, b in spans)][: len(spans)]
    # No segment is longer than allowed (its trailing whitespace aside), none but the first starts with whitespace.
    assert all(len(text[a:b].strip()) <= max_chars for a, b in spans[1:])
    assert not any(text[a].isspace() for a, _ in spans[1:])


def test_sentences_are_told_apart_and_abbreviations_are_not():
    assert pieces("Hello there. You fool!\r\nDr. Smith left.") == [
        "Hello there. ",
        "You fool!\r\n",
        "Dr. Smith left.",
    ]


def test_a_line_ends_a_segment_but_a_hard_wrap_does_not():
    assert pieces("Buy milk\nCall Ann\n- rest") == ["Buy milk\n", "Call Ann\n", "- rest"]
    assert pieces("This sentence goes on\nover the line.") == ["This sentence goes on\nover the line."]
    assert pieces("one\n\ntwo") == ["one\n\n", "two"]


def test_long_segments_are_cut_at_clauses_then_spaces_then_hard():
    clauses = "word " * 8 + "end, " + "word " * 12
    first = pieces(clauses, SegmentOptions(max_chars=60))[0]
    assert first.endswith("end, ")
    assert all(p.endswith(" ") for p in pieces("word " * 100, SegmentOptions(max_chars=60)))
    assert [len(p) for p in pieces("x" * 100, SegmentOptions(max_chars=60))] == [60, 40]


def test_a_hard_cut_tears_no_character_apart():
    families = "👨‍👩‍👧" * 30  # five code points each
    accents = "e\u0301" * 60
    assert all(p[0] == "👨" and p[-1] == "👧" for p in pieces(families, SegmentOptions(max_chars=47)))
    assert all(p[0] == "e" for p in pieces(accents, SegmentOptions(max_chars=41)))


def test_unit_document_is_one_segment():
    assert pieces("One. Two.\n\nThree.", SegmentOptions(unit="document")) == ["One. Two.\n\nThree."]


def test_null_and_empty_texts():
    counts = {}
    batch = segment_text(
        in_flight([None, "", "Hi. You."]),
        text_column="text",
        count=lambda name, n: counts.update({name: n}),
    )
    assert flight.scratch(batch, "segments").to_pylist() == [
        None,
        [],
        [{"start": 0, "end": 4}, {"start": 4, "end": 8}],
    ]
    assert counts == {"segment.segments": 2, "segment.chars": 8}
    assert segment_text(in_flight([]), text_column="text").num_rows == 0


@pytest.mark.parametrize(
    "piece", ["You fool. ", "x", "word ", '"', "\n", " ", 'He said "a. b" then. ', "(", ".", "Mr. "]
)
def test_time_grows_with_the_length_not_its_square(piece):
    def seconds(n: int) -> float:
        text = (piece * (n // len(piece) + 1))[:n]
        start = time.perf_counter()
        segment_spans(text)
        return time.perf_counter() - start

    seconds(1000)
    small, large = seconds(100_000), seconds(1_600_000)
    assert large < 16 * small * 5 + 0.5  # a square would be 256 times


@pytest.mark.parametrize("offset", range(2_470, 2_505))
def test_run_on_text_is_never_cut_within_a_word(offset):
    words = "so he said and then we went on with it " * 200
    text = words[:offset].rsplit(" ", 1)[0].ljust(offset, " ") + "troublemaker so " + words
    for _, end in segment_spans(text):
        assert end == len(text) or text[end - 1].isspace(), text[end - 12 : end + 12]
    assert any("troublemaker" in text[a:b] for a, b in segment_spans(text))


def test_run_on_text_before_a_long_blank_tail_is_cut_as_it_is_without_it():
    words = "so he said and then we went on with it " * 2_000
    alone, tailed = segment_spans(words), segment_spans(words + " " * 300_000)
    assert tailed[:-1] == alone[:-1] and tailed[-1] == (alone[-1][0], len(words) + 300_000)
