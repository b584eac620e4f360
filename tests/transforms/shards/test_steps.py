"""A step fails on rows, never on batches: the culprits die alone, and what is no row's fault stops the run."""

import errno
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import flight
from schemas.errors import FatalStepError, InputError, ModelError, OutputError
from tests.helpers import Drop, Fail, Keep, NeedScratch, Replace, fates, in_flight
from transforms.shards.keys import ShardKey
from transforms.shards.receipts import counters_of, with_counters
from transforms.shards.steps import Step, StepContext, apply_step, describe


def context():
    return StepContext("text", key=ShardKey("s.parquet", 3, 30))


class Call:
    """A step from a function."""

    label = "Call"

    def __init__(self, function):
        self.function = function

    def setup(self, context): ...

    def __call__(self, batch, context):
        return self.function(batch)


def raises(error):
    def function(batch):
        raise error

    return Call(function)


@given(st.lists(st.sampled_from(["fine", "poison", "x poison x", "", None]), max_size=40))
@settings(deadline=None)
def test_exactly_the_rows_that_fail_die(texts):
    out = apply_step(Fail(), in_flight(texts), context())
    out.validate(full=True)
    bad = [bool(t and "poison" in t) for t in texts]
    assert fates(out) == [flight.DEAD if b else flight.KEPT for b in bad]
    assert out.column("text").to_pylist() == texts
    assert out.column(flight.ROW).to_pylist() == list(range(len(texts)))
    assert [e is not None for e in out.column(flight.ERROR).to_pylist()] == bad
    assert [s == "FailOnWord" for s in out.column(flight.STAGE).to_pylist()] == bad
    assert flight.scratch(out, "seen").to_pylist() == [None if b else True for b in bad]


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "idiot", "spam", "poison"]), st.sampled_from([0, 1, 2])), max_size=25
    )
)
@settings(deadline=None)
def test_rows_already_decided_are_not_seen_and_not_changed(rows):
    seen = []
    batch = in_flight([t for t, _ in rows])
    batch = flight.drop_rows(batch, ["early" if f == 1 else None for _, f in rows], stage="Before")
    batch = flight.kill_rows(batch, ["early" if f == 2 else None for _, f in rows], stage="Before")

    def look(live):
        seen.extend(live.column("text").to_pylist())
        return Replace()(live, context())

    out = apply_step(Call(look), batch, context())
    assert seen == [t for t, f in rows if f == 0]
    assert fates(out) == [f for _, f in rows]
    assert out.column(flight.ROW).to_pylist() == list(range(len(rows)))
    assert out.column("text").to_pylist() == ["person" if t == "idiot" and f == 0 else t for t, f in rows]
    assert out.column(flight.STAGE).to_pylist() == [None if f == 0 else "Before" for _, f in rows]
    assert [v is not None for v in flight.attribute(out, "hits").to_pylist()] == [f == 0 for _, f in rows]


@given(
    st.lists(
        st.sampled_from(["a", "idiot", "spam", "poison", "spam poison", "idiot spam", None]), max_size=25
    )
)
@settings(deadline=None)
def test_whatever_the_fates_every_row_stays_in_its_place_through_a_chain(texts):
    batch = in_flight(texts)
    for step in (Drop(), Fail(), NeedScratch(), Replace(), Keep()):
        batch = apply_step(step, batch, context())
    batch.validate(full=True)
    expected = [
        flight.DROPPED if t and "spam" in t else flight.DEAD if t == "poison" else flight.KEPT for t in texts
    ]
    assert fates(batch) == expected
    assert batch.column(flight.ID).to_pylist() == [f"r{i}" for i in range(len(texts))]
    assert set(batch.schema.names) >= {"_tamis.attr.hits", "_tamis.attr.seen", "_tamis.tmp.seen"}


def test_a_batch_is_halved_and_not_taken_row_by_row():
    sizes = []

    def function(batch):
        sizes.append(batch.num_rows)
        return Fail()(batch, context())

    apply_step(Call(function), in_flight(["poison", *["fine"] * 1023]), context())
    assert len(sizes) == 21 and max(sizes) == 1024  # the whole, then two halves at each of ten levels


def test_the_columns_a_step_adds_are_there_even_if_it_failed_on_every_row():
    """Or the next step, which reads them, would fail on a unit of which no row is left."""
    batch = apply_step(Fail(), in_flight(["poison", "poison"]), context())
    assert fates(batch) == [flight.DEAD] * 2
    assert flight.scratch(batch, "seen").to_pylist() == [None, None]
    batch = apply_step(NeedScratch(), batch, context())
    assert flight.attribute(batch, "seen").to_pylist() == [None, None]


def test_no_rows_still_get_the_columns():
    batch = apply_step(Replace(), in_flight([]), context())
    assert batch.num_rows == 0 and "_tamis.attr.hits" in batch.schema.names


def test_a_step_may_kill_rows_itself():
    def function(batch):
        return flight.kill_rows(batch, [None, "server said no"], stage="Call")

    out = apply_step(Call(function), in_flight(["a", "b"]), context())
    assert fates(out) == [flight.KEPT, flight.DEAD]
    assert out.column(flight.ERROR).to_pylist() == [None, "server said no"]


@pytest.mark.parametrize(
    "error", [ModelError("no weights"), InputError("x"), OutputError("y"), FatalStepError("z")]
)
def test_what_the_user_must_mend_stops_the_run_under_its_own_name(error):
    with pytest.raises(type(error), match=str(error)):
        apply_step(raises(error), in_flight(["a", "b"]), context())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("too big"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EFBIG, "File too large"),
    ],
    ids=lambda e: type(e).__name__ + str(getattr(e, "errno", "")),
)
def test_what_is_no_row_s_fault_stops_the_run_and_names_the_unit(error):
    with pytest.raises(FatalStepError, match=r"Call stopped at s.parquet\[3\]@30: ") as caught:
        apply_step(raises(error), in_flight(["a", "b"]), context())
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["interrupt", "exit"])
def test_a_stop_is_no_row_s_fault(error):
    with pytest.raises(type(error)):
        apply_step(raises(error), in_flight(["a"]), context())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no such file"), TimeoutError(), RecursionError()], ids=repr
)
def test_any_other_error_is_the_row_s(error):
    def function(batch):
        if batch.num_rows:
            raise error
        return batch

    out = apply_step(Call(function), in_flight(["a", "b"]), context())
    assert fates(out) == [flight.DEAD] * 2


@pytest.mark.parametrize(
    "wrong", [lambda b: b.slice(1), lambda b: pa.concat_batches([b, b])], ids=["fewer", "more"]
)
def test_a_step_that_changes_the_row_count_stops_the_run(wrong):
    with pytest.raises(
        FatalStepError, match=r"Call: returned \d rows for 2 in s.parquet.*must keep row count and order"
    ):
        apply_step(Call(wrong), in_flight(["a", "b"]), context())


def test_a_step_that_changes_the_row_order_stops_the_run():
    with pytest.raises(FatalStepError, match="must keep row count and order"):
        apply_step(Call(lambda b: b.take(pa.array([1, 0]))), in_flight(["a", "b"]), context())


def test_a_step_that_loses_a_reserved_column_stops_the_run():
    with pytest.raises(FatalStepError, match=r"Call: .*_tamis\.row"):
        apply_step(Call(lambda b: b.select(["text"])), in_flight(["a"]), context())


def test_a_step_that_fails_on_no_rows_is_a_broken_step():
    def function(batch):
        return flight.set_attribute(
            batch, "first", pa.array([batch.column("text")[0].as_py()] * batch.num_rows)
        )

    batch = flight.drop_rows(in_flight(["a"]), ["gone"], stage="Before")
    with pytest.raises(FatalStepError, match="failed on an empty batch"):
        apply_step(Call(function), batch, context())


def test_counters_say_how_many_came_and_went():
    here = context()
    apply_step(Fail(), in_flight(["a", "poison", "b"]), here)
    assert {k: v for k, v in here.counters.items() if not k.endswith(".ms")} == {
        "FailOnWord.rows_in": 3,
        "FailOnWord.rows_out": 2,
        "FailOnWord.dead": 1,
    }
    assert here.counters["FailOnWord.ms"] >= 0


def test_counters_ride_in_the_batch_and_add_up():
    batch = with_counters(in_flight(["a"]), Counter(a=1))
    batch = with_counters(batch, counters_of(batch) + Counter(a=2, b=1))
    assert counters_of(batch) == Counter(a=3, b=1)
    assert counters_of(in_flight([])) == Counter()


def test_the_sample_steps_are_steps():
    assert all(isinstance(s, Step) for s in (Keep(), Replace(), Drop(), Fail(), NeedScratch()))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb\t c"), "ValueError: a b c"),
        (KeyError("k"), "KeyError: 'k'"),
        (ValueError(), "ValueError:"),
        (ValueError("\ud800"), "ValueError: \\ud800"),
    ],
)
def test_an_error_is_one_line(error, line):
    assert describe(error) == line
    pa.array([describe(error)])


def test_a_long_error_is_cut():
    assert len(describe(ValueError("x" * 10_000))) == 500
