"""Figures of rankings: those of pytrec_eval, RR@k by the same rules, and tests that are what scipy says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InputError
from transforms.retrieval.scoring import by_query, compare, holm, parse_measures

pytrec_eval = pytest.importorskip("pytrec_eval")
DOCS = [f"d{i}" for i in range(12)]
grades = st.dictionaries(st.sampled_from(DOCS), st.integers(0, 3), min_size=1)
scores = st.dictionaries(st.sampled_from(DOCS), st.integers(-2, 3).map(float))  # few values: many ties


@given(labels=grades, ranking=scores)
def test_every_figure_is_pytrec_eval_s(labels, ranking):
    measures = parse_measures(["nDCG@5", "RR@3", "RR", "R@5", "AP", "P(rel=2)@5"])
    ours = by_query(measures, {"q": labels}, {"q": ranking}, ["q"])
    if not ranking:
        assert all(v == [0.0] for v in ours.values())
        return
    names = {"ndcg_cut.5", "recip_rank", "recall.5", "map"}
    theirs = pytrec_eval.RelevanceEvaluator({"q": labels}, names).evaluate({"q": ranking})["q"]
    strict = pytrec_eval.RelevanceEvaluator({"q": labels}, {"P.5"}, relevance_level=2)
    assert ours["nDCG@5"] == [theirs["ndcg_cut_5"]]
    assert ours["RR"] == [theirs["recip_rank"]]
    assert ours["R@5"] == [theirs["recall_5"]]
    assert ours["AP"] == [theirs["map"]]
    assert ours["P(rel=2)@5"] == [strict.evaluate({"q": ranking})["q"]["P_5"]]
    order = sorted(ranking, key=lambda d: (ranking[d], d), reverse=True)  # trec_eval's: ties by id descending
    first = next((r for r, d in enumerate(order, 1) if labels.get(d, 0) > 0), None)
    assert ours["RR@3"] == [pytest.approx(1 / first if first and first <= 3 else 0.0, abs=1e-6)]


def test_a_query_without_answer_counts_zero_in_the_given_order():
    measures = parse_measures(["nDCG@10"])
    labels = {"a": {"d": 1}, "b": {"d": 1}}
    assert by_query(measures, labels, {"b": {"d": 1.0}}, ["a", "b"]) == {"nDCG@10": [0.0, 1.0]}


def test_measures_are_named_or_refused():
    assert [m.name for m in parse_measures(["RR@10", "RR@10", "AP"])] == ["RR@10", "AP"]
    assert {m.provider for m in parse_measures(["RR@10", "nDCG@10", "R@100"])} == {"pytrec_eval"}
    with pytest.raises(InputError, match="no measure 'nDGC@10'"):
        parse_measures(["nDGC@10"])


def test_paired_tests():
    a, b = [0.5, 0.7, 0.9, 0.4, 0.8], [0.4, 0.5, 0.9, 0.5, 0.3]
    from scipy.stats import ttest_rel

    x = compare(a, b, seed=1, draws=500)
    assert (x.wins, x.losses) == (3, 1)
    assert x.t_p == pytest.approx(ttest_rel(a, b).pvalue)
    assert x.bootstrap.difference.mean == pytest.approx(sum(a) / 5 - sum(b) / 5)
    same = compare(a, a)
    assert (same.t_p, same.wins, same.losses) == (1.0, 0, 0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
