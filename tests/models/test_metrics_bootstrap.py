import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.metrics.bootstrap import (
    clustered_interval,
    ends,
    mean_interval,
    paired_difference,
    ratio_interval,
    resampled_sums,
    share_interval,
    stratified_difference,
)
from schemas.errors import TamisError

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(numbers, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_estimate_lies_inside_and_the_same_call_gives_the_same_numbers(values, seed):
    first = mean_interval(values, seed=seed, draws=50)
    assert first == mean_interval(values, seed=seed, draws=50)
    assert first.low <= first.mean <= first.high
    assert min(values) - 1e-6 <= first.low and first.high <= max(values) + 1e-6
    assert first.mean == pytest.approx(np.mean(values)) and first.n == len(values)


@given(numbers)
@settings(max_examples=25, deadline=None)
def test_a_higher_level_holds_a_lower_one(values):
    wide, narrow = mean_interval(values, level=0.99, draws=200), mean_interval(values, level=0.5, draws=200)
    assert wide.low <= narrow.low and narrow.high <= wide.high


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
@settings(max_examples=25, deadline=None)
def test_clusters_of_one_are_no_clusters_and_copies_are_no_evidence(values):
    alone = mean_interval(values, draws=100)
    singles = clustered_interval(values, range(len(values)), draws=100)
    copied = clustered_interval(np.repeat(values, 5), np.repeat(np.arange(len(values)), 5), draws=100)
    for other in (singles, copied):
        assert other.n == alone.n
        assert (other.mean, other.low, other.high) == pytest.approx(
            (alone.mean, alone.low, alone.high), abs=1e-9
        )


def test_the_interval_has_the_width_theory_says_and_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered, widths = 0, []
    for repeat in range(200):
        interval = mean_interval(generator.normal(3.0, 1.0, 100), seed=repeat, draws=400)
        covered += interval.low <= 3.0 <= interval.high
        widths.append(interval.high - interval.low)
    assert 0.90 <= covered / 200 <= 0.985
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 10, rel=0.08)


def test_a_share_without_an_exception_does_not_claim_certainty():
    none = share_interval([0.0] * 100)
    assert none.mean == 0 and none.low == 0 and none.high == pytest.approx(0.037, abs=2e-3)  # Wilson
    every = share_interval([1.0] * 100)
    assert every.mean == 1 and every.high == 1 and every.low == pytest.approx(0.963, abs=2e-3)
    some = share_interval([0.0, 1.0] * 50)
    assert some == mean_interval([0.0, 1.0] * 50)
    with pytest.raises(TamisError, match=r"within \[0, 1\]"):
        share_interval([0.2, 1.2])


def test_a_ratio_is_of_sums_and_maps_to_a_perplexity():
    losses, tokens = np.array([2.0, 30.0, 4.0]), np.array([1.0, 10.0, 2.0])
    ratio = ratio_interval(losses, tokens)
    assert ratio.mean == pytest.approx(36 / 13)
    perplexity = ratio.map(math.exp)
    assert perplexity.mean == pytest.approx(math.exp(36 / 13)) and perplexity.low <= perplexity.mean
    assert ratio.map(lambda x: -x).low == -ratio.high
    with pytest.raises(TamisError, match="denominators"):
        ratio_interval([1.0], [0.0])


def test_a_paired_difference_sees_what_two_intervals_do_not():
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 5.0, 200)  # prompts differ a lot, the systems by little, but everywhere
    first, second = hard + 0.5 + generator.normal(0, 0.1, 200), hard
    assert not mean_interval(first).apart(mean_interval(second))
    found = paired_difference(first, second)
    assert found.difference.low > 0.4 and found.p_value < 0.01
    mirrored = paired_difference(second, first)
    assert mirrored.difference.mean == pytest.approx(-found.difference.mean)
    assert mirrored.p_value == found.p_value


def test_no_difference_is_no_finding():
    same = paired_difference([0.1, 0.7, 0.4], [0.1, 0.7, 0.4])
    assert same.difference.mean == 0 and same.p_value == 1.0
    generator = np.random.default_rng(2)
    p_values = [
        paired_difference(generator.normal(size=40), generator.normal(size=40), seed=i, draws=200).p_value
        for i in range(100)
    ]
    assert min(p_values) > 0 and np.mean(np.array(p_values) < 0.05) < 0.15


def test_pairs_in_clusters_count_clusters():
    a = np.repeat([1.0, 0.0, 1.0, 1.0], 25)
    b = np.zeros(100)
    loose = paired_difference(a, b)
    bound = paired_difference(a, b, clusters=np.repeat(np.arange(4), 25))
    assert bound.difference.n == 4 and loose.difference.n == 100
    assert bound.difference.mean == pytest.approx(loose.difference.mean)
    assert bound.difference.high - bound.difference.low > loose.difference.high - loose.difference.low


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf")], []])
def test_what_is_no_number_is_refused(bad):
    for call in (
        lambda: mean_interval(bad),
        lambda: share_interval(bad),
        lambda: clustered_interval(bad, range(len(bad))),
        lambda: paired_difference(bad, bad),
        lambda: ratio_interval(bad, bad),
    ):
        with pytest.raises(TamisError, match=r"not finite|nothing"):
            call()


def test_sides_of_different_length_are_refused():
    with pytest.raises(TamisError, match="both its sides"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(TamisError, match="clusters"):
        clustered_interval([1.0, 2.0], ["a"])


def test_many_units_are_drawn_in_pieces(monkeypatch):
    from models.metrics import bootstrap

    whole = resampled_sums(np.arange(50.0)[:, None], draws=40)
    monkeypatch.setattr(bootstrap, "CELLS_AT_ONCE", 120)
    pieces = bootstrap.resampled_sums(np.arange(50.0)[:, None], draws=40)
    assert np.array_equal(whole, pieces)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.integers(0, 5), st.booleans())
@settings(deadline=None, max_examples=30)
def test_few_units_say_no_more_than_their_signs_could(gaps, level_pairs, clustered):
    """However clear five sentences are, their signs are all the same by chance once in sixteen times."""
    a, b = np.array([*gaps, *[0.0] * level_pairs]), np.zeros(len(gaps) + level_pairs)
    clusters = list(range(len(a))) if clustered else None
    found = paired_difference(a, b, clusters, draws=500)
    assert found.p_value == pytest.approx(max(2 / 501, 2.0 ** (1 - len(gaps)))) or level_pairs
    assert found.p_value >= min(1.0, 2.0 ** (1 - len(gaps)))
    strata = stratified_difference(a, b, [0] * len(a), draws=500)
    assert strata.p_value == found.p_value


def test_a_single_unit_has_no_interval_and_lies_apart_from_nothing():
    one, many = mean_interval([0.9]), mean_interval([0.1, 0.2, 0.1])
    assert not one.apart(many) and not many.apart(one) and str(one) == "0.900 [–]"
    assert ends(one.as_dict(), between=" to ") == "–"
    assert mean_interval([0.9, 0.9]).apart(many)
    # Of a share something is known: one unit without an exception leaves room for most of them.
    assert ends(share_interval([1.0]).as_dict(), 2) == "[0.21, 1.00]"
    assert ends(many.map(lambda x: -x).as_dict(), 1, "+", 100) == "[-20.0, -10.0]"
