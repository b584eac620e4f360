"""Spans by SoCD: forces of tokens become scores of words, and neighbours become spans."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.protocols import ModelInfo
from transforms.detox.localize import LexiconLocalizer, find_spans
from transforms.detox.socd_spans import SoCDLocalizer, word_forces
from transforms.shards.cache import RequestCache

FORCES = {"stup": 0.5, "id": 0.25, "idiot": 1.0, "dumb": 0.3, "nice": -2.0, "rule": 0.01}


@dataclass
class Read:
    offsets: list[tuple[int, int]]
    force: np.ndarray


class PieceModel:
    """Tokens are a word's first four letters, its rest, and every other character with the space before it."""

    def __init__(self, revision="1"):
        self.info = ModelInfo("pieces", "lm", revision)
        self.asked: list[str] = []

    def contrast(self, texts):
        self.asked += texts
        found = []
        for text in texts:
            tokens = [m.span() for m in re.finditer(r"\s?(?:idiot|dumb|nice|rule|stup|[^\W\d_]+|.)|\s", text)]
            forces = [FORCES.get(text[a:b].strip(), 0.0) for a, b in tokens]
            found.append(Read(tokens, np.array(forces, np.float32)))
        return found


def spans(text, threshold=0.1, model=None):
    (found,) = SoCDLocalizer(model or PieceModel(), threshold).find([text])
    return [(text[s.start : s.end], round(s.score, 4), s.source) for s in found]


def share(force):
    return round(1 - math.exp(-force), 4)


def test_a_words_tokens_add_up():
    assert spans("Such a stupid rule.") == [("stupid", share(0.75), "socd")]


def test_neighbours_are_one_span_and_spaces_are_no_part_of_it():
    assert spans("You stupid idiot, you!") == [("stupid idiot", share(1.75), "socd")]
    assert spans("So dumb. An idiot?") == [("dumb", share(0.3), "socd"), ("idiot", share(1.0), "socd")]


def test_what_the_base_model_prefers_takes_nothing_away():
    assert spans("A nice idiot") == [("idiot", share(1.0), "socd")]
    assert spans("nice") == []


def test_the_threshold_is_a_share_of_the_odds():
    assert spans("A dumb rule", 0.0) == [("dumb rule", share(0.31), "socd")]
    assert spans("A dumb rule", 0.25) == [("dumb", share(0.3), "socd")]
    assert spans("A dumb rule", 0.3) == []


def test_a_text_without_words():
    assert spans("") == []
    assert spans("?! ...") == []


def test_equal_texts_are_read_once_and_never_again(tmp_path):
    cache = RequestCache(str(tmp_path))
    model = PieceModel()
    texts = ["a dumb one", "an idiot", "a dumb one"]
    first = SoCDLocalizer(model, 0.1, cache).find(texts)
    assert model.asked == texts[:2]
    again = PieceModel()
    assert SoCDLocalizer(again, 0.1, cache).find(texts) == first
    assert SoCDLocalizer(again, 0.5, cache).find(texts) != first
    assert again.asked == []
    other = PieceModel(revision="2")
    SoCDLocalizer(other, 0.1, cache).find(texts)
    assert other.asked == texts[:2]


def test_spans_unite_with_other_localisers():
    class Words:
        def find_all(self, texts):
            return [[m.span() for m in re.finditer("stupid", text)] for text in texts]

    (found,) = find_spans(["a stupid idiot"], [LexiconLocalizer(Words()), SoCDLocalizer(PieceModel())])
    assert [(s.start, s.end, s.source) for s in found] == [(2, 14, "lexicon+socd")]


@given(
    st.text(alphabet="ab .,-'é\U0001f642", max_size=40), st.lists(st.integers(1, 5), min_size=1), st.data()
)
def test_forces_are_kept_whatever_the_tokens(text, lengths, data):
    """Tokens that tile the text in any way: each positive force counts once at most, spans lie in the text."""
    offsets, position = [], 0
    while position < len(text):
        end = min(len(text), position + lengths[len(offsets) % len(lengths)])
        offsets.append((position, end))
        position = end
    forces = [data.draw(st.floats(-3, 3, width=32)) for _ in offsets]

    class Tiled:
        info = ModelInfo("tiled", "lm", "1")

        def contrast(self, texts):
            return [Read(offsets, np.array(forces, np.float32)) for _ in texts]

    ((words, found),) = word_forces(Tiled(), [text])
    touching = [
        max(f, 0)
        for (a, b), f in zip(offsets, forces, strict=True)
        if any(start < b and a < end for start, end in words)
    ]
    assert found.sum() == pytest.approx(sum(touching), rel=1e-5, abs=1e-5)
    (marked,) = SoCDLocalizer(Tiled(), 0.0).find([text])
    assert all(0 <= s.start < s.end <= len(text) and 0 < s.score < 1 for s in marked)
    assert all(a.end < b.start for a, b in itertools.pairwise(marked))
