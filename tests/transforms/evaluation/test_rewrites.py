"""STA, SIM, FL and J sentence by sentence; chrF and BLEU; significance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.evaluation.overlap import overlap
from transforms.evaluation.rewrites import (
    Measures,
    compare_systems,
    geometric_interval,
    holm,
    system_figures,
)


def measures(sta, sim, fl, **changes) -> Measures:
    n = len(sta)
    no = np.zeros(n, bool)
    return Measures(
        **{
            "toxicity": 1.0 - np.array(sta, float),
            "sta": np.array(sta, float),
            "sim": np.array(sim, float),
            "acceptability": np.array(fl, float),
            "fl": np.array(fl, float),
            "empty": no,
            "copied": no,
            "whole": ~no,
            **changes,
        }
    )


def test_j_is_the_mean_of_products_not_the_product_of_means():
    m = measures([1, 1, 0, 0], [0.0, 0.0, 1.0, 1.0], [1, 1, 1, 1])
    figures = system_figures(m, draws=200)
    assert (
        figures.metrics["J"].mean == 0
        and figures.metrics["STA"].mean == 0.5
        and figures.metrics["SIM"].mean == 0.5
    )
    assert figures.geometric.mean == pytest.approx(0.25 ** (1 / 3))
    assert list(figures.metrics) == ["J", "STA", "SIM", "FL"]


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1]), st.floats(0, 1), st.sampled_from([0, 1])), min_size=1, max_size=30
    )
)
def test_j_is_below_each_of_its_parts(rows):
    m = measures(*zip(*rows, strict=True))
    figures = system_figures(m, draws=100)
    j = figures.metrics["J"].mean
    assert all(j <= figures.metrics[k].mean + 1e-9 for k in ("STA", "SIM", "FL"))
    geometric = geometric_interval(m, draws=100)
    assert geometric.low <= geometric.mean <= geometric.high


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    sim = rng.uniform(0.2, 1.0, 400)
    ones = np.ones(400)
    systems = {"a": measures(ones, sim, ones), "b": measures(ones, np.clip(sim - 0.01, 0, 1), ones)}
    change = compare_systems(systems, "a", draws=500)
    assert list(change) == ["b"]
    assert change["b"]["J"].difference.mean == pytest.approx(-0.01) and change["b"]["J"].p_value < 0.01
    assert change["b"]["STA"].p_value == 1


def test_holm_keeps_order_and_never_lowers():
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_overlap_takes_any_number_of_references():
    outputs = ["the bus leaves at noon", "it is cold", "no reference here"]
    references = [["the bus leaves at noon"], ["cold it was", "it is cold today", "brr"], []]
    found = overlap(outputs, references, draws=200)
    assert found.chrf[0] == pytest.approx(100) and 0 < found.chrf[1] < 100 and np.isnan(found.chrf[2])
    assert found.bleu.n == 2 and found.bleu.low <= found.bleu.mean <= found.bleu.high
    assert "BLEU" not in found.signature and "version:2" in found.signature
    assert overlap(outputs, [[], [], []]) is None


def test_the_bootstrap_of_bleu_is_sacrebleus_own():
    """Sums of the rows' counts give the corpus figure: without resampling both are one."""
    from sacrebleu.metrics import BLEU

    rng = np.random.default_rng(1)
    words = [
        "the",
        "bus",
        "leaves",
        "at",
        "noon",
        "and",
        "my",
        "old",
        "town",
        "waits",
        "for",
        "you",
        "in",
        "the",
        "rain",
    ]
    outputs = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    references = [
        [o, " ".join(rng.choice(words, 9))] if i % 2 else [" ".join(rng.choice(words, 12))]
        for i, o in enumerate(outputs)
    ]
    found = overlap(outputs, references, draws=400)
    streams = [[r[0] for r in references], [r[1] if len(r) > 1 else None for r in references]]
    assert found.bleu.mean == pytest.approx(BLEU().corpus_score(outputs, streams).score)
    assert found.bleu.low < found.bleu.mean < found.bleu.high
