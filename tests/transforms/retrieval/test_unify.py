"""Labels merge as they are told to, and who judged is never rewritten."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import InputError
from schemas.judgments import check_judgments, context_hash, judgment_table
from transforms.retrieval.collection import frame
from transforms.retrieval.unify import LabelFilter, PositiveRule, label_sets, query_sets, unify

HUMAN = {"label_source": "human", "annotator": "nist", "signal": "qrels"}


def judge(name: str, **more):
    return {"label_source": "llm", "annotator": name, "signal": "graded", "signal_class": "A", **more}


def labels(*rows: dict) -> pl.DataFrame:
    return frame(judgment_table([{"query_id": "q", "doc_id": "d", **r} for r in rows]))


def one(found: pl.DataFrame) -> dict:
    assert found.height == 1
    return found.row(0, named=True)


def test_labels_of_two_annotators_never_merge_unasked():
    both = labels({**HUMAN, "grade": 0}, {**judge("a"), "grade": 3})
    with pytest.raises(InputError, match=r"2 annotators.*human nist qrels.*--unify"):
        unify(both)
    assert unify(labels({**HUMAN, "grade": 0}, {**judge("a"), "grade": 3, "doc_id": "e"})).height == 2


def test_labels_for_two_readers_never_merge_unasked_not_even_by_max():
    both = labels(
        {**judge("a", target_model="x"), "value": 0.5}, {**judge("a", target_model="y"), "value": -0.5}
    )
    with pytest.raises(InputError, match=r"2 target models \(x, y\).*--across-targets"):
        unify(both, "max")
    assert one(unify(both, "max", across_targets=True))["target_model"] == "x"
    assert one(unify(LabelFilter(target_models=("y",)).apply(both)))["value"] == -0.5


def test_agnostic_labels_can_be_chosen_by_name():
    both = labels({**judge("a"), "grade": 1}, {**judge("a", target_model="y"), "grade": 0})
    assert LabelFilter(target_models=("agnostic",)).apply(both)["grade"].to_list() == [1]
    assert LabelFilter(target_models=("agnostic", "y")).apply(both).height == 2


def test_max_keeps_the_winner_s_own_name():
    found = one(unify(labels({**HUMAN, "grade": 1}, {**judge("a"), "grade": 3}), "max"))
    assert (found["label_source"], found["annotator"], found["grade"]) == ("llm", "a", 3)
    assert [(c["annotator"], c["grade"]) for c in found["contributors"]] == [("nist", 1), ("a", 3)]


def test_majority_lets_each_label_set_speak_once():
    rows = [{**judge("a", prompt_hash=f"p{i}"), "grade": 3} for i in range(5)]
    rows += [{**judge("b"), "grade": 0}, {**HUMAN, "grade": 0}]
    found = one(unify(labels(*rows), "majority"))
    assert found["positive"] is False
    assert (found["label_source"], found["grade"]) == ("human", 0)


def test_a_tie_is_not_positive():
    assert (
        one(unify(labels({**judge("a"), "grade": 1}, {**judge("b"), "grade": 0}), "majority"))["positive"]
        is False
    )


def test_people_are_preferred_where_they_judged():
    rows = [{**HUMAN, "grade": 0}, {**judge("a"), "grade": 3}, {**judge("b"), "grade": 3}]
    rows += [{**judge("a"), "grade": 2, "doc_id": "e"}, {**judge("b"), "grade": 2, "doc_id": "e"}]
    found = unify(labels(*rows), "prefer_human")
    assert found.select("doc_id", "label_source", "positive").rows() == [
        ("d", "human", False),
        ("e", "llm", True),
    ]


def test_a_reply_that_could_not_be_read_is_no_label():
    both = labels({**HUMAN, "grade": 1}, judge("a", parse_status="unparseable"))
    assert one(unify(both))["annotator"] == "nist"
    sets = {r["name"]: r for r in label_sets(both).iter_rows(named=True)}
    assert sets["llm a graded"]["unreadable"] == 1


@pytest.mark.parametrize(
    ("row", "rule", "positive"),
    [
        ({"grade": 1}, PositiveRule(2), False),
        ({"grade": 2, "binary": False}, PositiveRule(2), True),
        ({"binary": True}, PositiveRule(3), True),
        ({"value": 0.0}, PositiveRule(), False),
        ({"value": -0.2}, PositiveRule(value_above=-0.5), True),
        ({"rank": 2}, PositiveRule(), None),
        ({"rank": 2}, PositiveRule(rank_to=2), True),
    ],
)
def test_what_makes_a_label_positive(row, rule, positive):
    assert one(unify(labels({**judge("a"), **row}), rule=rule))["positive"] is positive


def test_a_known_query_keeps_its_empty_set():
    rows = labels(
        {**judge("m", target_model="m", known_query=True), "value": -1.0},
        {**judge("m", target_model="m", known_query=False), "query_id": "r", "value": 1.0},
    )
    queries = pl.DataFrame(
        {"query_id": ["q", "r", "s"], "text": ["", "", ""], "known_to": [["m"], None, ["m", "other"]]}
    )
    sets = {r["query_id"]: r for r in query_sets(rows, queries).iter_rows(named=True)}
    assert (sets["q"]["positives"], sets["q"]["known_query"]) == (0, True)
    assert (sets["r"]["positives"], sets["r"]["known_query"]) == (1, False)
    assert (sets["s"]["judged"], sets["s"]["positives"], sets["s"]["known_query"]) == (0, 0, True)


sources = st.sampled_from([HUMAN, judge("a"), judge("b"), judge("c")])
label = st.builds(
    lambda s, q, d, g: {**s, "query_id": q, "doc_id": d, "grade": g},
    sources,
    st.sampled_from("qr"),
    st.sampled_from("def"),
    st.integers(0, 3),
)


@settings(max_examples=60)
@given(st.lists(label, min_size=1, max_size=20), st.sampled_from(["max", "majority", "prefer_human"]))
def test_a_merge_gives_one_label_a_pair_by_somebody_who_judged_it(rows, policy):
    rows = list({(r["query_id"], r["doc_id"], r["annotator"]): r for r in rows}.values())
    whole = frame(judgment_table(rows))
    found = unify(whole, policy)
    assert sorted(found.select("query_id", "doc_id").rows()) == sorted(
        {(r["query_id"], r["doc_id"]) for r in rows}
    )
    judged = {(r["query_id"], r["doc_id"], r["label_source"], r["annotator"]) for r in rows}
    assert set(found.select("query_id", "doc_id", "label_source", "annotator").rows()) <= judged
    for row in found.iter_rows(named=True):
        mine = [r for r in rows if (r["query_id"], r["doc_id"]) == (row["query_id"], row["doc_id"])]
        assert sorted(c["annotator"] for c in row["contributors"]) == sorted(r["annotator"] for r in mine)
        grades = [r["grade"] for r in mine]
        if policy == "max":
            assert row["grade"] == max(grades)
        if policy == "prefer_human" and any(r["label_source"] == "human" for r in mine):
            assert row["label_source"] == "human"
        if policy == "majority":
            assert row["positive"] == (sum(g >= 1 for g in grades) * 2 > len(grades))


@given(st.permutations(list(range(6))), st.sampled_from(["max", "majority", "prefer_human"]))
def test_the_order_of_annotators_decides_nothing(order, policy):
    rows = [
        {**HUMAN, "grade": 1},
        {**judge("a"), "grade": 0},
        {**judge("b"), "grade": 3},
        {**judge("c"), "grade": 2},
        {**judge("d"), "grade": 0},
        {**judge("e"), "grade": 2},
    ]
    first = one(unify(labels(*rows), policy))
    again = one(unify(labels(*(rows[i] for i in order)), policy))
    assert (first["positive"], first["grade"]) == (again["positive"], again["grade"])


# ------------------------------------------------------------------------------------------------ rules of the table


def test_a_context_is_named_by_its_documents_in_order():
    table = judgment_table(
        [{"query_id": "q", "doc_id": "d", **judge("a"), "grade": 1, "context_ids": ["x", "y"]}]
    )
    assert table["context_hash"].to_pylist() == [context_hash(["x", "y"])]
    assert context_hash(["x", "y"]) != context_hash(["y", "x"]) != context_hash(["xy"])
    assert context_hash([]) is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label_source": "robot"}, "label_source is 'robot'; it may be human, llm"),
        ({"signal_class": "E"}, "signal_class is 'E'"),
        ({"parse_status": "fine"}, "parse_status is 'fine'"),
        ({"parse_status": "unparseable"}, "carries a label though its reply could not be read"),
        ({"grade": None}, "says parse_status ok but carries no grade"),
        ({"rank": 0}, "rank below 1"),
        ({"annotator": None}, "'annotator' may not be null"),
        ({"stars": 5}, "no column 'stars'"),
        ({"grade": "good"}, "does not fit"),
    ],
)
def test_rows_that_break_a_rule_are_refused(row, says):
    with pytest.raises(InputError, match=says):
        judgment_table([{"query_id": "q", "doc_id": "d", **judge("a"), "grade": 1, **row}])


def test_a_negative_gain_is_kept_as_it_is():
    table = judgment_table([{"query_id": "q", "doc_id": "d", **judge("a"), "value": -0.75}])
    check_judgments(table)
    assert table["value"].to_pylist() == [-0.75]
