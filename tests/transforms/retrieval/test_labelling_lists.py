"""Listwise judging: orders undone, windows, retries, the stages of usefulness, and what a bad judge does to its labels."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.prompts import load_prompt
from models.protocols import NumberList
from schemas.errors import TamisError
from schemas.judgments import READABLE
from tests.transforms.retrieval.fake_judge import FakeModel, by_doc, judge_of, pooled, shown, whole_table
from transforms.retrieval.labelling.item import Item
from transforms.retrieval.labelling.judge import Judge
from transforms.retrieval.labelling.lists import windows
from transforms.retrieval.labelling.listwise import RelSel, UtilRank, UtilSel, UtilSelSpecific
from transforms.retrieval.labelling.method import load_method
from transforms.retrieval.labelling.queries import PoolDocument, PooledQuery


def selects(*wanted):
    """A judge that knows which documents it wants, wherever they stand."""

    def say(request):
        numbers = [i for i, document in enumerate(shown(request), 1) if document in wanted]
        return ", ".join(f"[{n}]" for n in numbers) or "none"

    return say


def ranks(order):
    """A judge with an order of its own."""

    def say(request):
        here = shown(request)
        return " > ".join(f"[{here.index(d) + 1}]" for d in order if d in here)

    return say


def stages(relevance, answer, use):
    """A judge that answers by what it is asked."""

    def say(request):
        system = request.messages[0].content
        if "answer questions" in system:
            return answer(request) if callable(answer) else answer
        drafted = any("draft answer" in m.content for m in request.messages)
        return (use if drafted else relevance)(request)

    return say


class TestRelSel:
    def test_one_order(self):
        method = RelSel()
        judge = judge_of(method, selects(0, 2))
        (labels,) = method.label([pooled(4)], judge)
        assert by_doc(labels, "binary") == {"d0": True, "d1": False, "d2": True, "d3": False}
        assert by_doc(labels, "value") == {"d0": 1.0, "d1": 0.0, "d2": 1.0, "d3": 0.0}
        assert set(by_doc(labels, "votes").values()) == {1}
        assert labels.rows[0]["context_ids"] == ["d0", "d1", "d2", "d3"]
        assert labels.rows[0]["prompt_hash"].startswith("relsel-v1@")
        (request,) = judge.model.asked
        assert shown(request) == [0, 1, 2, 3] and request.form == NumberList(4, none="none")
        assert '"maximum":4' in request.schema

    def test_rows_fit_the_table(self):
        method = RelSel(permutations=2)
        judge = judge_of(method, selects(1))
        query = pooled(3)
        (labels,) = method.label([query], judge)
        table = whole_table(method, judge, query, labels)
        assert table["signal"].to_pylist() == ["relsel"] * 3
        paid = sum(judge.model.count_tokens(m.content) for r in judge.model.asked for m in r.messages)
        assert sum(table["prompt_tokens"].to_pylist()) == paid  # nothing is counted twice or lost

    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 99))
    def test_a_judge_that_always_picks_the_first_prefers_nobody(self, n, times, seed):
        method = RelSel(permutations=n * times)
        (labels,) = method.label([pooled(n)], judge_of(method, lambda request: "[1]", seed=seed))
        assert set(by_doc(labels, "value").values()) == {1 / n}
        assert set(by_doc(labels, "votes").values()) == {n * times}

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 8), st.sets(st.integers(0, 7)), st.integers(1, 5))
    def test_a_judge_without_a_preference_for_places_says_the_same_in_any_order(
        self, n, wanted, permutations
    ):
        method = RelSel(permutations=permutations)
        (labels,) = method.label([pooled(n)], judge_of(method, selects(*wanted)))
        assert by_doc(labels, "binary") == {f"d{i}": i in wanted for i in range(n)}

    def test_an_unreadable_reply_is_asked_for_once_more(self):
        replies = iter(["There are 2 that help.", "[2]"])
        method = RelSel(constrained=False)
        judge = judge_of(method, lambda request: next(replies))
        (labels,) = method.label([pooled(3)], judge)
        assert by_doc(labels, "binary") == {"d0": False, "d1": True, "d2": False}
        assert set(by_doc(labels, "parse_status").values()) == {"repaired"}
        first, second = judge.model.asked
        assert second.messages[: len(first.messages)] == first.messages
        assert second.messages[-2].content == "There are 2 that help."
        assert first.form is None and first.schema == ""

    @pytest.mark.parametrize(
        ("reply", "status"),
        [
            ("gibberish", "unparseable"),
            ("[17]", "unparseable"),
            ("", "empty"),
            ("I'm sorry, no.", "refused"),
            (None, "error"),
        ],
    )
    def test_what_cannot_be_read_is_a_status_and_never_a_label(self, reply, status):
        method = RelSel(permutations=2)
        judge = judge_of(method, lambda request: reply)
        query = pooled(3)
        (labels,) = method.label([query], judge)
        table = whole_table(method, judge, query, labels)
        assert table["parse_status"].to_pylist() == [status] * 3
        assert table["error"].null_count == 0
        assert len(judge.model.asked) == (2 if reply is None else 4)  # what broke for good is not asked again

    def test_going_on_with_receipts_is_no_choice(self):
        for said in ("Passage 1 is read.", "Passage 1 is read.\nPassage 3 is read.", "[2]"):

            def say(request, said=said):
                # Asked again, it repeats itself: the same words in its turn before.
                return said

            method = RelSel(constrained=False)
            judge = judge_of(method, say)
            (labels,) = method.label([pooled(3)], judge)
            status = set(by_doc(labels, "parse_status").values())
            assert status == ({"ok"} if said == "[2]" else {"unparseable"}), said
            assert len(judge.model.asked) == (1 if said == "[2]" else 2)

    def test_receipts_of_a_prompt_of_ones_own_are_no_choice_either(self, tmp_path):
        shipped = load_prompt("relsel-v1", variables=("query", "count")).source
        (tmp_path / "mine.jinja").write_text(
            shipped.replace("Passage {{ number }} is read.", "[{{ number }}] ok")
        )
        prompts = {
            "select": load_prompt(tmp_path / "mine.jinja", variables=("query", "count")),
            "repair": load_prompt("list-repair-v1", variables=("count", "ranking")),
        }
        model = FakeModel(lambda request: "[2] ok")
        (labels,) = RelSel().label([pooled(3)], Judge(lambda: model, model.info, prompts=prompts))
        assert set(by_doc(labels, "parse_status").values()) == {"unparseable"}

    def test_one_reading_lost_leaves_the_others(self):
        def say(request):
            return "gibberish" if shown(request)[0] == 1 else selects(0)(request)

        method = RelSel(permutations=3)
        (labels,) = method.label([pooled(3)], judge_of(method, say))
        assert by_doc(labels, "binary") == {"d0": True, "d1": False, "d2": False}
        assert set(by_doc(labels, "votes").values()) == {2}
        assert set(by_doc(labels, "parse_status").values()) == {"repaired"}

    def test_a_long_list_is_shown_in_windows_that_cover_it(self):
        method = RelSel(window=4, overlap=0.5)
        judge = judge_of(method, selects(0, 5, 8))
        (labels,) = method.label([pooled(9)], judge)
        assert [shown(r) for r in judge.model.asked] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8]]
        assert [d for d, yes in by_doc(labels, "binary").items() if yes] == ["d0", "d5", "d8"]
        assert by_doc(labels, "votes") == {f"d{i}": 1 if i in (0, 1, 8) else 2 for i in range(9)}
        assert labels.facts["windows"] == 4

    def test_windows_come_by_themselves_where_the_context_is_short(self):
        texts = [f"about word{i} " + "filler " * 40 for i in range(12)]
        method = RelSel()
        judge = judge_of(method, FakeModel(selects(3), context_limit=700))
        (labels,) = method.label([pooled(12, texts=texts)], judge)
        assert len(judge.model.asked) > 1
        assert all(judge.prompt_tokens(r) <= 700 for r in judge.model.asked)
        assert [d for d, yes in by_doc(labels, "binary").items() if yes] == ["d3"]

    def test_a_document_without_a_text_has_a_status(self):
        documents = (
            PoolDocument("a", "", "about word0"),
            PoolDocument("b", "", "", missing=True),
            PoolDocument("c", "", " "),
        )
        method = RelSel()
        (labels,) = method.label([PooledQuery("q", "what", documents)], judge_of(method, selects(0)))
        assert by_doc(labels, "parse_status") == {"a": "ok", "b": "error", "c": "empty"}
        assert by_doc(labels, "binary") == {"a": True, "b": None, "c": None}

    def test_an_empty_pool_asks_nothing(self):
        method = RelSel()
        judge = judge_of(method, selects())
        (labels,) = method.label([PooledQuery("q", "what", ())], judge)
        assert labels.rows == () and judge.model.asked == []

    def test_neighbours_change_nothing(self):
        method = RelSel(permutations=3)
        queries = [pooled(5, f"q{i}") for i in range(3)]
        together = method.label(queries, judge_of(method, selects(1, 4)))
        alone = [method.label([q], judge_of(method, selects(1, 4)))[0] for q in queries]
        assert together == alone

    def test_a_spent_budget_leaves_queries_unasked_and_whole(self):
        class Spent:
            def left(self):
                return 0

            def spend(self, tokens):
                raise AssertionError("nothing may be asked")

        method = UtilSel()
        judge = judge_of(method, selects(1), ledger=Spent())
        (labels,) = method.label([pooled(3)], judge)
        assert labels.rows == () and labels.unasked == ("d0", "d1", "d2")


class TestWindows:
    @given(
        st.lists(st.integers(1, 60), max_size=30), st.integers(30, 200), st.integers(0, 8), st.floats(0, 0.99)
    )
    def test_they_cover_the_list_and_fit(self, lengths, room, most, overlap):
        found = windows(lengths, room, most, overlap)
        assert sorted({i for w in found for i in w}) == list(range(len(lengths)))
        for window in found:
            assert len(window) == 1 or sum(lengths[i] for i in window) <= room
            assert not most or len(window) <= most
        assert [w.start for w in found] == sorted({w.start for w in found})


class TestUtility:
    def test_usefulness_is_judged_among_what_is_relevant_beside_a_draft_answer(self):
        method = UtilSel()
        judge = judge_of(method, stages(selects(0, 2, 3), "Because of  rain.\n", selects(2)))
        (labels,) = method.label([pooled(5)], judge)
        _, answer, use = judge.model.asked
        assert shown(use) == [0, 2, 3] and "Because of rain." in use.messages[-1].content
        assert [w in answer.messages[-1].content for w in ("word0", "word1", "word2")] == [True, False, True]
        assert [d for d, yes in by_doc(labels, "binary").items() if yes] == ["d2"]
        assert None not in by_doc(labels, "binary").values()  # what RelSel left out is negative
        assert labels.facts["pseudo_answer"] == "Because of rain."
        assert labels.facts["relevant"] == ["d0", "d2", "d3"]
        assert set(by_doc(labels, "pseudo_answer_id").values()) == {labels.facts["pseudo_answer_id"]}
        assert by_doc(labels, "context_ids")["d2"] == ["d0", "d2", "d3"]

    def test_nothing_relevant_needs_no_further_question(self):
        method = UtilSel()
        judge = judge_of(method, stages(selects(), "Rain.", selects(1)))
        (labels,) = method.label([pooled(3)], judge)
        assert set(by_doc(labels, "binary").values()) == {False}
        assert len(judge.model.asked) == 1

    def test_the_whole_pool_and_the_gold_answer_can_be_had(self):
        method = UtilSel(candidates="pool", reference="gold")
        judge = judge_of(method, stages(selects(), "no", selects(1)))
        (labels,) = method.label([pooled(3, answers=["Oslo", "Kristiania"])], judge)
        (use,) = judge.model.asked
        assert "Oslo / Kristiania" in use.messages[-1].content and shown(use) == [0, 1, 2]
        assert by_doc(labels, "binary")["d1"] and labels.facts.get("pseudo_answer") is None

    def test_without_a_draft_there_is_no_label_for_what_it_was_for(self):
        method = UtilSel()
        judge = judge_of(method, stages(selects(0), None, selects(0)))
        (labels,) = method.label([pooled(2)], judge)
        assert by_doc(labels, "parse_status") == {"d0": "error", "d1": "ok"}
        assert by_doc(labels, "binary") == {"d0": None, "d1": False}

    def test_what_a_reader_says_it_needs_is_for_that_reader(self):
        method = UtilSelSpecific(candidates="pool", reference="none")
        target = judge_of(method, FakeModel(selects(1), name="target"))
        judge = judge_of(method, lambda request: 1 / 0, reader=target)
        table = whole_table(method, judge, pooled(2), method.label([pooled(2)], judge)[0])
        assert set(table["target_model"].to_pylist()) == set(table["annotator"].to_pylist()) == {"target@1"}
        assert table["binary"].to_pylist() == [False, True] and set(table["signal"].to_pylist()) == {
            "utilsel_specific"
        }
        assert "both tests" in target.model.asked[0].messages[-1].content

    def test_an_order_makes_the_top_tenth_positive(self):
        order = list(range(20))[::-1]
        method = UtilRank(reference="none", candidates="pool")
        judge = judge_of(method, ranks(order))
        (labels,) = method.label([pooled(20)], judge)
        assert '"minItems":20' in judge.model.asked[0].schema
        assert by_doc(labels, "rank") == {f"d{i}": 20 - i for i in range(20)}
        assert [d for d, yes in by_doc(labels, "binary").items() if yes] == ["d18", "d19"]

    def test_orders_of_several_readings_are_averaged(self):
        method = UtilRank(reference="none", candidates="pool", permutations=4)
        first = " > ".join(f"[{i}]" for i in range(1, 5))
        (labels,) = method.label([pooled(4)], judge_of(method, lambda request: first))
        assert (
            len(set(by_doc(labels, "value").values())) == 1
        )  # a judge that repeats the order shown has no order
        (labels,) = method.label([pooled(4)], judge_of(method, ranks([2, 0, 3, 1])))
        assert by_doc(labels, "rank") == {"d0": 2, "d1": 4, "d2": 1, "d3": 3}

    def test_an_order_that_does_not_reach_far_enough_is_none(self):
        method = UtilRank(reference="none", candidates="pool", top_percent=50, constrained=False)
        (labels,) = method.label([pooled(6)], judge_of(method, lambda request: "[2] > [1]"))
        assert set(by_doc(labels, "parse_status").values()) == {"unparseable"}
        (labels,) = method.label([pooled(4)], judge_of(method, lambda request: "[2] > [1]"))
        assert by_doc(labels, "binary") == {"d0": True, "d1": True, "d2": False, "d3": False}
        assert by_doc(labels, "rank") == {"d0": 2, "d1": 1, "d2": None, "d3": None}

    @settings(max_examples=20, deadline=None)
    @given(st.permutations(range(11)), st.integers(3, 6))
    def test_the_best_of_a_long_list_comes_to_the_top_through_all_windows(self, order, window):
        method = UtilRank(reference="none", candidates="pool", window=window)
        judge = judge_of(method, ranks(order))
        (labels,) = method.label([pooled(11)], judge)
        assert by_doc(labels, "rank")[f"d{order[0]}"] == 1
        assert sorted(by_doc(labels, "rank").values()) == list(range(1, 12))
        assert all(len(shown(r)) <= window for r in judge.model.asked)


class TestItem:
    def test_it_ends_when_a_round_changes_nothing(self):
        def use(request):  # a better draft finds more
            draft = re.search(r"draft answer.*: (.*)", request.messages[-1].content).group(1)
            return selects(*((1, 2) if "rain" in draft else (1,)))(request)

        def answer(request):
            return "It was rain." if "word0" not in request.messages[-1].content else "Who knows."

        method = Item(rounds=5)
        judge = judge_of(method, stages(None, answer, use))
        (labels,) = method.label([pooled(3)], judge)
        assert labels.facts["rounds"] == 3 and labels.facts["settled"]
        assert labels.facts["pseudo_answer"] == "It was rain."
        assert [d for d, yes in by_doc(labels, "binary").items() if yes] == ["d1", "d2"]

    def test_it_ends_after_the_rounds_it_is_given(self):
        turn = iter(range(100))
        method = Item(rounds=4)
        judge = judge_of(method, stages(None, "Rain.", lambda request: f"[{next(turn) % 3 + 1}]"))
        (labels,) = method.label([pooled(3)], judge)
        assert labels.facts["rounds"] == 4 and not labels.facts["settled"]
        assert by_doc(labels, "binary") == {"d0": True, "d1": False, "d2": False}  # the last round's

    def test_the_second_variant_orders_by_relevance_between_the_rounds(self):
        def use(request):
            order = (
                [2, 1, 0]
                if "ank" in request.messages[-1].content and "useful" in request.messages[-1].content
                else [1, 2, 0]
            )
            return ranks(order)(request)

        method = Item(variant="ar", output="rank", rounds=2)
        judge = judge_of(method, stages(None, "Rain.", use))
        (labels,) = method.label([pooled(3)], judge)
        lists = [shown(r) for r in judge.model.asked if shown(r)]
        assert lists == [[0, 1, 2], [2, 1, 0], [1, 2, 0]]  # as pooled, by use, by relevance
        assert by_doc(labels, "rank") == {"d0": 3, "d1": 2, "d2": 1}

    @pytest.mark.parametrize("rounds_read", [0, 1, 9])
    def test_every_question_is_counted_once_even_where_a_round_fails(self, rounds_read):
        turn = iter(range(100))

        def use(request):
            return f"[{number % 3 + 1}]" if (number := next(turn)) < rounds_read else "hm"

        method = Item(rounds=3)
        judge = judge_of(method, stages(None, "Rain.", use))
        (labels,) = method.label([pooled(3)], judge)
        paid = sum(judge.model.count_tokens(m.content) for r in judge.model.asked for m in r.messages)
        assert sum(by_doc(labels, "prompt_tokens").values()) == paid

    def test_a_round_that_cannot_be_read_gives_no_label(self):
        method = Item()
        (labels,) = method.label([pooled(2)], judge_of(method, stages(None, "Rain.", lambda request: "hm")))
        assert not set(by_doc(labels, "parse_status").values()) & set(READABLE)


@pytest.mark.parametrize("name", ["relsel", "utilsel", "utilsel_specific", "utilrank", "item"])
def test_methods_are_found_and_say_what_they_will_take(name):
    method = load_method(name, {"permutations": 2})
    judge = judge_of(method, selects(0))
    estimate = method.estimate(pooled(4), judge)
    assert judge.model.asked == []
    assert estimate.requests >= 2 and estimate.prompt_tokens > 0
    method.label([pooled(4)], judge)
    asked = judge.model.asked
    assert estimate.requests >= len(asked)
    with pytest.raises(TamisError):
        load_method(name, {"permutations": 0})
    with pytest.raises(TamisError):
        load_method(name, {"overlap": 1.0})


def test_the_queries_own_answer_is_needed_only_where_it_is_shown():
    assert not UtilSel().needs_answers
    method = UtilRank(reference="gold", candidates="pool")
    assert method.needs_answers
    (labels,) = method.label([pooled(2)], judge_of(method, ranks([0, 1])))
    assert set(by_doc(labels, "parse_status").values()) == {"error"}
