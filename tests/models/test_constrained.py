"""Constrained decoding: what an automaton reads, and that a model in this process writes nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lm.constrained import Constraint, TokenTrie, Vocabulary, automaton_of, token_texts
from models.lm.sampling import Drawn, Row, Step
from models.protocols import GenerationRequest, Message, NumberList, OneOf, Sampling
from schemas.errors import ModelError
from tests.models.tiny_lm import make_tokenizer, save_tiny_lm


def reads(form, text):
    automaton = automaton_of(form)
    state = automaton.start
    for character in text:
        state = automaton.step(state, character)
        if state is None:
            return False
    return automaton.complete(state)


@pytest.mark.parametrize("text", ["[1]", "[12], [1]", "[3], [10], [2]", "none"])
def test_lists_that_may_be_written(text):
    assert reads(NumberList(12, none="none"), text)


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", "[0]", "[01]", "[13]", "[1],", "[1], ", "[1],[2]", "[1], [1]", "[1] > [2]", "non", "nonee", "[1]none",
     "none, [1]", "1", "[1", "[1]]", "[[1]", " [1]", "[１]"],
)  # fmt: skip
def test_lists_that_may_not(text):
    assert not reads(NumberList(12, none="none"), text)


def test_how_long_a_list_may_be():
    form = NumberList(4, " > ", at_least=2, at_most=3)
    assert [reads(form, t) for t in ("[4]", "[4] > [1]", "[4] > [1] > [2]", "[4] > [1] > [2] > [3]", "none")] == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_one_of_a_few_texts():
    form = OneOf(("Yes", "No", "Not sure"))
    assert [reads(form, t) for t in ("Yes", "No", "Not sure", "Not", "yes", "")] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "make", [lambda: NumberList(0), lambda: NumberList(3, at_least=4), lambda: OneOf(())]
)
def test_a_form_nothing_can_have_is_refused(make):
    with pytest.raises(ValueError, match=r"list|options"):
        make()


@given(st.integers(1, 25), st.data())
def test_the_trie_gives_exactly_the_tokens_that_may_follow(count, data):
    form = NumberList(count, none="none")
    automaton = automaton_of(form)
    texts = [
        "[",
        "]",
        ", ",
        ",",
        " ",
        "[1",
        "], [",
        "1]",
        "none",
        "no",
        "ne",
        *map(str, range(30)),
        "x",
        "[2]",
        "[1], [",
    ]
    trie = TokenTrie(dict(enumerate(texts)))
    state, said = automaton.start, ""
    for _ in range(12):
        allowed = dict(trie.walk(automaton, state))
        for token, text in enumerate(texts):
            after = state
            for character in text:
                after = automaton.step(after, character) if after is not None else None
            assert (token in allowed) == (after is not None)
            assert after is None or allowed[token] == after
        if not allowed:
            break
        token = data.draw(st.sampled_from(sorted(allowed)))
        state, said = allowed[token], said + texts[token]
    if automaton.complete(state):
        numbers = [int(n) for n in re.findall(r"\d+", said)]
        assert len(numbers) == len(set(numbers))
        assert all(1 <= n <= count for n in numbers)


def test_marks_and_parts_of_characters_are_no_texts():
    tokenizer = make_tokenizer()
    texts = token_texts(tokenizer, len(tokenizer))
    assert not set(tokenizer.all_special_ids) & set(texts)
    assert " " in texts.values()
    assert len(texts) < 256  # the bytes above ASCII are parts of characters
    assert all(len(text) == 1 for text in texts.values())


def test_a_random_model_writes_the_form_and_stops(tmp_path):
    from models.lm.local import LocalLanguageModel

    model = LocalLanguageModel(save_tiny_lm(tmp_path))
    ask = (Message("user", "Which?"),)
    forms = [
        NumberList(3, " > ", at_least=3),
        NumberList(12, at_most=2, none="none"),
        OneOf(("Yes", "No")),
        None,
    ]
    requests = [GenerationRequest(ask, seed=i, form=form) for i, form in enumerate(forms)]
    sampling = Sampling(
        temperatures=(0.0, 1.0), per_temperature=3, top_k=0, repetition_penalty=1.0, max_new_tokens=40
    )
    together = model.generate(requests, sampling)
    for generation, form in zip(together[:3], forms[:3], strict=True):
        for candidate in generation.candidates:
            assert reads(form, candidate.text), candidate.text
            assert candidate.finish == "eos"
    alone = [model.generate([request], sampling)[0] for request in requests]
    assert [g.candidates for g in together] == [g.candidates for g in alone]


@pytest.mark.models
def test_the_embedded_model_writes_whole_orders():
    from models.registry import load

    model = load("lm", "smollm2")
    ask = (Message("user", "Rank the passages. [1] bread [2] rivers [3] bicycles. Query: dough"),)
    request = GenerationRequest(ask, 0, form=NumberList(3, " > ", 3))
    (generation,) = model.generate([request], Sampling((0.0,), 1, 1.0, 0, 1.0, 32))
    assert reads(request.form, generation.candidates[0].text)


def test_other_rows_and_an_earlier_hook_are_left_alone():
    tokenizer = make_tokenizer()
    vocabulary = Vocabulary(token_texts(tokenizer, len(tokenizer)))
    no = tokenizer.encode("N")[0]

    def ban(scores, sides, step):
        scores[:, no] = -torch.inf
        return scores

    hook = Constraint(vocabulary, frozenset({tokenizer.eos_token_id}), {1: OneOf(("Yes", "No"))}, ban)
    rows = (Row(0, 0.0, 0, 1), Row(1, 0.0, 0, 2))
    scores = hook(torch.zeros(2, len(tokenizer)), (), Step(rows, (0, 0), (Drawn(), Drawn())))
    assert int(torch.isfinite(scores[0]).sum()) == len(tokenizer) - 1
    assert torch.isfinite(scores[1]).nonzero().flatten().tolist() == tokenizer.encode("Y")


def test_a_vocabulary_that_cannot_write_the_form_is_an_error():
    hook = Constraint(Vocabulary({0: "a"}), frozenset({1}), {0: OneOf(("Yes",))})
    with pytest.raises(ModelError, match="vocabulary"):
        hook(torch.zeros(1, 2), (), Step((Row(0, 0.0, 0, 1),), (0,), (Drawn(),)))
