"""Batches: every plan holds every token once, epochs are alike in number, tensors say who sees whom."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.collate import IGNORE, PAD_SEGMENT, BatchPlan, Collator, block_mask

PLANS = st.builds(
    dict,
    lengths=st.lists(st.integers(3, 20), min_size=1, max_size=60),
    batch_size=st.integers(1, 5),
    packing=st.sampled_from(["off", "isolated", "concat"]),
    seed=st.integers(0, 3),
)


def plan_of(lengths, batch_size, packing, seed, prefix=0) -> BatchPlan:
    array = np.array(lengths)
    return BatchPlan(array, np.arange(len(array)), batch_size, 20, packing, prefix, seed)


@given(PLANS, st.integers(0, 5), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_every_token_once(options, epoch, shuffle):
    plan = plan_of(**options)
    batches = plan.batches(epoch, shuffle=shuffle)
    seen = Counter((p.number, i) for b in batches for row in b for p in row for i in range(p.start, p.stop))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(options["lengths"])
    assert all(sum(p.stop - p.start for p in row) <= 20 for b in batches for row in b)
    assert all(len(b) == options["batch_size"] for b in batches[:-1])


@given(PLANS)
@settings(deadline=None)
def test_epochs_are_equally_long_and_planned_alike_again(options):
    plan = plan_of(**options)
    assert len({len(plan.batches(epoch)) for epoch in range(4)}) == 1
    assert plan.batches(2) == plan_of(**options).batches(2)


def test_epochs_and_seeds_differ():
    lengths = list(range(3, 20)) * 4
    for packing in ("off", "isolated", "concat"):
        plan = plan_of(lengths, 2, packing, 0)
        assert plan.batches(0) != plan.batches(1)
        assert plan.batches(0) != plan_of(lengths, 2, packing, 1).batches(0)


@given(st.lists(st.integers(3, 20), min_size=1, max_size=60))
@settings(deadline=None)
def test_a_shared_prefix_leaves_room_for_itself(lengths):
    plan = plan_of(lengths, 1, "isolated", 0, prefix=2)
    rows = [row for batch in plan.batches(0) for row in batch]
    assert all(p.start == 2 and p.stop == lengths[p.number] for row in rows for p in row)
    assert all(2 + sum(p.stop - p.start for p in row) <= 20 for row in rows)
    assert sorted(p.number for row in rows for p in row) == list(range(len(lengths)))


def test_packing_leaves_little_room():
    rng = np.random.default_rng(0)
    plan = BatchPlan(rng.integers(5, 60, 2000), np.arange(2000), 1, 128, "isolated")
    rows = [row for batch in plan.batches(0) for row in batch]
    filled = sum(p.stop - p.start for row in rows for p in row) / (len(rows) * 128)
    assert filled > 0.97


def test_rows_of_like_length_stand_together():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 500, 2000)
    plan = BatchPlan(lengths, np.arange(2000), 8, 512, "off")
    batches = plan.batches(0)
    area = sum(max(row[0].stop for row in batch) * len(batch) for batch in batches)
    assert lengths.sum() / area > 0.95
    first = [max(row[0].stop for row in batch) for batch in batches]
    assert np.corrcoef(first[:-1], first[1:])[0, 1] < 0.5  # but the batches come in no order of length


class Store:
    """Stands for a token store: two examples that begin alike; the loss is on their ends."""

    def __init__(self) -> None:
        self.examples = [([1, 2, 3, 4, 5], [(3, 5)]), ([1, 2, 6, 7], [(3, 4)])]
        self.prefix = [1, 2]

    def __getitem__(self, number):
        ids, spans = self.examples[number]
        return np.array(ids), spans


def rows(plan_lengths, **options):
    return plan_of(plan_lengths, 2, seed=0, **options).batches(0, shuffle=False)[0]


def test_padded_rows():
    batch = Collator(Store(), pad=9)(rows([5, 4], packing="off"))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 7, 9]]
    assert batch["shift_labels"].tolist() == [
        [IGNORE, IGNORE, 4, 5, IGNORE],
        [IGNORE, IGNORE, 7, IGNORE, IGNORE],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert batch["segments"].tolist() == [[1] * 5, [1, 1, 1, 1, PAD_SEGMENT]]


def test_isolated_rows_restart_positions_and_predict_nothing_across_the_border():
    batch = Collator(Store(), pad=9, packing="isolated")(rows([5, 4], packing="isolated"))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["segments"].tolist() == [[1] * 5 + [2] * 4]
    assert batch["shift_labels"].tolist() == [[IGNORE] * 2 + [4, 5] + [IGNORE] * 3 + [7, IGNORE]]


def test_a_shared_prefix_stands_once():
    collate = Collator(Store(), pad=9, packing="isolated", prefix=2)
    batch = collate(rows([5, 4], packing="isolated", prefix=2))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert batch["shift_labels"].tolist() == [[IGNORE, IGNORE, 4, 5, IGNORE, 7, IGNORE]]


def test_a_stream_goes_on_over_borders():
    batch = Collator(Store(), pad=9, packing="concat")(rows([5, 4], packing="concat"))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 6, 7]]
    assert batch["position_ids"].tolist() == [list(range(9))]
    assert set(batch["segments"].flatten().tolist()) == {1}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_the_mask_shows_earlier_tokens_of_the_segment_and_of_the_prefix(sizes, prefix, padding):
    segments = [0] * prefix + [k for k, n in enumerate(sizes, 1) for _ in range(n)] + [PAD_SEGMENT] * padding
    mask = block_mask(torch.tensor([segments]))[0, 0]
    for query, q in enumerate(segments):
        for key, k in enumerate(segments):
            expected = key <= query and (q == k or (k == 0 and q != PAD_SEGMENT))
            assert bool(mask[query, key]) == expected
    assert bool(mask.any(-1).all())  # no query without a key: its softmax would be NaN


@pytest.mark.parametrize("packing", ["off", "isolated", "concat"])
def test_batches_do_not_depend_on_what_else_is_drawn(packing):
    plan = plan_of(list(range(3, 20)), 2, packing, 5)
    np.random.seed(1)
    one = plan.batches(1)
    np.random.seed(2)
    assert plan.batches(1) == one
