"""Batching: every index once, within the budget, in any company the same; windows that cover and overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.batching import (
    MIN_ROWS,
    fill_rows,
    max_by_owner,
    padded_lengths,
    run_batches,
    slices,
    token_budget_batches,
    windows,
)

LIMIT = 512
lengths_of = st.lists(st.integers(0, LIMIT), max_size=60)


@given(lengths_of, st.integers(1, 4000))
def test_batches_hold_every_index_once_and_keep_the_budget(lengths, budget):
    batches = token_budget_batches(lengths, budget, limit=LIMIT)
    assert sorted(i for b in batches for i in b.rows) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.rows) * batch.length <= budget or len(batch.rows) == 1
        assert max(lengths[i] for i in batch.rows) <= batch.length <= LIMIT


@given(lengths_of, lengths_of)
def test_what_a_sequence_is_padded_to_does_not_depend_on_its_company(some, others):
    alone = [int(padded_lengths([n], LIMIT)[0]) for n in some]
    assert padded_lengths(some + others, LIMIT)[: len(some)].tolist() == alone
    for batch in token_budget_batches(some + others, 2000, limit=LIMIT):
        full = {(some + others)[i] == batch.length for i in batch.rows}
        assert len(full) == 1  # a row without padding never shares a batch with padded ones
        assert all(alone[i] == batch.length for i in batch.rows if i < len(some))


@given(st.integers(64, 4096), st.integers(1, 4096))
def test_padding_is_at_most_an_eighth_beyond_64_tokens(length, spare):
    padded = int(padded_lengths([length], length + spare)[0])
    assert length < padded <= 1.125 * (length + 1)


def test_a_sequence_over_the_limit_is_refused():
    with pytest.raises(ValueError, match="513 exceeds the limit of 512"):
        padded_lengths([513], 512)


def test_max_rows_caps_a_batch():
    assert [len(b.rows) for b in token_budget_batches([5] * 10, 10_000, limit=64, max_rows=4)] == [4, 4, 2]


def test_short_batches_are_filled_and_long_ones_left_alone():
    assert fill_rows(np.array([7])).tolist() == [7] * MIN_ROWS
    assert fill_rows(np.arange(9)).tolist() == list(range(9))


@given(st.lists(st.integers(0, 700), max_size=30), st.integers(2, 100), st.data())
def test_windows_cover_each_sequence_and_overlap(lengths, limit, data):
    overlap = data.draw(st.integers(0, limit - 1))
    cut = windows(lengths, limit, overlap)
    for i, n in enumerate(lengths):
        mine = cut.owner == i
        starts, ends = cut.start[mine].tolist(), cut.end[mine].tolist()
        assert starts[0] == 0 and ends[-1] == n
        assert all(e - s <= limit for s, e in zip(starts, ends, strict=True))
        assert all(e - s >= overlap for s, e in zip(starts[1:], ends[:-1], strict=True))
        assert starts == sorted(set(starts))


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=70), min_size=1, max_size=20))
def test_maximum_over_windows_is_the_maximum_over_the_sequence(sequences):
    cut = windows([len(s) for s in sequences], 16, 4)
    parts = [sequences[o][s:e] for o, s, e in zip(*cut, strict=True)]
    scores = np.array([[max(p)] for p in parts], np.float32)
    assert max_by_owner(scores, cut.owner, len(sequences))[:, 0].tolist() == [max(s) for s in sequences]


def test_maximum_of_nothing_is_an_empty_array():
    assert max_by_owner(np.zeros((0, 3), np.float32), np.zeros(0, np.int64), 0).shape == (0, 3)


def test_windows_refuse_an_overlap_as_long_as_themselves():
    with pytest.raises(ValueError, match="overlap"):
        windows([5], 4, 4)


@given(st.lists(st.lists(st.integers(0, 9), max_size=40), max_size=40), st.integers(1, 300))
def test_results_come_back_in_the_order_of_the_sequences(sequences, budget):
    calls = []

    def compute(rows, length):
        calls.append(len(rows))
        return np.array([[sum(r), length] for r in rows], np.float32).reshape(-1, 2)

    out = run_batches(sequences, compute, budget=budget, limit=64, width=2)
    assert out[:, 0].tolist() == [float(sum(s)) for s in sequences]
    assert out[:, 1].tolist() == padded_lengths([len(s) for s in sequences], 64).tolist()
    assert all(c >= MIN_ROWS for c in calls)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120))
def test_slices_are_consecutive_and_within_budget(weights, budget):
    parts = list(slices(weights, budget))
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(len(weights)))
    assert all(sum(weights[p]) <= budget or p.stop - p.start == 1 for p in parts)
