"""The fluency scorer: whole sentences above broken ones, nothing readable at 0, the same after saving."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.scorers.fluency import FluencyScorer, fit_fluency, load_fluency_scorer
from schemas.errors import ModelError

WHO = ["my neighbour", "the old man", "a friend of mine", "his sister", "the driver"]
DOES = ["waits for", "has seen", "does not like", "forgot about", "is looking at"]
WHAT = ["the bus", "a red boat", "the new garden", "our kettle", "his two dogs"]


def sentences(n: int, seed: int) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    whole, broken = [], []
    for _ in range(n):
        text = f"{rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(WHAT)} ."
        words = text.split()
        rng.shuffle(words)
        whole.append(text)
        broken.append(" ".join(words))
    return whole, broken


@pytest.fixture(scope="module")
def fitted() -> FluencyScorer:
    whole, broken = sentences(200, 0)
    held = sentences(100, 1)
    return fit_fluency(whole, broken, held_whole=held[0], held_broken=held[1], training_data="made-up")


def test_it_learns_which_classes_follow_each_other(fitted, tmp_path):
    assert fitted.weights.quality["auc"] > 0.97 and fitted.weights.quality["whole_passed"] >= 0.85
    texts = ["the driver waits for a red boat .", "boat red a for waits driver the ."]
    scores = fitted.score(texts)[:, 0]
    assert scores[0] > fitted.weights.threshold > scores[1]
    fitted.save(tmp_path / "f.safetensors")
    again = load_fluency_scorer(tmp_path / "f.safetensors")
    assert np.array_equal(again.score(texts)[:, 0], scores) and again.info.revision == fitted.info.revision
    assert again.info.training_data == "made-up"


def test_few_sentences_and_no_model(tmp_path):
    with pytest.raises(ModelError, match="too few"):
        fit_fluency(["a"], ["b"], held_whole=["a"], held_broken=["b"])
    with pytest.raises(ModelError, match="no fluency model"):
        load_fluency_scorer(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("whole", "broken"),
    [
        ("i do not like the new rules at all .", "i do not like the *** at all ."),
        ("he said that we have to wait for the bus .", "he said that we have to wait for the ."),
        (
            "you should think about what you do .",
            "you should think about what you should think about what you do .",
        ),
        ("they are not very good at their work .", "they are not very good at their work and the"),
    ],
)
def test_the_shipped_model_sees_gross_damage(whole, broken):
    scorer = load_fluency_scorer()
    a, b = scorer.score([whole, broken])[:, 0]
    assert a > b and a >= scorer.weights.threshold


@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_text_has_a_score_that_does_not_depend_on_its_company(texts):
    scorer = load_fluency_scorer()
    scores = scorer.score(texts)
    assert scores.shape == (len(texts), 1) and ((scores >= 0) & (scores <= 1)).all()
    for text, score in zip(texts, scores[:, 0], strict=True):
        assert scorer.score([text])[0, 0] == score
        if not any(c.isalnum() for c in text):
            assert score == 0
