"""Systems that need no model to be run beforehand, and sentences broken on purpose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import registry
from transforms.evaluation.corruptions import WAYS, corrupt
from transforms.evaluation.systems import delete_words, drop_sentences, mask_words


@pytest.fixture(scope="module")
def lexicon():
    return registry.load("scorer", "lexicon")


@pytest.mark.parametrize(
    ("text", "deleted", "masked"),
    [
        ("You are an idiot .", "You are an .", "You are an *** ."),
        ("Idiot! Go home.", "! Go home.", "***! Go home."),
        ("what a stupid , stupid idea", "what a , idea", "what a *** , *** idea"),
        ("stupid idiot", "", "*** ***"),
        ("The bus  leaves.", "The bus  leaves.", "The bus  leaves."),
        ("", "", ""),
    ],
)
def test_listed_words_go_or_are_masked(lexicon, text, deleted, masked):
    assert delete_words([text], lexicon) == [deleted]
    assert mask_words([text], lexicon) == [masked]


class Shouting:
    """Finds toxic what is in capitals."""

    labels = ("toxicity",)

    def __init__(self):
        from models.protocols import ModelInfo

        self.info = ModelInfo("shouting", "scorer", "r1")

    def score(self, texts):
        return np.array([[0.4 if t.isupper() else 0.39] for t in texts], np.float32)


def test_sentences_scored_at_the_threshold_are_dropped():
    texts = ["The bus is late. GO AWAY! It left at noon.", "GO AWAY!", "Fine.", ""]
    assert drop_sentences(texts, Shouting()) == ["The bus is late. It left at noon.", "", "Fine.", ""]
    assert drop_sentences(texts, Shouting(), threshold=0.41) == texts


SENTENCES = st.lists(
    st.sampled_from(
        [
            "the",
            "bus",
            "a",
            "stop",
            "leaves",
            "not",
            "at",
            "noon",
            "from",
            "my",
            "old",
            "town",
            "and",
            "waits",
            "for",
            "you",
        ]
    ),
    min_size=4,
    max_size=14,
)


@given(SENTENCES, st.integers(0, 50))
def test_a_broken_sentence_is_another_and_the_same_every_time(words, seed):
    text = " ".join(words) + "."
    found = corrupt(text, seed, ["kettle", "red"])
    assert found == corrupt(text, seed, ["kettle", "red"])
    if found is not None:
        assert found[0].strip(" .") != text.strip(" .") and found[1] in WAYS and found[0].strip()


def test_every_way_of_breaking_is_met_and_short_texts_are_left():
    text = "My neighbour said that the bus to the old town leaves at noon and that we have to wait."
    assert {corrupt(text, seed)[1] for seed in range(200)} == set(WAYS)
    assert corrupt("Wait for me.", 0) is None
