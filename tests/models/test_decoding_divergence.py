"""Divergences against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.decoding.divergence import DIVERGENCES, fkl, js, l2, rkl, tvd

P = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
Q = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])


def log_ratio(p, q):
    return q.log() - p.log()


def test_by_hand():
    d = log_ratio(P, Q)
    two = math.log(2)
    torch.testing.assert_close(l2(P, Q, d), torch.tensor([math.sqrt(0.125), math.sqrt(0.5)]))
    torch.testing.assert_close(tvd(P, Q, d), torch.tensor([0.25, 0.5]))
    # a token of no weight adds nothing, one that is ruled out by the other side adds infinity
    torch.testing.assert_close(fkl(P, Q, d), torch.tensor([0.25 * two, two]))
    torch.testing.assert_close(rkl(P, Q, d), torch.tensor([0.25 * two, math.inf]))
    torch.testing.assert_close(js(P, Q, d), torch.tensor([0.25 * two, math.inf]))


def test_js_is_half_of_jeffreys_and_not_bounded():
    p, q = torch.tensor([[1 - 1e-6, 1e-6]]), torch.tensor([[1e-6, 1 - 1e-6]])
    assert js(p, q, log_ratio(p, q)).item() > math.log(2)  # Jensen and Shannon's never is


@pytest.mark.parametrize("name", list(DIVERGENCES))
@given(logits=st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=12))
def test_never_negative_and_nothing_only_between_equals(name, logits):
    s, z = torch.tensor(logits, dtype=torch.float64).T
    p, q = torch.softmax(s, 0)[None], torch.softmax(z, 0)[None]
    apart = DIVERGENCES[name](p, q, log_ratio(p, q)).item()
    assert apart > -1e-9
    assert DIVERGENCES[name](p, p, log_ratio(p, p)).item() == 0
    if (p - q).abs().max() > 1e-3:
        assert apart > 0


def test_not_a_number_stays_so():
    p, q = P.clone(), Q.clone()
    p[0, 0] = math.nan
    for divergence in DIVERGENCES.values():
        assert divergence(p, q, log_ratio(p, q))[0].isnan()
