"""Labels by gain: known queries keep their empty set, harm is kept, and contexts are what they say they are."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.metrics.answers import f1
from models.protocols import TokenScores
from schemas.errors import InputError, TamisError
from tests.transforms.retrieval.fake_judge import FakeModel, judge_of, pooled, whole_table
from transforms.retrieval.collection import frame
from transforms.retrieval.labelling.gains import AnswerGain, Erag, LeaveOneOut, Marginal
from transforms.retrieval.labelling.likelihood_gain import LikelihoodGain
from transforms.retrieval.labelling.method import load_method
from transforms.retrieval.labelling.queries import PoolDocument, PooledQuery
from transforms.retrieval.unify import unify

RIGHT, WRONG = "It is Oslo.", "Bergen"


def given_to(request):
    """Numbers of the documents a reader is given, in order."""
    return tuple(int(n) for n in re.findall(r"word(\d+)", request.messages[-1].content))


def reader(answers, otherwise=WRONG):
    """A reader that answers by what it is given."""
    return lambda request: answers.get(given_to(request), otherwise)


def table_of(method, judge, query):
    (labels,) = method.label([query], judge)
    return whole_table(method, judge, query, labels), labels


class TestAnswerGain:
    def test_useful_is_what_turns_a_wrong_answer_into_a_right_one(self):
        method = AnswerGain()
        judge = judge_of(method, reader({(0,): RIGHT, (2,): "oslo\nand more"}))
        table, labels = table_of(method, judge, pooled(4, answers=["Oslo"]))
        assert table["value"].to_pylist() == [1, 0, 1, 0]
        assert table["binary"].to_pylist() == [True, False, True, False]
        assert table["known_query"].to_pylist() == [False] * 4
        assert set(table["target_model"].to_pylist()) == set(table["annotator"].to_pylist()) == {"fake@1"}
        assert set(table["signal_class"].to_pylist()) == {"D"}
        assert table["reply"].to_pylist() == [RIGHT, WRONG, "oslo", WRONG]
        assert labels.known_to == () and labels.facts == {"closed_answer": WRONG}

    def test_a_known_query_has_an_empty_gold_set_and_harm_is_kept(self):
        method = AnswerGain()
        judge = judge_of(method, reader({(): RIGHT, (1,): RIGHT}))
        table, labels = table_of(method, judge, pooled(3, answers=["Oslo"]))
        assert table["value"].to_pylist() == [-1, 0, -1]  # as it is, not clipped
        assert table["binary"].to_pylist() == [False] * 3
        assert table["known_query"].to_pylist() == [True] * 3
        assert labels.known_to == ("fake@1",)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from([RIGHT, WRONG, "", "Oslo and Bergen"]), min_size=5, max_size=5))
    def test_the_rules_hold_whatever_the_reader_says(self, said):
        contexts = [(), (0,), (1,), (2,), (3,)]
        for perf in ("has_answer", "em", "f1"):
            method = AnswerGain(perf=perf)
            judge = judge_of(method, reader(dict(zip(contexts, said, strict=True))))
            table, _ = table_of(method, judge, pooled(4, answers=["Oslo"]))
            known = table["known_query"][0].as_py()
            assert known == ("Oslo" in said[0])
            for value, useful, text in zip(
                table["value"].to_pylist(), table["binary"].to_pylist(), said[1:], strict=True
            ):
                assert -1 <= value <= 1
                assert useful == ("Oslo" in text and not known)
                assert not (known and useful)

    def test_partial_credit_by_f1(self):
        method = AnswerGain(perf="f1")
        judge = judge_of(method, reader({(0,): "Oslo city", (): "Oslo city in Norway"}))
        table, _ = table_of(method, judge, pooled(1, answers=["Oslo"]))
        assert table["value"][0].as_py() == pytest.approx(2 / 3 - 2 / 5)

    def test_an_empty_answer_is_a_wrong_one_and_a_broken_one_is_none(self):
        method = AnswerGain()
        judge = judge_of(method, reader({(0,): "", (1,): None}))
        table, _ = table_of(method, judge, pooled(3, answers=["Oslo"]))
        assert table["parse_status"].to_pylist() == ["ok", "error", "ok"]
        assert table["value"].to_pylist() == [0, None, 0]

    def test_without_the_closed_answer_there_is_no_gain(self):
        method = AnswerGain()
        table, _ = table_of(method, judge_of(method, reader({(): None})), pooled(2, answers=["Oslo"]))
        assert table["parse_status"].to_pylist() == ["error"] * 2
        assert table["known_query"].null_count == 2

    def test_a_query_without_gold_answers_has_a_status_and_nothing_is_asked(self):
        for method in (AnswerGain(), LikelihoodGain()):
            judge = judge_of(method, reader({}))
            table, _ = table_of(method, judge, pooled(2))
            assert table["parse_status"].to_pylist() == ["error"] * 2
            assert "answers" in table["error"][0].as_py() and judge.model.asked == []

    def test_the_target_model_reads_not_the_judge(self):
        method = AnswerGain()
        other = judge_of(method, FakeModel(reader({(0,): RIGHT}), name="target"))
        judge = judge_of(method, lambda request: 1 / 0, reader=other)
        table, _ = table_of(method, judge, pooled(2, answers=["Oslo"]))
        assert set(table["target_model"].to_pylist()) == {"target@1"}
        assert table["value"].to_pylist() == [1, 0]

    def test_labels_for_different_readers_never_merge_silently(self):
        method = AnswerGain()
        query = pooled(2, answers=["Oslo"])
        tables = []
        for name in ("small", "large"):
            judge = judge_of(method, FakeModel(reader({(0,): RIGHT} if name == "small" else {}), name=name))
            tables.append(table_of(method, judge, query)[0])
        both = frame(pa.concat_tables(tables))
        for policy in ("apart", "max", "majority"):
            with pytest.raises(InputError, match="target-model"):
                unify(both, policy)
        merged = unify(both, "max", across_targets=True)
        assert merged["doc_id"].to_list() == ["d0", "d1"] and merged["binary"].to_list() == [True, False]

    def test_documents_without_a_text(self):
        documents = (PoolDocument("a", "", "word0"), PoolDocument("b", "", "", missing=True))
        method = AnswerGain()
        table, _ = table_of(
            method, judge_of(method, reader({})), PooledQuery("q", "what", documents, ("Oslo",))
        )
        assert table["parse_status"].to_pylist() == ["ok", "error"]

    def test_tokens_are_counted_once(self):
        for method in (AnswerGain(), LeaveOneOut(), Marginal()):
            judge = judge_of(method, reader({}))
            table, _ = table_of(method, judge, pooled(3, answers=["Oslo"]))
            asked = judge.model.asked
            paid = sum(judge.model.count_tokens(m.content) for r in asked for m in r.messages)
            assert sum(table["prompt_tokens"].to_pylist()) == paid
            assert sum(table["completion_tokens"].to_pylist()) == len(asked)


class TestErag:
    def test_it_knows_no_baseline(self):
        method = Erag()
        judge = judge_of(method, reader({(): RIGHT, (1,): RIGHT}))
        table, labels = table_of(method, judge, pooled(2, answers=["Oslo"]))
        assert table["value"].to_pylist() == [0, 1] and labels.known_to == ("fake@1",)


class TestLeaveOneOut:
    def test_two_documents_by_hand(self):
        # Both together are right, and so is the second by itself: only without the second something is lost.
        method = LeaveOneOut()
        judge = judge_of(method, reader({(0, 1): RIGHT, (1,): RIGHT}))
        table, _ = table_of(method, judge, pooled(2, answers=["Oslo"]))
        assert table["value"].to_pylist() == [0, 1]
        assert table["binary"].to_pylist() == [False, True]
        assert table["context_ids"].to_pylist() == [["d1"], ["d0"]]
        assert len(set(table["context_hash"].to_pylist())) == 2

    def test_redundant_documents_lose_nothing_and_a_misleading_one_less_than_nothing(self):
        answers = {(0, 1, 2): WRONG, (0, 1): RIGHT, (0, 2): WRONG, (1, 2): WRONG}
        method = LeaveOneOut()
        table, _ = table_of(method, judge_of(method, reader(answers)), pooled(3, answers=["Oslo"]))
        assert table["value"].to_pylist() == [0, 0, -1]

    def test_only_what_fits_is_in_the_set(self):
        method = LeaveOneOut(context_size=2)
        table, _ = table_of(method, judge_of(method, reader({(0, 1): RIGHT})), pooled(4, answers=["Oslo"]))
        assert table["parse_status"].to_pylist() == ["ok", "ok", "too_long", "too_long"]
        texts = [f"word{i} " + "filler " * 60 for i in range(9)]
        judge = judge_of(LeaveOneOut(), FakeModel(reader({}), context_limit=300))
        table, _ = table_of(LeaveOneOut(), judge, pooled(9, answers=["Oslo"], texts=texts))
        assert 1 < table["parse_status"].to_pylist().count("ok") < 9
        assert all(judge.prompt_tokens(r) + 32 <= 300 for r in judge.model.asked)


class TestMarginal:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.data())
    def test_gains_along_an_order_add_up_to_what_all_of_them_give(self, n, permutations, seed, data):
        drawn = {}

        def say(request):
            context = frozenset(given_to(request))
            if context not in drawn:
                drawn[context] = data.draw(
                    st.sampled_from([RIGHT, WRONG, "Oslo then"]), label=str(sorted(context))
                )
            return drawn[context]

        method = Marginal(perf="f1", permutations=permutations)
        judge = judge_of(method, say, seed=seed)
        table, _ = table_of(method, judge, pooled(n, answers=["Oslo"]))
        whole, nothing = (f1(drawn[c], ["Oslo"]) for c in (frozenset(range(n)), frozenset()))
        assert sum(table["value"].to_pylist()) == pytest.approx(whole - nothing)

    def test_one_order_by_hand(self):
        method = Marginal()
        judge = judge_of(method, reader({(0, 1): RIGHT, (0, 1, 2): WRONG}))
        table, _ = table_of(method, judge, pooled(3, answers=["Oslo"]))
        assert table["value"].to_pylist() == [0, 1, -1]
        assert table["binary"].to_pylist() == [False, True, False]
        assert table["context_ids"].to_pylist() == [[], ["d0"], ["d0", "d1"]]
        assert table["votes"].null_count == 3

    def test_twins_share_what_the_pools_order_gives_to_the_first(self):
        def say(request):
            return RIGHT if set(given_to(request)) & {0, 1} else WRONG

        one, _ = table_of(Marginal(), judge_of(Marginal(), say), pooled(2, answers=["Oslo"]))
        method = Marginal(permutations=2)
        mean, _ = table_of(method, judge_of(method, say), pooled(2, answers=["Oslo"]))
        assert one["value"].to_pylist() == [1, 0]
        assert mean["value"].to_pylist() == [0.5, 0.5]
        assert mean["votes"].to_pylist() == [2, 2] and mean["context_ids"].to_pylist() == [["d1"], ["d0"]]


class ScoringModel(FakeModel):
    """Also scores given answers: by `score(request, text)`, a token a word."""

    def __init__(self, say, score, **options):
        super().__init__(say, **options)
        self.score, self.scored = score, []

    def chat_logprobs(self, requests, continuations, on_done):
        for i, (request, text) in enumerate(zip(requests, continuations, strict=True)):
            self.scored.append((request, text))
            values = self.score(request, text)
            on_done(
                i,
                TokenScores(
                    () if values is None else tuple(values),
                    10,
                    len(text.split()),
                    None if values else "broke",
                ),
            )


class TestLikelihoodGain:
    def make(self, likelihoods, say=None, **options):
        """Likelihoods a token by (documents, answer)."""

        def score(request, text):
            value = likelihoods.get((given_to(request), text.strip()), -9.0)
            return None if value is None else [value] * len(text.split())

        method = LikelihoodGain(**options)
        return method, judge_of(method, ScoringModel(say or reader({}), score))

    def test_of_the_likeliest_answer_on_either_side(self):
        likelihoods = {
            ((), "Oslo"): -4.0,
            ((), "Big town"): -3.0,
            ((0,), "Oslo"): -1.0,
            ((1,), "Big town"): -4.0,
        }
        method, judge = self.make(likelihoods)
        table, _ = table_of(method, judge, pooled(2, answers=["Oslo", "Big town"]))
        assert table["value"].to_pylist() == [-1 - -4, -8 - -4]  # Big town has two tokens
        assert table["binary"].to_pylist() == [True, False]
        assert set(table["signal_class"].to_pylist()) == {"C"}
        assert {text for _, text in judge.model.scored} == {" Oslo", " Big town"}
        mean, judge = self.make(likelihoods, normalise="mean")
        assert table_of(mean, judge, pooled(2, answers=["Oslo", "Big town"]))[0]["value"].to_pylist() == [
            2,
            -1,
        ]

    def test_a_known_query_keeps_its_gains_and_has_no_useful_document(self):
        method, judge = self.make({((0,), "Oslo"): -1.0}, reader({(): RIGHT}))
        table, labels = table_of(method, judge, pooled(2, answers=["Oslo"]))
        assert table["value"].to_pylist() == [8, 0]
        assert table["binary"].to_pylist() == [False, False]
        assert labels.known_to == ("fake@1",)

    def test_a_likelihood_that_cannot_be_had_is_a_status(self):
        method, judge = self.make({((1,), "Oslo"): None})
        table, _ = table_of(method, judge, pooled(2, answers=["Oslo"]))
        assert table["parse_status"].to_pylist() == ["ok", "error"]


@pytest.mark.parametrize("name", ["answer_gain", "erag", "leave_one_out", "marginal", "likelihood_gain"])
def test_methods_are_found_and_say_what_they_will_take(name):
    method = load_method(name)
    model = ScoringModel(reader({}), lambda request, text: [-1.0])
    judge = judge_of(method, model)
    query = pooled(4, answers=["Oslo", "Kristiania"])
    estimate = method.estimate(query, judge)
    assert model.asked == [] and model.scored == []
    method.label([query], judge)
    assert estimate.requests == len(model.asked) + len(model.scored)
    assert method.needs_answers and method.needs_target
    assert method.label([], judge) == []
    with pytest.raises(TamisError):
        load_method(name, {"answer_tokens": 0})
