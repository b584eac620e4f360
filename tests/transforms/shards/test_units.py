"""Units: whatever the limits, every row of a shard stands in exactly one of them."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import InputError
from transforms.shards.formats import UnitLimits, UnitPlan, format_of
from transforms.shards.formats.base import cut, pack, regroup
from transforms.shards.plan import Plan, ShardPlan, coarsen

LIMITS = st.builds(UnitLimits, st.integers(1, 50), st.integers(1, 500))
CHUNKS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2000)), max_size=8)


def assert_covers(units, first_row, rows, first_unit=0):
    assert [u.unit for u in units] == list(range(first_unit, first_unit + len(units)))
    at = first_row
    for unit in units:
        assert unit.first_row == at
        assert unit.rows > 0
        at += unit.rows
    assert at == first_row + rows


@given(st.integers(0, 200), st.integers(0, 10_000), st.integers(0, 99), st.integers(0, 9), LIMITS)
@settings(deadline=None)
def test_cut_covers_every_row_once_within_the_limits(rows, size, first_row, first_unit, limits):
    units = cut(rows, size, first_row, first_unit, limits)
    assert_covers(units, first_row, rows, first_unit)
    assert all(u.rows <= limits.rows for u in units)
    # Bytes are met to within a row, for rows are not cut.
    assert all(u.bytes <= limits.bytes + size / rows for u in units)


@given(CHUNKS, LIMITS)
@settings(deadline=None)
def test_pack_covers_every_row_once_within_the_limits(chunks, limits):
    units = pack(chunks, limits)
    assert_covers(units, 0, sum(n for n, _ in chunks))
    assert all(u.rows <= limits.rows for u in units)


def test_pack_joins_small_chunks_and_cuts_large_ones():
    units = pack([(3, 30), (3, 30), (3, 30), (20, 200)], UnitLimits(8, 10_000))
    assert [u.rows for u in units] == [6, 3, 6, 7, 7]


def test_one_row_larger_than_the_limit_is_one_unit():
    assert cut(1, 50_000_000, 0, 0, UnitLimits(10, 1000)) == [UnitPlan(0, 0, 1, 50_000_000)]
    assert [u.unit for u in pack([(1, 10**7), (2, 10**7)], UnitLimits(10, 1000))] == [0, 1, 2]


@given(CHUNKS, LIMITS, st.lists(st.integers(0, 15), max_size=40), st.data())
@settings(deadline=None)
def test_regroup_gives_each_unit_its_own_rows_whatever_the_batches(chunks, limits, sizes, data):
    units = pack(chunks, limits)
    rows = sum(n for n, _ in chunks)
    # The batches may begin before the first unit (a row group does) and go on behind the last.
    skip = data.draw(st.integers(0, len(units)))
    wanted = units[skip : data.draw(st.integers(skip, len(units)))]
    start = data.draw(st.integers(0, wanted[0].first_row)) if wanted else 0
    batches, at = [], start
    for size in [*sizes, rows]:
        end = min(rows, at + size)
        batches.append(pa.record_batch({"row": pa.array(range(at, end), pa.int64())}))
        at = end
    got = [(u, b.column("row").to_pylist()) for u, b in regroup(batches, start, wanted)]
    assert got == [(u, list(range(u.first_row, u.first_row + u.rows))) for u in wanted]


def test_a_shard_that_ends_early_changed_under_the_job():
    batches = [pa.record_batch({"row": [0, 1, 2]})]
    with pytest.raises(InputError, match=r"ended at row 3 where 5 were planned.*changed"):
        list(regroup(batches, 0, [UnitPlan(0, 0, 5)]))


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_read_tasks_hold_every_open_unit_once_in_runs_of_neighbours(counts, at_least, data):
    shards = tuple(
        ShardPlan(f"s{i}", "jsonl", n, n, "", "", "", tuple(UnitPlan(u, u, 1) for u in range(n)))
        for i, n in enumerate(counts)
    )
    plan = Plan("in", "text", None, UnitLimits(), shards)
    every = [(s.name, u.unit) for s in shards for u in s.units]
    done = data.draw(st.sets(st.sampled_from(every))) if every else set()
    tasks = list(plan.tasks(done, at_least))
    read = [(t.shard, u) for t in tasks for u in range(t.first_unit, t.first_unit + t.units)]
    assert sorted(read) == sorted(set(every) - done)
    assert len(tasks) >= min(at_least, len(read))


@given(CHUNKS, LIMITS, st.integers(1, 9))
@settings(deadline=None)
def test_coarser_units_still_cover_every_row_once(chunks, limits, factor):
    units = pack(chunks, limits)
    rows = sum(n for n, _ in chunks)
    shard = coarsen(ShardPlan("s", "arrow", rows, 0, "", "", "", tuple(units)), factor)
    assert_covers(shard.units, 0, rows)
    assert len(shard.units) == -(-len(units) // factor)


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("a.parquet", "parquet"),
        ("a.PQ", "parquet"),
        ("a/b.c.jsonl", "jsonl"),
        ("A.JSONL.GZ", "jsonl"),
        ("a.json.zst", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.arrow", "arrow"),
        ("a.feather", "arrow"),
        (".parquet", None),
        ("parquet", None),
        ("a.csv", None),
        ("a.parquet.md5", None),
    ],
)
def test_a_format_is_known_by_the_file_name(name, format_):
    assert format_of(name) == format_
