"""Who may be a negative, and for all others the reason why not."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import TamisError
from transforms.retrieval.mining import MiningRules, mine

SCHEMA = {
    "query_id": pl.String,
    "doc_id": pl.String,
    "source": pl.String,
    "rank": pl.Int32,
    "score": pl.Float64,
    "grade": pl.Int32,
}


def pool(*rows: tuple) -> pl.DataFrame:
    """(doc, source, rank, score) of the query q."""
    return pl.DataFrame([("q", *r, None) for r in rows], schema=SCHEMA, orient="row")


def pairs(*docs: str, why: str = "positive") -> pl.DataFrame:
    found = pl.DataFrame({"query_id": ["q"] * len(docs), "doc_id": list(docs), "why": [why] * len(docs)})
    return found.cast(pl.String)


POSITIVES = pairs("p1", "p2")
POOL = pool(
    ("p1", "dense", 1, 10.0),
    ("n1", "dense", 2, 9.0),
    ("n2", "dense", 3, 8.0),
    ("p2", "dense", 4, 6.0),
    ("n3", "dense", 5, 5.9),
    ("n4", "dense", 6, 5.0),
    ("n5", "dense", 7, -1.0),
)


def mined(rules: MiningRules, candidates: pl.DataFrame = POOL, mask: pl.DataFrame = POSITIVES):
    negatives, rejected = mine(candidates, POSITIVES, mask, rules)
    return negatives["doc_id"].to_list(), dict(rejected.select("doc_id", "reason").rows())


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (MiningRules(), ["n1", "n2", "n3", "n4", "n5"]),
        (MiningRules(absolute_margin=0.5), ["n4", "n5"]),  # below 6.0 - 0.5
        (MiningRules(absolute_margin=0.5, against="strongest"), ["n1", "n2", "n3", "n4", "n5"]),
        (MiningRules(absolute_margin=1.5, against="strongest"), ["n2", "n3", "n4", "n5"]),
        (MiningRules(absolute_margin=0.0, against="mean"), ["n2", "n3", "n4", "n5"]),
        (MiningRules(relative_margin=0.05), ["n4", "n5"]),  # below 6.0 * 0.95 = 5.7
        (MiningRules(first_rank=3, last_rank=6), ["n2", "n3", "n4"]),
        (MiningRules(max_score=8.0, min_score=0.0), ["n2", "n3", "n4"]),
        (MiningRules(max_negatives=2), ["n1", "n2"]),
        (MiningRules(sources=("bm25",)), []),
    ],
)
def test_rules(rules, kept):
    assert mined(rules)[0] == kept


def test_every_rejected_candidate_has_the_first_reason_it_met():
    rules = MiningRules(first_rank=3, relative_margin=0.05, min_score=0.0, max_negatives=1)
    negatives, reasons = mined(rules, pl.concat([POOL, pool(("n6", "dense", 8, 1.0))]))
    assert negatives == ["n4"]
    assert reasons == {
        "p1": "positive",
        "p2": "positive",
        "n1": "before_first_rank",
        "n2": "relative_margin",
        "n3": "relative_margin",
        "n5": "below_min_score",
        "n6": "over_max_negatives",
    }


def test_the_limit_that_rejected_a_candidate_is_logged():
    _, rejected = mine(POOL, POSITIVES, POSITIVES, MiningRules(relative_margin=0.05))
    limits = dict(rejected.select("doc_id", "limit").rows())
    assert limits["n1"] == pytest.approx(5.7)
    assert limits["p1"] is None


def test_a_relative_margin_means_something_below_zero():
    """A share of the size: 5 % below -2 is -2.1, and not -1.9, which would let in what scores above the positive."""
    scores = pool(("p1", "s", 1, -2.0), ("n1", "s", 2, -2.05), ("n2", "s", 3, -2.2))
    negatives, reasons = mined(MiningRules(relative_margin=0.05), scores)
    assert negatives == ["n2"]
    assert reasons["n1"] == "relative_margin"


def test_scores_of_two_sources_are_never_compared():
    both = pl.concat([POOL, pool(("p1", "bm25", 1, 900.0), ("n6", "bm25", 2, 100.0))])
    assert mined(MiningRules(relative_margin=0.05), both)[0] == ["n6", "n4", "n5"]


def test_what_one_source_gives_away_holds_for_the_other():
    both = pl.concat([POOL, pool(("p1", "bm25", 1, 9.0), ("n1", "bm25", 2, 1.0))])
    negatives, _ = mined(MiningRules(relative_margin=0.05), both)
    assert "n1" not in negatives
    _, rejected = mine(both, POSITIVES, POSITIVES, MiningRules(relative_margin=0.05))
    reasons = {(d, s): r for d, s, r in rejected.select("doc_id", "source", "reason").rows()}
    assert reasons["n1", "dense"] == "relative_margin"
    assert reasons["n1", "bm25"] == "rejected_in_another_source"


def test_without_a_positive_s_score_margins_keep_or_drop_as_told():
    unscored = pool(("n1", "dense", 1, 3.0), ("n2", "random", 1, None))
    assert mined(MiningRules(relative_margin=0.05), unscored)[0] == ["n1", "n2"]
    negatives, reasons = mined(MiningRules(relative_margin=0.05, without_score="drop"), unscored)
    assert negatives == ["n2"]  # without a score there is nothing to compare, whoever the positive is
    assert reasons == {"n1": "no_positive_score"}


def test_of_two_sources_the_better_rank_stands():
    both = pool(("n1", "a", 5, 1.0), ("n1", "b", 2, 7.0), ("n2", "a", 2, 1.5))
    negatives, rejected = mine(both, POSITIVES, POSITIVES, MiningRules(sources=("a", "b")))
    assert negatives.select("doc_id", "source", "rank").rows() == [("n2", "a", 2), ("n1", "b", 2)]
    assert rejected.height == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([f"n{i}" for i in range(8)] + ["p1", "p2"]),
            st.sampled_from("ab"),
            st.floats(-5, 5),
        ),
        max_size=25,
        unique_by=lambda r: r[:2],
    ),
    st.one_of(st.none(), st.floats(0, 2)),
    st.one_of(st.none(), st.floats(0, 0.9)),
    st.sampled_from(["weakest", "strongest", "mean"]),
)
def test_no_negative_breaks_a_margin_and_no_candidate_is_lost(rows, absolute, relative, against):
    candidates = pool(*((d, s, i + 1, x) for i, (d, s, x) in enumerate(rows)))
    rules = MiningRules(absolute_margin=absolute, relative_margin=relative, against=against)
    negatives, rejected = mine(candidates, POSITIVES, POSITIVES, rules)
    kept = set(negatives["doc_id"])
    assert kept | set(rejected["doc_id"]) == {d for d, *_ in rows}
    assert not kept & set(rejected["doc_id"])
    assert not kept & {"p1", "p2"}
    for source in "ab":
        anchors = [x for d, s, x in rows if s == source and d in ("p1", "p2")]
        if not anchors:
            continue
        anchor = {
            "weakest": min(anchors),
            "strongest": max(anchors),
            "mean": sum(anchors) / len(anchors),
        }[against]
        for d, s, x in rows:
            if d in kept and s == source:
                assert absolute is None or x <= anchor - absolute + 1e-9
                assert relative is None or x <= anchor - abs(anchor) * relative + 1e-9


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"against": "median"}, "weakest, strongest, mean"),
        ({"first_rank": 0}, "ranks start at 1"),
        ({"first_rank": 5, "last_rank": 2}, "holds no rank"),
        ({"min_score": 2.0, "max_score": 1.0}, "no score lies between"),
        ({"max_negatives": 0}, "--min-negatives 0"),
        ({"without_score": "guess"}, "neither keep nor drop"),
    ],
)
def test_contradictions_are_refused_by_name(settings_, says):
    with pytest.raises(TamisError, match=says):
        MiningRules(**settings_)
