"""Labelled texts and spans: what their columns say, who is held out, and what may not be learned from."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.labelled import (
    CALIBRATE,
    TEST,
    TRAIN,
    LabelledSource,
    label_names,
    read_examples,
    repeats_of,
    side_of,
    split_key,
    training_tag,
)
from models.training.shards import list_shards
from models.training.spans import IGNORE, SpanSource, parse_spans, read_span_examples, token_targets
from schemas.errors import InputError, TamisError
from tests.models.tiny_classifier import WORDS, save_settings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_settings(tmp_path_factory.mktemp("tiny")))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tokenizer, *sources, max_length=32, eval_fraction=0.2):
    listings = [list_shards(s.data) for s in sources]
    return read_examples(sources, listings, tokenizer, max_length=max_length, eval_fraction=eval_fraction)


def test_a_set_says_what_its_columns_mean():
    assert LabelledSource.parse("a,b.csv,text=tweet,label=class,positive=0+1,weight=2.5") == LabelledSource(
        "a,b.csv", "tweet", (), "class", ("0", "1"), 2.5
    )
    shared = {"label_column": "label", "positive": ("hate",)}
    assert LabelledSource.parse("x", **shared).names == ("toxicity",)
    other = LabelledSource.parse(
        "y,labels=toxic+insult", **shared
    )  # its own labels replace the shared column
    assert (other.labels, other.label_column) == (("toxic", "insult"), "")
    assert LabelledSource.parse("dir/my set.csv.gz", labels=("a",)).title == "my-set"
    assert training_tag("x", ["a"]) != training_tag("x", ["b"])


@pytest.mark.parametrize(
    ("text", "shared", "message"),
    [
        ("x", {}, "--labels"),
        ("x,label=c", {}, "--positive"),
        ("x,label=c,positive=1,labels=a", {}, "both"),
        ("x,labels=a,weight=two", {}, "no number"),
        ("x,labels=a,weight=0", {}, "above 0"),
    ],
)
def test_a_set_that_says_too_little_or_too_much_is_refused(text, shared, message):
    with pytest.raises(TamisError, match=message):
        LabelledSource.parse(text, **shared)


def test_labels_of_several_sets_are_united_and_what_a_set_does_not_say_is_unknown(tokenizer, tmp_path):
    many = [
        {"text": f"you are {w}", "insult": i % 2, "toxicity": [0, 1, 0.4][i % 3]} for i, w in enumerate(WORDS)
    ]
    one = [{"tweet": f"the {w} is nice", "class": i % 3} for i, w in enumerate(WORDS)]
    first = LabelledSource(write(tmp_path / "a.jsonl", many), labels=("insult", "toxicity"))
    second = LabelledSource(write(tmp_path / "b.jsonl", one), "tweet", (), "class", ("0", "1"))
    assert label_names([first, second]) == ("toxicity", "insult")
    examples = read(tokenizer, first, second)
    assert examples.targets.shape == (2 * len(WORDS), 2)
    assert np.isnan(examples.targets[examples.source == 1, 1]).all()
    np.testing.assert_allclose(examples.targets[2], [0.4, 0.0], atol=1e-6)
    assert examples.targets[examples.source == 1, 0].tolist()[:3] == [1.0, 1.0, 0.0]
    assert examples.counts["rows"] == examples.counts["examples"] == 2 * len(WORDS)


def test_unknown_and_empty_rows_are_counted_and_long_texts_cut(tokenizer, tmp_path):
    rows = [{"text": f"{w} tea", "a": i % 2} for i, w in enumerate(WORDS)]
    rows += [{"text": "", "a": 1}, {"text": None, "a": 1}, {"text": " ", "a": 0}]
    rows += [{"text": "nice tea", "a": v} for v in (None, "", -1, "-1", math.nan)]
    rows += [{"text": "very " * 40, "a": v} for v in (True, "true", "1.0")]
    rows = [{k: v for k, v in row.items() if v == v} for row in rows]  # JSON has no NaN
    path = write(
        tmp_path / "a.jsonl", [{**r, "a": None if r.get("a") is None else str(r["a"])} for r in rows]
    )
    examples = read(tokenizer, LabelledSource(path, labels=("a",)), max_length=16)
    assert (examples.counts["empty"], examples.counts["unlabelled"], examples.counts["cut"]) == (3, 5, 3)
    assert examples.lengths.max() == 16 and (examples.targets[-3:] == 1).all()


def write_as(form, path, rows):
    """Rows as CSV, JSON lines or Parquet; what is no text there goes into the file as that format writes it."""
    if form == "csv":
        with path.with_suffix(".csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([rows[0], *(row.values() for row in rows)])
        return str(path.with_suffix(".csv"))
    if form == "jsonl":
        return write(path.with_suffix(".jsonl"), rows)
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", [{"labels": ("a",)}, {"label_column": "a", "positive": ("1", "none")}])
def test_rows_without_a_label_are_counted_and_not_taken_for_negatives(tokenizer, tmp_path, form, column):
    rows = [{"text": f"{w} tea", "a": str(i % 2)} for i, w in enumerate(WORDS)]
    rows += [{"text": "nice tea", "a": v} for v in (None, "", "  ", "NaN", "null")]
    examples = read(tokenizer, LabelledSource(write_as(form, tmp_path / "a", rows), **column))
    assert (examples.counts["unlabelled"], examples.counts["examples"]) == (5, len(WORDS))


@pytest.mark.parametrize("column", [{"labels": ("a",)}, {"label_column": "a", "positive": ("1",)}])
def test_numbers_that_are_none_are_no_label(tokenizer, tmp_path, column):
    rows = [{"text": f"{w} tea", "a": float(i % 2)} for i, w in enumerate(WORDS)]
    rows += [{"text": "nice tea", "a": v} for v in (math.nan, None)]
    examples = read(tokenizer, LabelledSource(write_as("parquet", tmp_path / "a", rows), **column))
    assert (examples.counts["unlabelled"], examples.counts["examples"]) == (2, len(WORDS))


def test_a_class_called_like_nothing_is_a_class_where_it_is_named(tokenizer, tmp_path):
    rows = [{"text": f"{w} tea", "a": ["null", "none"][i % 2]} for i, w in enumerate(WORDS)]
    path = write(tmp_path / "a.jsonl", [*rows, {"text": "nice", "a": None}])
    examples = read(tokenizer, LabelledSource(path, label_column="a", positive=("null",)))
    assert examples.targets[:3, 0].tolist() == [1, 0, 1] and examples.counts["unlabelled"] == 1


@pytest.mark.parametrize(
    ("rows", "source", "message"),
    [
        ([{"text": "a", "x": "hate"}], {"labels": ("x",)}, "'hate' in column 'x'.*--label-column"),
        ([{"text": "a", "x": 2}], {"labels": ("x",)}, "is no label"),
        ([{"text": f"a {i}", "x": 1} for i in range(50)], {"labels": ("x",)}, "always on"),
        (
            [{"text": f"a {i}", "x": "b"} for i in range(50)],
            {"label_column": "x", "positive": ("c",)},
            "--positive",
        ),
        ([{"text": "", "x": 1}], {"labels": ("x",)}, "no labelled text"),
        ([{"text": 3, "x": 1}], {"labels": ("x",)}, "not text"),
        ([{"text": "a", "x": 1}], {"labels": ("y",)}, "no column 'y'"),
    ],
)
def test_labels_there_is_nothing_to_learn_of_are_refused(tokenizer, tmp_path, rows, source, message):
    with pytest.raises(InputError, match=message):
        read(tokenizer, LabelledSource(write(tmp_path / "a.jsonl", rows), **source))


@given(st.text(min_size=1), st.floats(0.05, 0.9))
def test_near_copies_fall_on_one_side(text, fraction):
    key = split_key(text)
    assert side_of(key, fraction) == side_of(split_key(f"  {text}\n"), fraction)
    assert side_of(key, 1.0) in (CALIBRATE, TEST)
    assert repeats_of(key, 3) == 3 and repeats_of(key, 0.25) in (0, 1)


def test_sides_and_weights_have_the_shares_they_are_given():
    sides = [side_of(f"text {i}", 0.2) for i in range(4000)]
    assert [round(sides.count(s) / 4000, 1) for s in (TRAIN, CALIBRATE, TEST)] == [0.8, 0.1, 0.1]
    assert 2.4 < np.mean([repeats_of(f"text {i}", 2.5) for i in range(4000)]) < 2.6


TEXT = "you idiot, ünderstand"


@pytest.mark.parametrize(
    "value",
    ["[4, 5, 6, 7, 8]", [4, 5, 6, 7, 8], [[4, 9]], "[[4, 9]]", [{"start": 4, "end": 9}], [[4, 6], [6, 9]]],
)
def test_spans_are_read_in_every_form(value):
    assert parse_spans(value, TEXT, "x") == frozenset(range(4, 9))


def test_no_span_is_written_in_several_ways():
    assert all(parse_spans(v, TEXT, "x") == frozenset() for v in (None, "", "[]", [], [[3, 3]]))


@pytest.mark.parametrize(
    "value", ["four", 4, ["a"], [[1]], [[9, 4]], [[0, 99]], [-1], {"start": 1}, [[1, 2, 3]], [1.5]]
)
def test_spans_of_no_known_form_are_refused(value):
    with pytest.raises(InputError, match=r"^x: "):
        parse_spans(value, TEXT, "x")


def test_tokens_are_toxic_where_half_their_characters_are():
    assert token_targets([(0, 0), (0, 4), (4, 8), (8, 9)], frozenset({2, 3, 4, 5, 6})).tolist() == [
        IGNORE,
        1,
        1,
        0,
    ]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(WORDS[:20]), min_size=1, max_size=60), st.integers(0, 59))
def test_every_toxic_word_is_a_target_in_some_window(tokenizer, tmp_path_factory, words, at):
    """Texts longer than a window lose no token: targets lie where the span is, each character's token once."""
    text, at = " ".join(words), at % len(words)
    start = len(" ".join([*words[:at], ""])) if at else 0
    path = write(
        tmp_path_factory.mktemp("spans") / "a.jsonl",
        [{"text": text, "spans": [[start, start + len(words[at])]]}, {"text": "nice tea", "spans": []}],
    )
    examples = read_span_examples(
        SpanSource(path), list_shards(path), tokenizer, max_length=10, eval_fraction=1e-12
    )
    mine = [t for t, o in zip(examples.targets, examples.owner, strict=True) if o == 0]
    flat = np.concatenate([t[t != IGNORE] for t in mine])
    assert flat.sum() == 1 and flat[at] == 1 and len(flat) == len(words)


def test_spans_that_are_nowhere_are_refused(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"tea {i}", "spans": []} for i in range(9)])
    with pytest.raises(InputError, match="--spans-column"):
        read_span_examples(SpanSource(path), list_shards(path), tokenizer, max_length=10, eval_fraction=0.1)
