"""The losses against their formulas, written out pair by pair; their gradients; and what must never happen to a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.losses.objectives import GroupScores, query_losses
from models.losses.settings import LOSSES, LossSettings
from models.losses.targets import GroupIds, make_targets
from schemas.errors import TamisError

INFINITY = float("inf")
MULTI = ("joint_lh", "sum_marg_lh", "lse_pair", "mnrl")
ONE = ("single_lh", "infonce", "rand1_lh")
TEACHER = ("margin_mse", "kl")


def group(scores, positive, negative, *, teacher=None, first=None):
    positive, negative = torch.tensor(positive), torch.tensor(negative)
    if first is None:
        first = positive.int().argmax(dim=1)
    return GroupScores(scores, positive, negative, torch.as_tensor(first), teacher)


def lse(values):
    return math.log(sum(math.exp(v) for v in values)) if values else -INFINITY


def by_hand(name, p, n, tp=(), tn=(), positive_side="all", negative_side="all"):
    """Each loss as its definition says, pairs and all."""
    m = len(p)
    if name in ONE:
        return math.log(1 + sum(math.exp(x - p[0]) for x in n))
    if name == "joint_lh":
        return sum(-math.log(math.exp(s) / sum(math.exp(x) for x in (*p, *n))) for s in p)
    if name == "sum_marg_lh":
        return -math.log(sum(math.exp(s) for s in p) / sum(math.exp(x) for x in (*p, *n)))
    if name == "lse_pair":
        if positive_side != "all":
            p = [min(p) if positive_side == "min" else max(p)]
        if negative_side != "all":
            n = [max(n)]
        return math.log(1 + sum(math.exp(b - a) for a in p for b in n))
    if name == "mnrl":
        return sum(math.log(1 + sum(math.exp(x - s) for x in n)) for s in p) / m
    if name == "margin_mse":
        pairs = [
            ((a - b) - (ta - tb)) ** 2
            for a, ta in zip(p, tp, strict=True)
            for b, tb in zip(n, tn, strict=True)
        ]
        return sum(pairs) / len(pairs)
    theirs, ours = (*tp, *tn), (*p, *n)
    return sum(
        math.exp(t - lse(theirs)) * ((t - lse(theirs)) - (s - lse(ours)))
        for t, s in zip(theirs, ours, strict=True)
    )


# Three queries, ragged: two positives and three negatives, one and two, three and one; some documents are nobody's.
POSITIVE = [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1]]
NEGATIVE = [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]


def example(seed=0, **kind):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 6, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    p, n = torch.tensor(POSITIVE).bool().tolist(), torch.tensor(NEGATIVE).bool().tolist()
    return group(scores, p, n, teacher=teacher), scores, teacher


VARIANTS = [{"name": name} for name in LOSSES]
VARIANTS += [
    {"name": "lse_pair", "positive_side": a, "negative_side": b}
    for a in ("all", "min", "max")
    for b in ("all", "max")
    if (a, b) != ("all", "all")
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
def test_every_formula_is_its_definition(options):
    groups, scores, teacher = example()
    found = query_losses(groups, LossSettings(**options))
    for row in range(3):
        p = [i for i in range(6) if POSITIVE[row][i]]
        n = [i for i in range(6) if NEGATIVE[row][i]]
        sides = [[float(x[row, i]) for i in side] for x in (scores, teacher) for side in (p, n)]
        assert float(found[row]) == pytest.approx(
            by_hand(options["name"], *sides, **_sides(options)), abs=1e-12
        )


def _sides(options):
    return {k: v for k, v in options.items() if k != "name"}


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
def test_every_gradient_is_that_of_finite_differences(options):
    groups, scores, teacher = example(1)
    leaf = scores.clone().requires_grad_()

    def total(x):
        return query_losses(
            GroupScores(x, groups.positive, groups.negative, groups.first, teacher), LossSettings(**options)
        )

    assert torch.autograd.gradcheck(total, (leaf,), eps=1e-6, atol=1e-8)


def test_gradients_are_those_of_the_table():
    """dL/ds of positives and negatives in closed form; Z, A, B, N as in the definitions."""
    s = torch.tensor([[0.3, -0.7, 1.1, 0.2]], dtype=torch.float64)
    p, n = [[True, True, False, False]], [[False, False, True, True]]
    e = s.exp()[0]
    z, a, b, m_neg = e.sum(), e[:2].sum(), (1 / e[:2]).sum(), e[2:].sum()
    g = b * m_neg / (1 + b * m_neg)
    share = e / z
    one = e[[0, 2, 3]] / e[[0, 2, 3]].sum()
    expected = {
        "single_lh": [one[0] - 1, 0, one[1], one[2]],
        "joint_lh": [2 * share[0] - 1, 2 * share[1] - 1, 2 * share[2], 2 * share[3]],
        "sum_marg_lh": [share[0] - e[0] / a, share[1] - e[1] / a, share[2], share[3]],
        "lse_pair": [-g / e[0] / b, -g / e[1] / b, g * e[2] / m_neg, g * e[3] / m_neg],
    }
    for name, values in expected.items():
        leaf = s.clone().requires_grad_()
        query_losses(group(leaf, p, n), LossSettings(name)).sum().backward()
        np.testing.assert_allclose(leaf.grad[0].numpy(), [float(v) for v in values], atol=1e-12, err_msg=name)


def test_with_one_positive_the_likelihood_losses_are_one():
    scores = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p, n = [[True, False, False, False, False]], [[False, True, True, True, True]]
    results = {}
    for name in (*ONE, *MULTI):
        leaf = scores.clone().requires_grad_()
        loss = query_losses(group(leaf, p, n), LossSettings(name))
        loss.sum().backward()
        results[name] = (loss.item(), leaf.grad)
    for value, gradient in results.values():
        assert value == pytest.approx(results["single_lh"][0], abs=1e-12)
        torch.testing.assert_close(gradient, results["single_lh"][1], atol=1e-12, rtol=0)


def test_rand1_is_not_lse_pair_in_expectation():
    """The counter-example: e^s = 2 and 1 for two positives, 1 for a negative."""
    s = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
    p, n = [[True, True, False]], [[False, False, True]]
    gradients = []
    for first in (0, 1):
        leaf = s.clone().requires_grad_()
        query_losses(group(leaf, p, n, first=[first]), LossSettings("rand1_lh")).sum().backward()
        gradients.append(leaf.grad[0, :2])
    np.testing.assert_allclose((sum(gradients) / 2).numpy(), [-1 / 6, -1 / 4], atol=1e-12)
    leaf = s.clone().requires_grad_()
    query_losses(group(leaf, p, n), LossSettings("lse_pair")).sum().backward()
    np.testing.assert_allclose(leaf.grad[0, :2].numpy(), [-1 / 5, -2 / 5], atol=1e-12)


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
    st.sampled_from((*MULTI, *TEACHER)),
)
@settings(max_examples=60, deadline=None)
def test_the_order_of_positives_does_not_matter(positives, negatives, rng, name):
    values = [rng.uniform(-4, 4) for _ in range(positives + negatives)]
    grades = [rng.uniform(-1, 1) for _ in values]
    order = list(range(positives))
    rng.shuffle(order)
    order += range(positives, positives + negatives)
    p = [[True] * positives + [False] * negatives]
    n = [[not x for x in p[0]]]

    def value(places):
        s = torch.tensor([[values[i] for i in places]], dtype=torch.float64)
        t = torch.tensor([[grades[i] for i in places]], dtype=torch.float64)
        return float(query_losses(group(s, p, n, teacher=t), LossSettings(name)))

    assert value(order) == pytest.approx(value(range(len(values))), abs=1e-10)


@given(
    st.lists(st.floats(-60000, 60000, width=16), min_size=2, max_size=8),
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    st.sampled_from([n for n in LOSSES if n not in TEACHER]),
    st.integers(0, 3),
)
@settings(max_examples=120, deadline=None)
def test_half_precision_and_extreme_scores_stay_finite(values, dtype, name, empty):
    """Any representable scores, with rows that lack a side (or both), give finite losses and gradients."""
    width = len(values)
    scores = torch.tensor([values, values], dtype=dtype).clamp(-30000, 30000).requires_grad_()
    p = torch.zeros(2, width, dtype=torch.bool)
    p[:, 0] = True
    n = torch.zeros(2, width, dtype=torch.bool)
    n[:, 1:] = True
    if empty & 1:
        p[1] = False
    if empty & 2:
        n[1] = False
    losses = query_losses(GroupScores(scores, p, n, torch.zeros(2, dtype=torch.int64)), LossSettings(name))
    losses.sum().backward()
    assert losses.isfinite().all() and (losses >= -1e-3).all() and losses.dtype == torch.float32
    assert scores.grad.isfinite().all()
    if empty:
        assert losses[1].item() == 0 and not scores.grad[1].any()


def test_what_stands_outside_the_masks_has_no_part():
    """Columns that are neither positive nor negative may hold anything, NaN and infinity included."""
    for name in LOSSES:
        scores = torch.tensor([[0.5, -0.5, float("nan"), INFINITY]], dtype=torch.float64)
        teacher = torch.tensor([[1.0, 0.0, float("nan"), float("nan")]], dtype=torch.float64)
        clean = scores[:, :2].clone()
        dirty = scores.clone().requires_grad_()
        p, n = [[True, False, False, False]], [[False, True, False, False]]
        loss = query_losses(group(dirty, p, n, teacher=teacher), LossSettings(name))
        plain = group(clean, [p[0][:2]], [n[0][:2]], teacher=teacher[:, :2])
        assert float(loss) == pytest.approx(float(query_losses(plain, LossSettings(name))))
        loss.sum().backward()
        assert dirty.grad[0, :2].isfinite().all() and not dirty.grad[0, 2:].any(), name


def test_dividing_by_m():
    groups, _, _ = example()
    m = groups.positive.sum(dim=1)
    for name in ("joint_lh", "lse_pair"):
        whole, divided = (query_losses(groups, LossSettings(name, divide_by_m=d)) for d in (False, True))
        torch.testing.assert_close(divided, whole / m)


def test_joint_pushes_a_strong_positive_down_and_lse_pair_pulls_the_weak_one():
    """What the losses are chosen for: who is moved, and which way."""
    s = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)
    p, n = [[True, True, False]], [[False, False, True]]
    gradient = {}
    for name in ("joint_lh", "sum_marg_lh", "lse_pair"):
        leaf = s.clone().requires_grad_()
        query_losses(group(leaf, p, n), LossSettings(name)).sum().backward()
        gradient[name] = leaf.grad[0]
    assert gradient["joint_lh"][0] > 0  # above 1/m: pushed down
    assert (
        abs(gradient["sum_marg_lh"][1]) < 0.01 < abs(gradient["lse_pair"][1])
    )  # the weak one: left alone, pulled
    assert gradient["lse_pair"][1] < 10 * gradient["lse_pair"][0] < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "triplet"}, "no loss 'triplet'"),
        (
            {"name": "joint_lh", "positive_side": "min"},
            "--positive-side min is an option of the loss lse_pair",
        ),
        ({"name": "kl", "negative_side": "max"}, "--negative-side max"),
        ({"name": "lse_pair", "positive_side": "mean"}, "no positive side 'mean'"),
        ({"name": "sum_marg_lh", "divide_by_m": True}, "--divide-by-m"),
        ({"name": "lse_pair", "teacher_scale": 2.0}, "--teacher-scale"),
        ({"name": "lse_pair", "scale": 0.0}, "above 0"),
    ],
)
def test_options_a_loss_does_not_have_are_refused_by_name(options, message):
    with pytest.raises(TamisError, match=message):
        LossSettings(**options)


def test_a_loss_that_needs_a_teacher_says_so():
    groups, scores, _ = example()
    with pytest.raises(ValueError, match="teacher"):
        query_losses(GroupScores(scores, groups.positive, groups.negative, groups.first), LossSettings("kl"))


def ids(documents, positives, negatives, masked, **teacher):
    return GroupIds(*(torch.tensor(x) for x in (documents, positives, negatives, masked)), **teacher)


def test_targets_mask_false_negatives_by_query_and_not_for_everyone():
    """Document 7 is query 0's positive and masked for query 1; for query 2 it is a negative like any other."""
    groups = ids([9, 7, 5, 3], [[7, 9], [5, -1], [3, -1]], [[3], [3], [-1]], [[-1], [7], [-1]])
    targets = make_targets(groups)
    assert targets.positive.tolist() == [
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    assert targets.negative.tolist() == [
        [False, False, True, True],
        [True, False, False, True],
        [True, True, True, False],
    ]
    assert targets.first.tolist() == [1, 2, 3]  # 7 is the best of query 0, and stands second
    own = make_targets(groups, in_batch=False)
    assert own.negative.int().sum(dim=1).tolist() == [1, 1, 0]


def test_targets_carry_the_teacher_where_it_spoke():
    groups = ids(
        [4, 2, 8], [[2]], [[8]], [[-1]],
        positive_teacher=torch.tensor([[2.0]]), negative_teacher=torch.tensor([[0.5]]),
    )  # fmt: skip
    teacher = make_targets(groups).teacher
    assert teacher[0, 1] == 2.0 and teacher[0, 2] == 0.5 and teacher[0, 0].isnan()


def test_a_query_without_a_positive_is_unusable_and_not_a_zero_in_the_mean():
    groups = ids([1, 2, 3], [[1], [-1]], [[2], [3]], [[-1], [-1]])
    targets = make_targets(groups)
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    scored = GroupScores(scores, targets.positive, targets.negative, targets.first)
    assert scored.usable.tolist() == [True, False]
    for name in LOSSES:
        if name not in TEACHER:
            losses = query_losses(scored, LossSettings(name))
            assert float(losses[0]) > 0 and float(losses[1]) == 0
