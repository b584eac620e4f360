"""`linear`: the cheap first stage, a linear model over words with calibrated probabilities.

It computes what alt-profanity-check's `predict_prob` computes (TF-IDF, L2-normalised; five linear SVMs, each
with Platt's sigmoid; the mean of the five), from arrays, with numpy alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.batching import FloatArray, slices
from models.protocols import ModelInfo

_WORD = re.compile(r"(?u)\b\w\w+\b")
_BATCH_CHARACTERS = 4_000_000  # bounds memory: about 100 bytes of index arrays a word


class LinearScorer:
    """Scores texts by their words; one label, `toxicity`.

    Args:
        folder: The converted model (`models.store.path("linear")`).
        info: What manifests record of it.
    """

    labels = ("toxicity",)

    def __init__(self, folder: Path, info: ModelInfo) -> None:
        from safetensors.numpy import load_file

        self.info = info
        words = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        self._index = {word: i for i, word in enumerate(words)}
        arrays = load_file(folder / "linear.safetensors")
        self._idf = arrays["idf"]
        self._coef, self._intercept = arrays["coef"], arrays["intercept"]
        self._slope, self._offset = arrays["slope"], arrays["offset"]

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score texts of any length: float32 of shape (n, 1); an empty or blank text scores 0.

        A text whose words are all unknown scores what the model gives without evidence (0.036), as in the
        package.
        """
        out = np.zeros((len(texts), 1), np.float32)
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            out[part, 0] = self._probabilities(texts[part])
        return out

    def _probabilities(self, texts: Sequence[str]) -> FloatArray:
        lookup, find = self._index.get, _WORD.findall
        ids: list[int] = []
        counts = np.empty(len(texts), np.int64)
        empty = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            empty[row] = not text.strip()
            before = len(ids)
            ids.extend([i for i in map(lookup, find(text.lower())) if i is not None])
            counts[row] = len(ids) - before
        rows = np.repeat(np.arange(len(texts)), counts)
        # One entry per (text, word), with the word's count in the text.
        size = len(self._idf)
        keys, frequency = np.unique(rows * size + np.asarray(ids, np.int64), return_counts=True)
        rows, columns = keys // size, keys % size
        weight = frequency * self._idf[columns]
        norm = np.sqrt(np.bincount(rows, weight * weight, minlength=len(texts)))
        norm[norm == 0] = 1.0
        total = np.zeros(len(texts))
        for coef, intercept, slope, offset in zip(
            self._coef, self._intercept, self._slope, self._offset, strict=True
        ):
            margin = np.bincount(rows, weight * coef[columns], minlength=len(texts)) / norm + intercept
            total += 1.0 / (1.0 + np.exp(slope * margin + offset))
        return np.where(empty, 0.0, total / len(self._coef)).astype(np.float32)
