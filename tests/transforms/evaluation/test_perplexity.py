"""Perplexity figures, and surprisals remembered by content."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.protocols import ModelInfo
from schemas.errors import ModelError
from transforms.evaluation.likelihood import surprisals_cached
from transforms.evaluation.perplexity import (
    DocumentLosses,
    cut_documents,
    perplexity_change,
    perplexity_figures,
)
from transforms.shards.cache import RequestCache


class CountingModel:
    """A model whose tokens are characters, each as surprising as its code."""

    context_limit = 100

    def __init__(self, name: str = "counting", broken: str = "") -> None:
        self.info = ModelInfo(name, "lm", "r1")
        self.asked: list[str] = []
        self.broken = broken

    def score_tokens(self, texts):
        self.asked += texts
        out = []
        for text in texts:
            scores = -np.array([ord(c) for c in text], np.float32) / 100
            out.append(
                ([(i, i + 1) for i in range(len(text))], scores * (np.nan if text == self.broken else 1))
            )
        return out


def test_each_text_is_scored_once_over_all_runs(tmp_path):
    model, cache, told = CountingModel(), RequestCache(str(tmp_path)), []
    found = surprisals_cached(model, ["ab", "", "ab", "c"], cache, told.append)
    assert [x.tolist() for x in found] == [
        pytest.approx([0.97, 0.98]),
        [],
        pytest.approx([0.97, 0.98]),
        pytest.approx([0.99]),
    ]
    assert sorted(model.asked) == ["", "ab", "c"] and sum(told) == 4
    again = surprisals_cached(model, ["c", "d", ""], RequestCache(str(tmp_path)), None)
    assert len(model.asked) == 4 and model.asked[-1] == "d"
    assert again[0].tolist() == found[3].tolist()
    other = CountingModel("other")
    surprisals_cached(other, ["c"], cache)
    assert other.asked == ["c"]  # another model's answers are its own


def test_a_score_that_is_no_number_is_an_error_and_is_not_kept(tmp_path):
    cache = RequestCache(str(tmp_path))
    with pytest.raises(ModelError, match="not a number"):
        surprisals_cached(CountingModel(broken="b"), ["b"], cache)
    assert len(cache) == 0


def test_what_was_scored_before_a_kill_is_not_scored_again(tmp_path):
    texts = [f"text number {i}" for i in range(200)]
    whole = CountingModel()
    expected = surprisals_cached(whole, texts, None)

    class Killed(CountingModel):
        def score_tokens(self, texts):
            if len(self.asked) > 60:
                raise KeyboardInterrupt
            return super().score_tokens(texts)

    first = Killed()
    with pytest.raises(KeyboardInterrupt):
        surprisals_cached(first, texts, RequestCache(str(tmp_path)))
    second = CountingModel()
    again = surprisals_cached(second, texts, RequestCache(str(tmp_path)))
    assert first.asked and not set(first.asked) & set(second.asked)
    assert sorted(first.asked + second.asked) == sorted(whole.asked)
    assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True))


def test_figures_by_token_and_by_byte():
    losses = DocumentLosses(np.array([6.0, 2.0]), np.array([3.0, 1.0]))
    figures = perplexity_figures(losses, np.array([10.0, 6.0]))
    assert figures.perplexity.mean == pytest.approx(math.exp(2))
    assert figures.bits_per_byte.mean == pytest.approx(8 / 16 / math.log(2))
    assert figures.perplexity.low <= figures.perplexity.mean <= figures.perplexity.high


def test_a_model_against_itself_and_against_a_worse_one():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 80).astype(float)
    good = DocumentLosses(tokens * 3.0 + rng.normal(0, 1, 80), tokens)
    bad = DocumentLosses(good.nats + 0.05 * tokens + rng.normal(0, 0.1, 80), tokens)
    same = perplexity_change(good, good, tokens * 4)
    assert same.perplexity_ratio.mean == same.perplexity_ratio.high == 0 and same.p_value == 1
    worse = perplexity_change(bad, good, tokens * 4)
    assert worse.by_token and worse.perplexity_ratio.low > 0.03 and worse.p_value < 0.01
    assert worse.perplexity_ratio.mean == pytest.approx(math.exp(0.05) - 1, abs=0.01)
    back = perplexity_change(good, bad, tokens * 4)
    assert back.bits_per_byte.mean == pytest.approx(-worse.bits_per_byte.mean)


def test_models_of_different_tokenizers_are_compared_by_byte():
    a = DocumentLosses(np.array([4.0, 8.0]), np.array([2.0, 4.0]))
    b = DocumentLosses(np.array([4.0, 8.0]), np.array([1.0, 2.0]))
    change = perplexity_change(a, b, np.array([5.0, 9.0]))
    assert not change.by_token and change.perplexity_ratio.mean == 0


def test_documents_are_cut_at_white_space():
    assert cut_documents(["one two three", "one two", "onetwothree"], 7) == ["one two", "one two", "onetwot"]
    assert cut_documents(["one two three"], 6) == ["one"]
    assert cut_documents(["one two"], 0) == ["one two"]
