import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import flight
from schemas.edits import EDIT_SCHEMA, EDIT_TYPE
from tests.helpers import fates, in_flight

REASONS = st.lists(st.one_of(st.none(), st.text(st.characters(codec="utf-8"))), max_size=12)


def test_a_launched_batch_keeps_its_columns_and_every_row():
    batch = pa.record_batch({"text": ["a", None], "n": pa.array([1, 2], pa.int16())})
    flying = flight.launch(batch, first_row=40, ids=pa.array(["x", "y"], pa.large_string()))
    assert flying.schema.names[:2] == ["text", "n"]
    assert list(flying.schema)[2:] == list(flight.BASE_FIELDS)
    assert flying.column(flight.ROW).to_pylist() == [40, 41]
    assert flying.column(flight.ID).to_pylist() == ["x", "y"]
    assert fates(flying) == [flight.KEPT, flight.KEPT]
    assert flying.column(flight.EDITS).to_pylist() == [None, None]
    flying.validate(full=True)


def test_no_rows_can_be_launched():
    assert in_flight([]).num_rows == 0


@given(REASONS)
@settings(deadline=None)
def test_rows_with_a_reason_are_dropped_and_the_others_are_as_they_were(reasons):
    batch = in_flight(["t"] * len(reasons))
    out = flight.drop_rows(batch, reasons, stage="S")
    out.validate(full=True)
    assert fates(out) == [flight.KEPT if r is None else flight.DROPPED for r in reasons]
    assert out.column(flight.REASON).to_pylist() == reasons
    assert out.column(flight.STAGE).to_pylist() == [None if r is None else "S" for r in reasons]
    assert out.column(flight.ERROR).null_count == len(reasons)
    assert out.schema == batch.schema


@given(REASONS)
@settings(deadline=None)
def test_rows_with_an_error_are_dead(errors):
    batch = in_flight(["t"] * len(errors))
    out = flight.kill_rows(batch, errors, stage="S")
    assert fates(out) == [flight.KEPT if e is None else flight.DEAD for e in errors]
    assert out.column(flight.ERROR).to_pylist() == errors
    assert out.schema == batch.schema


def test_a_second_step_does_not_undo_the_first():
    batch = flight.drop_rows(in_flight(["a", "b", "c"]), ["r", None, None], stage="One")
    batch = flight.kill_rows(batch, [None, "e", None], stage="Two")
    assert fates(batch) == [flight.DROPPED, flight.DEAD, flight.KEPT]
    assert batch.column(flight.STAGE).to_pylist() == ["One", "Two", None]
    assert batch.column(flight.REASON).to_pylist() == ["r", None, None]


def test_edits_are_appended_row_by_row():
    edit = {"start": 0, "end": 1, "before": "a", "after": "b", "action": "rewrite"}
    batch = flight.add_edits(in_flight(["a", "b"]), [[edit], []])
    batch = flight.add_edits(batch, [[{**edit, "end": 2}], []])
    rows = batch.column(flight.EDITS).to_pylist()
    assert [e["end"] for e in rows[0]] == [1, 2]
    assert rows[1] is None  # no edits is null, not an empty list
    assert set(rows[0][0]) == {f.name for f in EDIT_TYPE} and rows[0][0]["similarity"] is None
    assert batch.column(flight.EDITS).type == pa.list_(EDIT_TYPE)


def test_an_edit_row_says_where_it_belongs():
    assert EDIT_SCHEMA.names[:3] == ["shard", "row", "id"]
    assert list(EDIT_SCHEMA)[3:] == list(EDIT_TYPE)


def test_lists_that_do_not_fit_the_batch_are_refused():
    with pytest.raises(ValueError):
        flight.add_edits(in_flight(["a", "b"]), [[]])


def test_attributes_and_scratch_are_set_read_and_replaced():
    batch = flight.set_attribute(in_flight(["a"]), "score", pa.array([0.5], pa.float32()))
    batch = flight.set_scratch(batch, "score", pa.array(["x"]))
    batch = flight.set_attribute(batch, "score", pa.array([0.25], pa.float32()))
    assert flight.attribute(batch, "score").to_pylist() == [0.25]
    assert flight.scratch(batch, "score").to_pylist() == ["x"]
    assert batch.schema.names.count("_tamis.attr.score") == 1
    with pytest.raises(KeyError):
        flight.attribute(batch, "missing")
