"""An encoder that needs no model: letters counted into a vector, with every trouble a real one can make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.encoders import Embedded
from models.protocols import ModelInfo

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LetterEncoder:
    """Counts letters. `~` gives a vector that is not finite, `#` alone a null one; the limit is 40 characters."""

    info = ModelInfo(name="letters", kind="encoder", revision="1")
    variant = ""
    dimension = 26
    limit = 40
    normalizes = True

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt="",
        kind="document",
        long="mean",
        normalize=None,
        dimensions=None,
    ) -> Embedded:
        self.calls.append(list(texts))
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            used = prompt + (text if long == "mean" else text[: self.limit])
            for letter in used.lower():
                if letter in LETTERS:
                    row[LETTERS.index(letter)] += 1
            if "~" in text:
                row[:] = np.nan
        norms = np.linalg.norm(rows, axis=1)
        if normalize is not False:
            rows = rows / np.where(norms > 0, norms, 1)[:, None]
        sizes = np.array([len(t) for t in texts], np.int64)
        over = sizes > self.limit
        return Embedded(
            rows[:, :dimensions],
            sizes,
            np.where(over & (long == "mean"), -(-sizes // self.limit), 1),
            over & (long == "truncate"),
            norms.astype(np.float32),
        )
