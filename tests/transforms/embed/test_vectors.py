"""Vectors as Arrow columns: what goes in comes out, as near as the stored type allows; missing stays missing."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from transforms.embed.vectors import from_arrow, to_arrow

FINITE = st.floats(-100, 100, width=32)


@st.composite
def columns(draw):
    n, d = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    vectors = draw(hnp.arrays(np.float32, (n, d), elements=FINITE))
    return vectors, draw(hnp.arrays(np.bool_, n))


@given(columns(), st.sampled_from(["float32", "float16", "int8"]))
def test_vectors_come_back(column, store):
    vectors, missing = column
    values, scales = to_arrow(vectors, missing, store)
    assert values.type.list_size == vectors.shape[1] and values.null_count == 0
    back, gone = from_arrow(values, scales)
    np.testing.assert_array_equal(gone, missing)
    assert not back[missing].any()
    kept, given_ = back[~missing], vectors[~missing]
    if store == "float32":
        np.testing.assert_array_equal(kept, given_)
    elif store == "float16":
        np.testing.assert_allclose(kept, given_, rtol=1e-3, atol=1e-7)
    else:  # half a step of each row's own scale
        step = np.abs(given_).max(axis=1, initial=0, keepdims=True) / 127
        assert (np.abs(kept - given_) <= step / 2 * 1.001 + 1e-7).all()


@pytest.mark.parametrize("store", ["float32", "float16", "int8"])
def test_a_row_without_a_vector_can_be_read_back_from_parquet_by_others(tmp_path, store):
    import polars as pl

    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    values, _ = to_arrow(vectors, np.array([False, True, False]), store)
    pq.write_table(pa.table({"value": values}), tmp_path / "a.parquet")
    back = pq.read_table(tmp_path / "a.parquet").column("value").chunk(0)
    assert pa.types.is_fixed_size_list(back.type) and back[1].as_py() == [None] * 4
    assert pl.read_parquet(tmp_path / "a.parquet")["value"][1].to_list() == [None] * 4


def test_null_lists_are_understood_too():
    vectors, missing = from_arrow(pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)))
    assert vectors.tolist() == [[1, 2], [0, 0]] and missing.tolist() == [False, True]


def test_a_number_too_large_for_half_floats_is_refused():
    with pytest.raises(ValueError, match="too large for float16"):
        to_arrow(np.full((1, 2), 1e6, np.float32), np.zeros(1, bool), "float16")
