"""Lists of passage numbers in what a model said, votes of several orders, and answers as question answering scores them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.metrics.answers import exact_match, f1, has_answer, words
from transforms.retrieval.labelling.parsing import parse_ranking, parse_selection
from transforms.retrieval.labelling.permutations import (
    merge_rankings,
    merge_selections,
    orders,
    top_share,
    unpermute,
)


class TestSelections:
    @pytest.mark.parametrize(
        ("text", "numbers", "status"),
        [
            ("[2], [5]", (2, 5), "ok"),
            (" [3]\n", (3,), "ok"),
            ('{"passages": [4, 1]}', (4, 1), "ok"),
            ("none", (), "ok"),
            ("[]", (), "ok"),
            ('{"passages": []}', (), "ok"),
            ("None.", (), "repaired"),
            ("None of the passages are relevant.", (), "repaired"),
            ("[none]", (), "repaired"),
            ("[1, 3]", (1, 3), "repaired"),
            ("[1] [3]", (1, 3), "repaired"),
            ("1, 3 and 5", (1, 3, 5), "repaired"),
            ("[2-4]", (2, 3, 4), "repaired"),
            ("[2] - [4], [6]", (2, 3, 4, 6), "repaired"),
            ("[5-2]", (5, 2), "repaired"),
            ("[1], [1], [2]", (1, 2), "repaired"),
            ("[1], [9], [0]", (1,), "repaired"),
            ("The useful ones are [1] and [4].", (1, 4), "repaired"),
            ("Answer: 2", (2,), "repaired"),
            ("Relevant passages: [2], [3]\n", (2, 3), "repaired"),
            ("- [2]\n- [3]", (2, 3), "repaired"),
            ("[2] explains the cause\n[3] gives the date", (2, 3), "repaired"),
            ("First I looked at [1] and [2]. My choice:\n[2], [6]", (2, 6), "repaired"),
            ("[Passage 2]", (2,), "repaired"),
        ],
    )
    def test_what_says_one_thing_is_read(self, text, numbers, status):
        reading = parse_selection(text, 6)
        assert (reading.numbers, reading.status) == (numbers, status), reading
        assert bool(reading.problem) == (status == "repaired")

    @pytest.mark.parametrize(
        ("text", "status"),
        [
            ("", "empty"),
            (" \n ", "empty"),
            ("I'm sorry, I cannot judge these.", "refused"),
            ("I can't help with that", "refused"),
            ("There are 3 passages that help.", "unparseable"),
            ("The first Nobel Prize was awarded in 1901.", "unparseable"),
            ("[7], [12]", "unparseable"),  # nobody showed these: not an empty selection
            ("[1] is not about this, and [2] is better.", "unparseable"),
            ("[1] is useful\n[2] is not", "unparseable"),
            ("Not [3].", "unparseable"),
            ("[1] " + "The prize was awarded to him for the discovery of rays. " * 9, "unparseable"),
            ("yes", "unparseable"),
            ("[i], [j]", "unparseable"),
        ],
    )
    def test_what_does_not_is_a_status_and_no_label(self, text, status):
        reading = parse_selection(text, 6)
        assert (reading.numbers, reading.status) == ((), status), reading
        assert reading.problem and not reading.readable

    @given(st.text(max_size=80), st.integers(1, 30))
    def test_any_text_gives_distinct_numbers_that_were_shown(self, text, n):
        for reading in (parse_selection(text, n), parse_ranking(text, n)):
            assert len(set(reading.numbers)) == len(reading.numbers)
            assert all(1 <= number <= n for number in reading.numbers)
            assert reading.readable or not reading.numbers

    @given(st.lists(st.integers(1, 20), min_size=1, unique=True))
    def test_a_list_as_asked_for_is_read_as_it_stands(self, numbers):
        said = parse_selection(", ".join(f"[{n}]" for n in numbers), 20)
        ranked = parse_ranking(
            " > ".join(f"[{n}]" for n in numbers),
            len(numbers) if set(numbers) == set(range(1, len(numbers) + 1)) else 20,
        )
        assert said.numbers == ranked.numbers == tuple(numbers)
        assert said.status == "ok"


class TestRankings:
    def test_an_order(self):
        assert parse_ranking("[2] > [1] > [3]", 3).status == "ok"
        assert parse_ranking("[2]>[1]>[3]", 3).numbers == (2, 1, 3)
        assert parse_ranking("2 > 1 > 3", 3).status == "repaired"
        assert parse_ranking('{"ranking": [3, 1, 2]}', 3) == parse_ranking("[3] > [1] > [2]", 3)

    def test_an_order_of_some_is_read_if_it_places_enough(self):
        assert parse_ranking("[2] > [1]", 5, at_least=2).status == "repaired"
        assert parse_ranking("[2] > [1]", 5, at_least=3).status == "unparseable"

    def test_none_is_no_order(self):
        assert parse_ranking("none", 3).status == "unparseable"


class TestOrders:
    def test_one_order_is_the_pools(self):
        assert orders(4, 1, 7, "q") == [(0, 1, 2, 3)]

    @given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 5))
    def test_nobody_stands_in_a_place_more_often_than_others(self, n, count, seed):
        found = orders(n, count, seed, "q")
        assert found == orders(n, count, seed, "q")
        assert all(sorted(order) == list(range(n)) for order in found)
        for place in range(n):
            times = Counter(order[place] for order in found)
            assert max(times.values()) <= -(-count // n)
            if count % n == 0:
                assert set(times.values()) == {count // n}

    def test_other_queries_and_seeds_have_other_orders(self):
        assert len({tuple(orders(8, 4, seed, q)) for seed in (1, 2) for q in ("a", "b")}) == 4

    @given(st.permutations(range(6)), st.lists(st.integers(1, 6), unique=True))
    def test_numbers_become_the_documents_that_stood_there(self, order, numbers):
        assert [order.index(i) + 1 for i in unpermute(numbers, order)] == numbers


class TestVotes:
    def test_shares_by_hand(self):
        votes = merge_selections([[0, 2], [2], []], 3)
        assert [v.share for v in votes] == pytest.approx([1 / 3, 0, 2 / 3])
        assert {v.readings for v in votes} == {3}

    def test_mean_ranks_by_hand(self):
        votes = merge_rankings([[2, 0, 1], [0, 2, 1]], 3)
        assert [v.rank for v in votes] == [1, 3, 2]  # 0 and 2 stand equal: the pool's order decides
        assert [v.share for v in votes] == pytest.approx([1 - 0.5 / 3, 1 / 3, 1 - 0.5 / 3])

    def test_who_is_left_out_shares_the_places_that_are_left(self):
        votes = merge_rankings([[1]], 3)
        assert [v.rank for v in votes] == [None, 1, None]
        assert votes[0].share == votes[2].share == pytest.approx(1 - 1.5 / 3)

    def test_no_reading_no_votes(self):
        assert merge_selections([], 3) == merge_rankings([], 3) == []

    @given(st.permutations(range(5)), st.lists(st.permutations(range(5)), min_size=1, max_size=4))
    def test_the_names_of_documents_do_not_matter(self, names, rankings):
        votes = merge_rankings(rankings, 5)
        renamed = merge_rankings([[names[i] for i in r] for r in rankings], 5)
        assert [renamed[names[i]].share for i in range(5)] == pytest.approx([v.share for v in votes])

    @pytest.mark.parametrize(("n", "top"), [(0, 0), (1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (31, 3)])
    def test_the_top_tenth_is_rounded_down_but_never_nothing(self, n, top):
        assert top_share(n, 10) == top


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "answers", "there"),
        [
            ("It was Wilhelm Conrad Röntgen, in 1901.", ["Wilhelm Conrad Röntgen"], 1),
            ("It was wilhelm conrad röntgen", ["Marie Curie", "Röntgen"], 1),
            ("They had a party", ["art"], 0),
            ("about 150782 crowns", ["150,782"], 1),
            ("the U.S. Senate", ["US senate"], 1),
            ("May 18 2018", ["May 18, 2018"], 1),
            ("anything", ["?!"], 0),
            ("anything", [""], 0),
            ("", ["a"], 0),
            ("anything", [], 0),
            ("The The played", ["the the"], 0),
            ("首都是北京市", ["北京"], 1),
        ],
    )
    def test_has_answer(self, text, answers, there):
        assert has_answer(text, answers) == there

    def test_exact_match_and_f1_by_hand(self):
        assert exact_match("The Beatles!", ["beatles"]) == 1
        assert exact_match("Beatles band", ["beatles"]) == 0
        assert f1("Beatles band", ["beatles", "x"]) == pytest.approx(2 / 3)
        assert f1("one one", ["one"]) == pytest.approx(2 / 3)  # a bag: it counts
        assert f1("nothing", ["beatles"]) == f1("", ["x"]) == exact_match("", [""]) == 0

    @given(st.text(max_size=30), st.text(max_size=30))
    def test_figures_agree_with_one_another(self, text, answer):
        assert f1(text, [answer]) == pytest.approx(f1(answer, [text]))
        if exact_match(text, [answer]):
            assert f1(text, [answer]) == pytest.approx(1.0)
            assert has_answer(text, [answer]) == 1
        assert words(" ".join(words(text))) == words(text)
