"""What every scorer promises of its numbers: probabilities, never NaN, the same in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from models.protocols import FloatArray
from schemas.errors import ModelError


def sigmoid(logits: npt.NDArray[Any]) -> FloatArray:
    """Logistic function, elementwise, float32.

    Not torch's: that one takes another routine for the last elements of an array, so that a text's score
    would depend, in its last bit, on how many texts stand behind it.
    """
    with np.errstate(over="ignore"):  # exp(-x) -> inf gives the right limit, 0
        return (1.0 / (1.0 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def softmax(logits: npt.NDArray[Any]) -> FloatArray:
    """Softmax over the last axis of (n, classes) logits, float32."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def refuse_nan(scores: FloatArray, name: str) -> FloatArray:
    """Return the scores, unless one is NaN or infinite: a threshold would let it pass silently.

    Args:
        scores: (n, labels).
        name: The scorer's name, for the message.

    Raises:
        ModelError: Names the first such text by its index.
    """
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ModelError(
            f"{name}: the score of text {first} (of {len(scores)}) is not a number; its weights are unsound "
            "or overflow, try dtype=float32"
        )
    return scores
