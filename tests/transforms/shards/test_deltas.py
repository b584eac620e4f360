"""Deltas: whatever ranges are asked for, each row gets its own change and every other value stays."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import flight
from schemas.columns import to_original_type
from tests.helpers import Drop, Fail, Replace, in_flight
from transforms.shards.deltas import CHANGED, NEW_TEXT, DeltaCursor, apply_delta, pick_rows, unit_file
from transforms.shards.steps import StepContext, apply_step

TEXTS = st.lists(st.sampled_from(["fine", "idiot", "spam", "poison", "idiot spam", "", None]), max_size=30)
TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())]


def unit(texts):
    """A unit file as the engine commits it."""
    batch = in_flight(texts)
    original = batch.column("text")
    for step in (Drop(), Fail(), Replace()):
        batch = apply_step(step, batch, StepContext("text"))
    return unit_file(batch, "text", original)


def parts(total, sizes):
    """Cut 0..total at sizes, the rest last: (start, length) pairs."""
    found, at = [], 0
    for size in [*sizes, total]:
        size = min(size, total - at)
        found.append((at, size))
        at += size
    return found


@given(
    TEXTS,
    st.lists(st.integers(1, 9), max_size=6),
    st.lists(st.integers(0, 9), max_size=9),
    st.sampled_from(TYPES),
)
@settings(deadline=None, max_examples=60)
def test_units_and_chunks_may_be_cut_anywhere(texts, units, chunks, type_):
    cuts = [(a, n) for a, n in parts(len(texts), units) if n]
    loaded = []

    def load(i):
        loaded.append(i)
        start, length = cuts[i]
        return unit(texts[start : start + length])

    cursor = DeltaCursor([a for a, _ in cuts], [n for _, n in cuts], load)
    table = pa.table({"n": range(len(texts)), "text": to_original_type(pa.array(texts, pa.string()), type_)})
    out = [apply_delta(table.slice(a, n), cursor.take(a, n), "text") for a, n in parts(len(texts), chunks)]
    got = pa.concat_tables(out)
    keep = [(i, t) for i, t in enumerate(texts) if not (t and ("spam" in t or "poison" in t))]
    assert got.schema == table.schema
    assert got.to_pylist() == [{"n": i, "text": "person" if t == "idiot" else t} for i, t in keep]
    assert loaded == sorted(set(loaded))  # each unit file is read once, in order


@given(TEXTS)
@settings(deadline=None, max_examples=60)
def test_a_unit_file_holds_new_text_only_where_it_changed(texts):
    file = unit(texts)
    changed = file.column(CHANGED).to_pylist()
    assert changed == [t == "idiot" for t in texts]
    assert file.column(NEW_TEXT).to_pylist() == ["person" if c else None for c in changed]
    assert file.column(flight.FATE).to_pylist() == [
        flight.DROPPED if t and "spam" in t else flight.DEAD if t == "poison" else flight.KEPT for t in texts
    ]


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [(None, None, False), (None, "", True), ("", None, True), ("a", "a", False), ("a", "b", True)],
)
def test_null_is_a_text_of_its_own(old, new, changed):
    batch = in_flight([old])
    original = batch.column("text")
    batch = flight.set_column(batch, "text", pa.array([new], pa.string()))
    file = unit_file(batch, "text", original)
    assert file.column(CHANGED).to_pylist() == [changed]
    cursor = DeltaCursor([0], [1], lambda i: file)
    table = apply_delta(pa.table({"text": pa.array([old], pa.string())}), cursor.take(0, 1), "text")
    assert table.column("text").to_pylist() == [new]


def test_a_step_may_hand_back_text_of_another_width():
    batch = in_flight(["a", "b"])
    original = batch.column("text")
    batch = flight.set_column(batch, "text", pa.array(["a", "c"], pa.large_string()))
    file = unit_file(batch, "text", original)
    assert file.column(CHANGED).to_pylist() == [False, True]
    cursor = DeltaCursor([0], [2], lambda i: file)
    table = apply_delta(pa.table({"text": ["a", "b"]}), cursor.take(0, 2), "text")
    assert table.column("text").to_pylist() == ["a", "c"] and table.schema.field("text").type == pa.string()


def test_rows_no_unit_covers_are_not_passed_over():
    cursor = DeltaCursor([0], [2], lambda i: unit(["a", "b"]))
    with pytest.raises(ValueError, match=r"units cover 2 of rows 0\.\.3"):
        cursor.take(0, 3)


@given(st.lists(st.booleans(), max_size=20))
@settings(deadline=None)
def test_rows_are_picked_from_columns_arrow_cannot_filter(mask):
    values = [f"value {i} that is longer than a view holds" for i in range(len(mask))]
    plain = pa.table({"v": values})
    view = pa.table(
        {
            "v": pa.array(values, pa.string_view()),
            "l": pa.array([[v] for v in values], pa.list_(pa.string_view())),
        }
    )
    wanted = np.array(mask, bool)
    expected = [v for v, m in zip(values, mask, strict=True) if m]
    assert pick_rows(plain, wanted).column("v").to_pylist() == expected
    picked = pick_rows(view, wanted)
    assert picked.schema == view.schema
    assert picked.to_pylist() == [{"v": v, "l": [v]} for v in expected]
