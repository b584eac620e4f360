"""Short answers and given texts scored after prompts that begin alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lm.local import LocalLanguageModel
from models.lm.next_token import answer_tokens
from models.lm.server import ServerLanguageModel
from models.lm.server_scores import NO_ANSWER, NO_LOGPROBS, read_answers
from models.protocols import GenerationRequest, Message
from schemas.errors import ModelError
from tests.models.tiny_lm import make_tokenizer, save_adapter, save_base, save_tiny_lm

BEGIN = "Query: does bread rise?\n\nPassage: "
PASSAGES = ["Yeast makes it rise.", "The river is long.", "x", "Bread " * 12, "été 東京 <|im_end|> and on"]


SHARED = len(BEGIN)


def ask(passage, shared=SHARED, prefill=""):
    system = Message("system", "Answer Yes or No.")
    return GenerationRequest(
        (system, Message("user", f"{BEGIN}{passage}\n\nRelevant?")), 0, prefill, shared=shared
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LocalLanguageModel(save_base(tmp_path_factory.mktemp("lm") / "tiny", 3), dtype="float32")


def by_hand(model, request, tokens):
    """The definition: the whole prompt by itself through the plain model, and all of its vocabulary."""
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([model.encode(request)])).logits[0, -1]
    logprobs = torch.log_softmax(logits[: model.vocabulary].double(), -1)
    return [float(torch.logsumexp(logprobs[torch.tensor(group)], 0)) for group in tokens]


class TestAnswers:
    def test_are_those_of_each_prompt_by_itself(self, model):
        tokens = answer_tokens(model.tokenizer, ("Yes", "No"))
        scored = model.answer_logprobs([ask(p) for p in PASSAGES], ("Yes", "No"))
        for passage, scores in zip(PASSAGES, scored, strict=True):
            assert scores.values == pytest.approx(by_hand(model, ask(passage), tokens), abs=2e-4)
            assert scores.prompt_tokens == len(model.encode(ask(passage))) and scores.error is None

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.sampled_from(range(len(PASSAGES))), min_size=1, max_size=6))
    def test_depend_on_no_other_passage(self, model, chosen):
        alone = {i: model.answer_logprobs([ask(PASSAGES[i])], ("Yes", "No"))[0] for i in set(chosen)}
        together = model.answer_logprobs([ask(PASSAGES[i]) for i in chosen], ("Yes", "No"))
        for i, scores in zip(chosen, together, strict=True):
            if model._prepared.exact:
                assert scores == alone[i]
            else:
                assert scores.values == pytest.approx(alone[i].values, abs=1e-4)

    def test_come_one_by_one_and_in_order(self, model):
        seen = {}
        scored = model.answer_logprobs([ask(p) for p in PASSAGES], ("0", "1", "2"), seen.__setitem__)
        assert [seen[i] for i in range(len(PASSAGES))] == scored
        assert all(len(s.values) == 3 for s in scored) and model.answer_logprobs([], ("a", "b")) == []

    def test_a_beginning_that_is_not_said_changes_last_bits_only(self, model):
        with_it, without = (
            model.answer_logprobs([ask(p, n) for p in PASSAGES], ("Yes", "No")) for n in (len(BEGIN), 0)
        )
        for a, b in zip(with_it, without, strict=True):
            assert a.values == pytest.approx(b.values, abs=2e-4)

    def test_a_prompt_beyond_the_context_is_an_error_of_its_own(self, model):
        long, fine = model.answer_logprobs([ask("y" * 600), ask("fine")], ("Yes", "No"))
        assert "exceed the context" in long.error and not long.values and fine.error is None

    def test_the_prefill_is_part_of_the_prompt(self, model):
        tokens = answer_tokens(model.tokenizer, ("0", "1"))
        (scores,) = model.answer_logprobs([ask("some", prefill="Grade:")], ("0", "1"))
        assert scores.values == pytest.approx(by_hand(model, ask("some", prefill="Grade:"), tokens), abs=2e-4)

    def test_an_adapter_judges_too(self, tmp_path):
        base = save_base(tmp_path / "base", 1)
        adapted = LocalLanguageModel(base, adapter=save_adapter(tmp_path / "lora", base, 2), dtype="float32")
        tokens = answer_tokens(adapted.tokenizer, ("Yes", "No"))
        scored = adapted.answer_logprobs([ask(p) for p in PASSAGES], ("Yes", "No"))
        plain = LocalLanguageModel(base, dtype="float32").answer_logprobs(
            [ask(p) for p in PASSAGES], ("Yes", "No")
        )
        assert [s.values for s in scored] != [s.values for s in plain]
        assert scored[0].values == pytest.approx(by_hand(adapted, ask(PASSAGES[0]), tokens), abs=2e-4)

    def test_scores_that_are_no_numbers_stop_the_run(self, tmp_path):
        model = LocalLanguageModel(save_tiny_lm(tmp_path / "tiny"), dtype="float32", fast=False)
        with torch.no_grad():
            model.model.get_output_embeddings().weight.mul_(float("nan"))
        with pytest.raises(ModelError, match="not numbers"):
            model.answer_logprobs([ask("a")], ("Yes", "No"))


class TestRounding:
    def test_answers_in_bfloat16_are_as_sharp_as_the_hidden_state(self, tmp_path):
        folder = save_base(tmp_path / "tiny", 3)
        rough = LocalLanguageModel(folder, dtype="bfloat16", fast=False)
        requests = [ask(p) for p in PASSAGES]
        scored = rough.answer_logprobs(requests, ("Yes", "No"))
        again = [rough.answer_logprobs([r], ("Yes", "No"))[0] for r in requests]
        tokens = answer_tokens(rough.tokenizer, ("Yes", "No"))
        exact = [
            by_hand(LocalLanguageModel(folder, dtype="float32", fast=False), r, tokens) for r in requests
        ]
        plain = [by_hand(rough, r, tokens) for r in requests]
        odds = lambda rows: np.array([v[0] - v[1] for v in rows])  # noqa: E731
        mine = odds([s.values for s in scored])
        assert np.abs(mine - odds(exact)).mean() <= np.abs(odds(plain) - odds(exact)).mean()
        np.testing.assert_allclose(mine, odds([s.values for s in again]), atol=0.1)
        assert np.abs(mine - odds(exact)).max() < 0.3


class TestAnswerTokens:
    def test_bytes_stand_for_words_by_their_first_letters(self):
        tokenizer = make_tokenizer()  # no word is one token
        yes, no = answer_tokens(tokenizer, ("Yes", "No"))
        assert {tokenizer.decode([t]) for t in yes} == {"Y", "y"} and {tokenizer.decode([t]) for t in no} == {
            "N",
            "n",
        }

    def test_answers_that_begin_alike_are_refused(self):
        with pytest.raises(ModelError, match="begin with the same token"):
            answer_tokens(make_tokenizer(), ("yes", "yellow"))


class TestTexts:
    def test_are_scored_as_the_whole_prompt_would_be(self, model):
        texts = ["because of yeast", "", "no", "東京", "a" * 40]
        scored = model.chat_logprobs([ask(p) for p in PASSAGES], texts)
        for passage, text, scores in zip(PASSAGES, texts, scored, strict=True):
            prompt = model.encode(ask(passage))
            whole = model.encode(ask(passage, prefill=text))
            with torch.inference_mode():
                logprobs = (
                    model.model(input_ids=torch.tensor([whole]))
                    .logits[0, :, : model.vocabulary]
                    .log_softmax(-1)
                )
            targets = torch.tensor(whole[len(prompt) :], dtype=torch.long)
            own = logprobs[len(prompt) - 1 : len(whole) - 1].gather(1, targets[:, None])[:, 0]
            np.testing.assert_allclose(scores.values, own.numpy(), atol=2e-4)
            assert scores.completion_tokens == len(whole) - len(prompt)

    def test_one_that_does_not_fit_is_an_error(self, model):
        (scores,) = model.chat_logprobs([ask("a")], ["b" * 600])
        assert "exceed the context" in scores.error


class TestServer:
    def reply(self, top):
        return {
            "choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}]
        }

    def test_spellings_of_an_answer_are_added_up(self):
        top = [
            {"token": t, "logprob": v}
            for t, v in (("Yes", -1.0), ("\u0120yes", -2.0), ("No", -1.5), ("Maybe", -4.0))
        ]
        scores = read_answers(self.reply(top), ("Yes", "No"))
        assert scores.values == pytest.approx((np.logaddexp(-1.0, -2.0), -1.5))

    def test_an_answer_that_is_not_there_is_at_most_as_likely_as_the_last(self):
        top = [{"token": "Yes", "logprob": -0.1}, {"token": "Hm", "logprob": -5.0}]
        assert read_answers(self.reply(top), ("Yes", "No")).values == (-0.1, -5.0)

    def test_none_of_them_is_no_label(self):
        assert NO_ANSWER in read_answers(self.reply([{"token": "Hm", "logprob": -0.1}]), ("Yes", "No")).error
        assert (
            read_answers({"choices": [{"message": {"content": "Yes"}}]}, ("Yes", "No")).error == NO_LOGPROBS
        )

    def test_a_server_is_asked_for_one_token(self):
        from models.lm.dummy_server import DummyOptions, DummyServer

        with DummyServer(DummyOptions(mode="judge", fail_rate=0.3, fail_kinds=("500",))) as server:
            model = ServerLanguageModel(server.url, "dummy", wait_initial=0.01)
            scored = model.answer_logprobs(
                [ask(p) for p in ("does bread rise", "no word of it")], ("Yes", "No")
            )
            assert scored[0].values[0] > scored[0].values[1] and scored[1].values[0] < scored[1].values[1]
            assert all(b["max_tokens"] == 1 and b["top_logprobs"] == 20 for b in server.bodies)
            assert model.offers_logprobs()
            model.close()
        with DummyServer(DummyOptions(mode="judge", logprobs=False)) as server:
            assert not ServerLanguageModel(server.url, "dummy").offers_logprobs()
