"""Drawing groups: the same in every process, in order of quality, every negative once before any twice."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.training.groups import DrawPolicy, check_loss, draw_group, sample_group
from schemas.errors import TamisError

counts = st.integers(1, 40)
seeds = st.integers(0, 2**32)
policies = st.one_of(
    st.builds(DrawPolicy, st.just("first"), st.integers(1, 6), st.integers(2, 12), st.booleans()),
    st.builds(DrawPolicy, st.just("random_one"), st.integers(1, 6), st.integers(2, 12), st.booleans()),
    st.builds(DrawPolicy, st.just("rotate"), st.integers(1, 4), st.integers(5, 12), st.booleans()),
    st.builds(
        DrawPolicy,
        st.just("all"),
        st.one_of(st.just(-1), st.integers(1, 4)),
        st.integers(5, 12),
        st.booleans(),
    ),
)


@given(policies, counts, st.integers(0, 60), seeds, st.integers(0, 100))
def test_a_group_has_a_positive_room_for_a_negative_and_its_order(policy, m, n, seed, epoch):
    draw = draw_group("q", m, n, seed=seed, epoch=epoch, policy=policy)
    assert 1 <= len(draw.positives) <= min(m, policy.most_positives)
    assert list(draw.positives) == sorted(set(draw.positives))  # order is quality, and none twice
    assert all(0 <= i < m for i in draw.positives)
    slots = policy.group_size - len(draw.positives)
    assert slots >= 1
    assert len(draw.negatives) == (slots if n else 0)
    assert all(0 <= i < n for i in draw.negatives)
    assert draw == draw_group("q", m, n, seed=seed, epoch=epoch, policy=policy)


@given(policies, counts, st.integers(1, 60), seeds)
def test_every_negative_is_seen_once_before_any_is_seen_twice(policy, m, n, seed):
    seen: Counter[int] = Counter()
    for epoch in range(12):
        for i in draw_group("q", m, n, seed=seed, epoch=epoch, policy=policy).negatives:
            assert seen[i] == min(seen[k] for k in range(n))  # none is ahead of another by more than one
            seen[i] += 1


@given(counts, st.integers(1, 8), seeds, st.integers(0, 1000))
def test_random_one_draws_each_of_the_best_once_before_any_twice(m, cap, seed, start):
    policy = DrawPolicy("random_one", cap)
    best = min(m, cap)
    drawn = [draw_group("q", m, 3, seed=seed, epoch=start + e, policy=policy).positives for e in range(best)]
    assert sorted(drawn) == [(i,) for i in range(best)]


@given(counts, st.integers(1, 4), seeds)
def test_rotation_reaches_every_positive(m, cap, seed):
    policy = DrawPolicy("rotate", cap, 8)
    epochs = -(-m // cap)
    drawn = [draw_group("q", m, 3, seed=seed, epoch=e, policy=policy).positives for e in range(epochs)]
    assert {i for d in drawn for i in d} == set(range(m))


@given(counts, seeds)
def test_first_and_all_take_the_best(m, seed):
    first = draw_group("q", m, 3, seed=seed, epoch=5, policy=DrawPolicy("first"))
    every = draw_group("q", m, 3, seed=seed, epoch=5, policy=DrawPolicy("all", 4))
    assert first.positives == (0,)
    assert every.positives == tuple(range(min(m, 4)))


def test_other_rows_and_seeds_draw_otherwise():
    policy = DrawPolicy("first")
    draws = {
        draw_group(f"q{i}", 1, 30, seed=s, epoch=0, policy=policy).negatives for i in range(5) for s in (0, 1)
    }
    assert len(draws) == 10


def test_negatives_keep_their_order_when_not_shuffled():
    policy = DrawPolicy("first", group_size=4, shuffle_negatives=False)
    draws = [draw_group("q", 1, 7, seed=0, epoch=e, policy=policy).negatives for e in range(3)]
    assert draws == [(0, 1, 2), (3, 4, 5), (6, 0, 1)]


def test_a_row_is_named_by_query_and_stage_not_by_place():
    row = {"query_id": "q", "stage": "llm", "positives": ["a", "b"], "negatives": list("cdefghijkl")}
    policy = DrawPolicy("random_one", 2)
    assert sample_group(row, 3, 1, policy) == sample_group(dict(reversed(row.items())), 3, 1, policy)
    assert sample_group(row, 3, 1, policy) != sample_group({**row, "stage": "human"}, 3, 1, policy)


def test_another_process_draws_the_same():
    """Python's own hash differs between processes; the draw must not."""
    code = (
        "from models.training.groups import *;"
        "print(draw_group('q', 9, 20, seed=1, epoch=2, policy=DrawPolicy('rotate', 3)))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": s},
        ).stdout
        for s in ("1", "2")
    }
    assert runs == {f"{draw_group('q', 9, 20, seed=1, epoch=2, policy=DrawPolicy('rotate', 3))}\n"}


def test_a_row_without_positives_never_reaches_a_loss():
    with pytest.raises(TamisError, match="no positive"):
        draw_group("q", 0, 5, seed=0, epoch=0, policy=DrawPolicy())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("random_one", -1), "needs a cap"),
        (("rotate", -1), "needs a cap"),
        (("all", 0), "leaves none"),
        (("all", 8, 8), "no slot for a negative"),
        (("first", 1, 1), "a positive and a negative"),
        (("best",), "first, random_one, rotate, all"),
    ],
)
def test_contradictions_are_refused_by_name(settings, says):
    with pytest.raises(TamisError, match=says):
        DrawPolicy(*settings)


@pytest.mark.parametrize(
    ("policy", "loss", "fits"),
    [
        ("first", "infonce", True),
        ("random_one", "rand1_lh", True),
        ("all", "joint_lh", True),
        ("rotate", "lse_pair", True),
        ("all", "rand1_lh", False),
        ("first", "sum_marg_lh", False),
    ],
)
def test_a_loss_reads_what_its_policy_draws(policy, loss, fits):
    if fits:
        check_loss(DrawPolicy(policy), loss)
    else:
        with pytest.raises(TamisError, match="needs positives drawn by"):
            check_loss(DrawPolicy(policy), loss)
    with pytest.raises(TamisError, match="no loss"):
        check_loss(DrawPolicy(policy), "hinge")
