import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lm.chat import encode_plain
from models.lm.local import LocalLanguageModel
from models.metrics.continuations import any_toxic, distinct, perplexities, worst
from models.protocols import GenerationRequest, Sampling
from tests.models.tiny_lm import make_tokenizer, save_tiny_lm

SAMPLING = Sampling((1.0,), 25, top_p=0.9, top_k=0, repetition_penalty=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LocalLanguageModel(save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny"), dtype="float32")


class TestPlainText:
    def test_has_no_template_and_no_turn(self, model):
        request = GenerationRequest((), 1, prefill="The sea is ")
        assert model.encode(request) == list(model.tokenizer.encode("The sea is ", add_special_tokens=False))

    def test_the_text_of_a_special_token_is_ordinary_characters(self):
        tokenizer = make_tokenizer()
        ids = encode_plain(tokenizer, "a<|im_end|>b")
        assert tokenizer.eos_token_id not in ids and len(ids) == len("a<|im_end|>b")
        assert len(encode_plain(tokenizer, "half \ud83d")) > 5

    def test_begins_as_the_tokenizer_begins_texts(self):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        from tokenizers.processors import TemplateProcessing

        assert encode_plain(tokenizer, "ab") == tokenizer.encode("ab", add_special_tokens=False)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        assert encode_plain(tokenizer, "ab") == tokenizer.encode("ab")
        assert encode_plain(tokenizer, "")[0] == tokenizer.bos_token_id

    def test_a_prompt_without_tokens_is_an_error_of_its_request(self, model):
        empty, fine = model.generate(
            [GenerationRequest((), 1), GenerationRequest((), 1, prefill="so")], SAMPLING
        )
        assert empty.error and not empty.candidates and fine.error is None

    def test_what_one_prompt_gives_depends_on_no_other(self, model):
        requests = [GenerationRequest((), i, prefill=f"{'so ' * i}it was") for i in range(1, 6)]
        together = model.generate(requests, SAMPLING)
        assert [model.generate([r], SAMPLING)[0] for r in requests] == together


class TestScoringContinuations:
    def test_agrees_with_scoring_whole_texts(self, model):
        prompt = "The old man next door is"
        texts = [" kind", " a liar and a fool", "", "!", " kind", " été 東京"]
        scored = model.score_continuations(prompt, texts)
        for text, scores in zip(texts, scored, strict=True):
            offsets, whole = model.score_tokens([prompt + text])[0]
            own = [w for (_, end), w in zip(offsets, whole, strict=True) if end > len(prompt)] if text else []
            assert scores.dtype == np.float32
            np.testing.assert_allclose(scores, own, atol=2e-4)

    @pytest.mark.parametrize("texts", [["x"], ["x", "x"], ["ab", "abc", "b"], [""]])
    def test_without_a_prompt_and_of_any_number(self, model, texts):
        for text, scores in zip(texts, model.score_continuations("", texts), strict=True):
            assert len(scores) == len(text)

    def test_of_what_exceeds_the_context_the_end_is_scored(self, model):
        long = "y" * (model.context_limit + 50)
        (scores,) = model.score_continuations(long, [" tail"])
        assert len(scores) == 5 and np.isfinite(scores).all()
        (scores,) = model.score_continuations("", [long])
        assert len(scores) == model.context_limit - 1

    def test_the_text_of_a_special_token_is_ordinary_characters(self, model):
        text = "a<|im_end|>b"
        ((offsets, scores),) = model.score_tokens([text])
        assert offsets == [(i, i + 1) for i in range(len(text))]
        (own,) = model.score_continuations("a", [text[1:]])
        np.testing.assert_allclose(own, scores[1:], atol=2e-4)

    def test_half_an_emoji_is_scored_as_it_is_read_in_a_prompt(self, model):
        ((_, scores), (_, told)) = model.score_tokens(["half \ud83d", "half \ufffd"])
        np.testing.assert_array_equal(scores, told)

    def test_many_are_scored_in_pieces(self, model, monkeypatch):
        from models.lm import teacher

        texts = [f" {'so ' * (i % 7)}it goes" for i in range(30)]
        whole = model.score_continuations("Well,", texts)
        monkeypatch.setattr(teacher, "_TOKENS_AT_ONCE", 40)
        for a, b in zip(whole, model.score_continuations("Well,", texts), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


class TestFigures:
    def test_a_score_at_the_threshold_is_not_toxic(self):
        scores = np.array([[0.5, 0.1], [0.5000001, 0.0], [0.0, 0.0]])
        assert any_toxic(scores).tolist() == [False, True, False]
        assert worst(scores).tolist() == [0.5, 0.5000001, 0.0]

    def test_distinct_ngrams_per_word_by_hand(self):
        # 8 words; distinct pairs: ab bc cd ba; distinct triples: abc bcd aba.
        assert distinct(["a b c d", "a b a", "c"]) == (4 / 8, 4 / 8, 3 / 8)
        assert distinct(["", "  "]) == (0.0, 0.0, 0.0) and distinct([]) == (0.0, 0.0, 0.0)

    @given(st.lists(st.text("ab ", max_size=12), max_size=5))
    def test_distinct_is_a_share(self, texts):
        assert all(0 <= x <= 1 for x in distinct(texts))
        assert distinct(texts + texts)[0] <= distinct(texts)[0]

    def test_a_perplexity_is_of_the_mean_loss_and_none_where_nothing_was_said(self):
        out = perplexities([2.0, 0.0, 4000.0], [2, 0, 1])
        assert out[0] == pytest.approx(np.e) and np.isnan(out[1]) and np.isinf(out[2])


def test_scores_that_are_no_numbers_are_said_to_be(tmp_path):
    from schemas.errors import ModelError

    broken = LocalLanguageModel(save_tiny_lm(tmp_path / "lm"))
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        broken.score_continuations("a", ["b"])
