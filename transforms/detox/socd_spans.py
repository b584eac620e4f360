"""Localise by SoCD: toxic words stand where a toxic language model and a base model disagree on them.

Both models read the text under teacher forcing. Steering would lower the log-probability of a token that stands there
by alpha * log(q / p) (`models.decoding`; HSPD, arXiv 2604.19124, localises in this way without ever saying where). A
word's force is the sum over its tokens, of what is positive; its score, 1 - exp(-force), is the share of its odds
that steering takes away, in [0, 1). Words whose score reaches a threshold are spans; neighbours are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from models.protocols import ModelInfo
from schemas.fingerprint import digest
from transforms.detox.localize import Span, is_gap, word_offsets
from transforms.requests import identity
from transforms.shards.cache import RequestCache

FloatArray = npt.NDArray[np.float32]


class TokenContrast(Protocol):
    """What two models say of a text's tokens (`models.decoding.contrast.Contrast`)."""

    @property
    def offsets(self) -> Sequence[tuple[int, int]]:
        """(start, end) of each token, in characters."""
        ...

    @property
    def force(self) -> FloatArray:
        """Of each token alpha * log(q / p), in nats: positive where the toxic model prefers it."""
        ...


class ContrastingModel(Protocol):
    """Two language models that read a text together (`models.decoding.model.SoCDModel`)."""

    @property
    def info(self) -> ModelInfo:
        """Its revision covers both models and how they are compared."""
        ...

    def contrast(self, texts: Sequence[str]) -> Sequence[TokenContrast]:
        """One contrast a text."""
        ...


@dataclass(frozen=True)
class SoCDLocalizer:
    """Spans are the words that contrastive decoding would steer away from.

    Attributes:
        model: The two models.
        threshold: Least score of a word, in [0, 1).
        cache: Where forces are remembered; a changed threshold then costs nothing.
    """

    model: ContrastingModel
    threshold: float = 0.1
    cache: RequestCache | None = None
    source: str = "socd"

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """For each text its steered words, neighbours merged."""
        return [
            join_words(text, words, forces, self.threshold, self.source)
            for text, (words, forces) in zip(texts, word_forces(self.model, texts, self.cache), strict=True)
        ]


def word_forces(
    model: ContrastingModel, texts: Sequence[str], cache: RequestCache | None = None
) -> list[tuple[list[tuple[int, int]], FloatArray]]:
    """How strongly each word would be steered away from.

    Args:
        model: The two models; each distinct text is read once.
        texts: Any number.
        cache: Answers already paid for.

    Returns:
        For each text its words, (start, end) in characters, and their forces, float32 in nats, 0 or more.
    """
    words = {text: word_offsets(text) for text in texts}
    known: dict[str, FloatArray] = {}
    keys: dict[str, bytes] = {}
    if cache is not None:
        keys = {text: digest("contrast", identity(model.info), text) for text in words}
        for text, answer in zip(words, cache.get_many(list(keys.values())), strict=True):
            if answer is not None and len(answer) == 4 * len(words[text]):
                known[text] = np.frombuffer(answer, "<f4")
    missing = [text for text in words if text not in known]
    for text, contrast in zip(missing, model.contrast(missing) if missing else [], strict=True):
        known[text] = _by_word(words[text], contrast)
        if cache is not None:
            cache.put_many({keys[text]: known[text].astype("<f4").tobytes()})
    return [(words[text], known[text]) for text in texts]


def join_words(
    text: str, words: Sequence[tuple[int, int]], forces: FloatArray, threshold: float, source: str
) -> list[Span]:
    """Spans of the words whose score reaches a threshold; neighbours are one, and their forces add up.

    Args:
        text: Where they stand.
        words: (start, end), ascending and disjoint.
        forces: In nats, one a word.
        threshold: In [0, 1).
        source: What to call the localiser.
    """
    found: list[tuple[int, int, float]] = []
    for (start, end), force in zip(words, forces.tolist(), strict=True):
        if force <= 0 or _score(force) < threshold:
            continue
        if found and is_gap(text, found[-1][1], start):
            first, _, before = found.pop()
            start, force = first, before + force
        found.append((start, end, force))
    return [Span(start, end, _score(force), source) for start, end, force in found]


def _by_word(words: Sequence[tuple[int, int]], contrast: TokenContrast) -> FloatArray:
    """Each word's sum of its tokens' forces; a token between two words counts for the one it reaches into further."""
    forces = np.zeros(len(words), np.float32)
    number = 0
    for (start, end), force in zip(contrast.offsets, np.maximum(contrast.force, 0).tolist(), strict=True):
        while number < len(words) and words[number][1] <= start:
            number += 1
        best, most = None, 0
        for i in range(number, len(words)):
            if words[i][0] >= end:
                break
            shared = min(end, words[i][1]) - max(start, words[i][0])
            if shared > most:
                best, most = i, shared
        if best is not None:
            forces[best] += force
    return forces


def _score(force: float) -> float:
    return float(-np.expm1(-force))
