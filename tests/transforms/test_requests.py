"""Asking through the cache: by content, once, and nothing paid for is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from models.protocols import Candidate, Generation, GenerationRequest, Message, ModelInfo, Sampling
from transforms.requests import generate_cached, identity, request_key, score_cached, similarity_cached
from transforms.shards.cache import RequestCache

sys.path.insert(0, str(Path(__file__).parent / "detox"))
from detox_parts import BagEncoder, RuleRewriter, WordScorer

SAMPLING = Sampling(temperatures=(0.5, 1.0), per_temperature=2)


def request(text: str, seed: int = 1, **kwargs) -> GenerationRequest:
    return GenerationRequest((Message("user", f"Text: {text}"),), seed, **kwargs)


@pytest.fixture
def cache(tmp_path):
    return RequestCache(str(tmp_path / "cache"))


def test_scores_are_remembered_by_content_and_restored_to_order(cache):
    scorer = WordScorer()
    texts = ["You idiot.", "Fine.", "You idiot.", "damn"]
    first = score_cached(scorer, texts, cache)
    assert scorer.calls == [["You idiot.", "Fine.", "damn"]]
    again = score_cached(scorer, ["damn", "new", "Fine."], cache)
    assert scorer.calls[1:] == [["new"]]
    assert np.array_equal(first, WordScorer().score(texts))
    assert np.array_equal(again, WordScorer().score(["damn", "new", "Fine."]))
    assert score_cached(scorer, [], cache).shape == (0, 2)


def test_scores_of_different_models_do_not_mix(cache):
    score_cached(WordScorer({"damn": 1.0}, "a"), ["damn"], cache)
    assert score_cached(WordScorer({"damn": 0.25}, "b"), ["damn"], cache)[0, 0] == 0.25


def test_similarities_embed_each_text_once(cache):
    encoder = BagEncoder()
    pairs = [("a b", "a c"), ("a b", "a b"), ("x", "y"), ("a b", "a c")]
    cosines = similarity_cached(encoder, pairs, cache)
    assert cosines.tolist() == pytest.approx([0.5, 1.0, 0.0, 0.5])
    assert sorted(encoder.calls[0]) == ["a b", "a c", "x", "y"]
    assert similarity_cached(encoder, pairs[::-1], cache).tolist() == pytest.approx([0.5, 0.0, 1.0, 0.5])
    assert len(encoder.calls) == 1
    assert similarity_cached(encoder, pairs, None).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.5])


def test_equal_requests_are_asked_once_and_answers_come_back_in_order(cache):
    model = RuleRewriter()
    requests = [request("a"), request("b"), request("a"), request("a", seed=2)]
    generations, usage = generate_cached(model, requests, SAMPLING, cache)
    assert model.asked == ["a", "b", "a"]
    assert (usage.requests, usage.asked, usage.cache_hits, usage.errors) == (4, 3, 0, 0)
    assert usage.tokens_in > 0 and usage.tokens_out > 0
    assert generations[0] == generations[2] != generations[3]
    again, usage = generate_cached(model, requests[::-1], SAMPLING, cache)
    assert again[::-1] == generations
    assert (usage.asked, usage.cache_hits, usage.tokens_in, usage.tokens_out) == (0, 3, 0, 0)


def test_each_answer_is_stored_the_moment_it_is_done(cache):
    class Crashing(RuleRewriter):
        def generate(self, requests, sampling, on_done=None):
            super().generate(requests[:2], sampling, on_done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_cached(Crashing(), [request(t) for t in "abcd"], SAMPLING, cache)
    model = RuleRewriter()
    _, usage = generate_cached(model, [request(t) for t in "abcd"], SAMPLING, cache)
    assert model.asked == ["c", "d"] and usage.cache_hits == 2


def test_errors_are_not_stored(cache):
    generations, usage = generate_cached(
        RuleRewriter(fail="b"), [request("a"), request("b")], SAMPLING, cache
    )
    assert generations[0].error is None and generations[1].error == "the server said no"
    assert usage.errors == 1
    generations, _ = generate_cached(RuleRewriter(), [request("a"), request("b")], SAMPLING, cache)
    assert generations[1].error is None and generations[1].candidates


def test_a_backend_that_never_calls_back_is_cached_too(cache):
    class Silent(RuleRewriter):
        def generate(self, requests, sampling, on_done=None):
            return super().generate(requests, sampling)

    generate_cached(Silent(), [request("a")], SAMPLING, cache)
    assert generate_cached(Silent(), [request("a")], SAMPLING, cache)[1].cache_hits == 1


def test_progress_is_told_for_every_request():
    ticks = []
    generate_cached(RuleRewriter(), [request("a"), request("b")], SAMPLING, None, lambda: ticks.append(1))
    assert len(ticks) == 2


def test_the_key_holds_what_the_answer_depends_on():
    info = ModelInfo("m", "lm", "r")
    base = request_key(info, request("a"), SAMPLING)
    others = [
        request_key(ModelInfo("m", "lm", "r2"), request("a"), SAMPLING),
        request_key(ModelInfo("m", "lm", "r", extra={"adapter": "x@1"}), request("a"), SAMPLING),
        request_key(ModelInfo("m", "lm", "r", extra={"dtype": "bfloat16"}), request("a"), SAMPLING),
        request_key(info, request("b"), SAMPLING),
        request_key(info, request("a", seed=2), SAMPLING),
        request_key(info, request("a", prefill="<answer>"), SAMPLING),
        request_key(info, request("a", stop=("x",)), SAMPLING),
        request_key(info, request("a"), Sampling(temperatures=(0.5, 1.0), per_temperature=2, top_k=1)),
    ]
    assert len({base, *others}) == len(others) + 1
    same = ModelInfo("m", "lm", "r", source="elsewhere", extra={"device": "cuda", "threads": 4})
    assert request_key(same, request("a"), SAMPLING) == base


def test_a_model_is_known_by_its_weights_wherever_its_folder_lies():
    def info(name, revision="1", **extra):
        return ModelInfo(name, "lm", revision, extra=extra)

    moved = identity(info("hf:/a/model")), identity(info("hf:b/model"))
    assert moved[0] == moved[1] != identity(info("hf:/a/model", revision="2"))
    on_top = [
        info(f"smollm2+{folder}", adapter=folder, adapter_revision=revision)
        for folder, revision in (("/a/lora", "7"), ("/b/lora", "7"), ("/a/lora", "8"))
    ]
    assert identity(on_top[0]) == identity(on_top[1]) != identity(on_top[2])
    servers = info("openai:http://one/v1#m"), info("openai:http://two/v1#m")
    assert identity(servers[0]) != identity(servers[1])
    assert identity(info("hf:/a", label="hate")) != identity(info("hf:/a", label="rude"))
    assert identity(info("smollm2", dtype="float32")) != identity(info("smollm2", dtype="bfloat16"))


def test_half_an_emoji_from_a_server_does_no_harm(cache):
    class Broken(RuleRewriter):
        def generate(self, requests, sampling, on_done=None):
            done = Generation((Candidate("ok \ud83d end \ud83d\ude00", 1.0, 0, 1, 3, "stop"),), 3)
            if on_done:
                on_done(0, done)
            return [done]

    first, _ = generate_cached(Broken(), [request("a")], SAMPLING, cache)
    again, usage = generate_cached(Broken(), [request("a")], SAMPLING, cache)
    assert first[0].candidates[0].text == "ok \ufffd end 😀"
    assert again == first and usage.cache_hits == 1


def test_a_damaged_entry_is_asked_again(cache):
    model = RuleRewriter()
    cache.put_many({request_key(model.info, request("a"), SAMPLING): b"{not json"})
    generations, usage = generate_cached(model, [request("a")], SAMPLING, cache)
    assert generations[0].candidates and usage.asked == 1
