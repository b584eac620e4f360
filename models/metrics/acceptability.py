"""Is it a sentence? Acceptability from a language model's surprisal, calibrated on whole and broken sentences.

A language model's probability alone does not say whether a sentence is acceptable: rare words and few words weigh in
(J. H. Lau, A. Clark, S. Lappin, "Grammaticality, Acceptability, and Probability", Cognitive Science 41, 2017). So a
logistic regression learns from whole sentences and from the same sentences broken on purpose which shapes of surprisal
mean that something is wrong: its mean, its peaks, how it ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import ModelError

Array = npt.NDArray[np.float64]

FEATURES = (
    "mean", "peak", "peaks2", "peaks3", "median", "spread", "end", "last", "length", "rare", "jumps",
)  # fmt: skip
# So that whole sentences are seldom refused: the share of them that has to pass.
PASS = 0.9
_RARE = 8.0  # nats
_PENALTY = 1.0


def surprisal_features(surprisals: Sequence[npt.NDArray[Any]]) -> Array:
    """Shapes of surprisal of n sentences.

    Args:
        surprisals: For each the surprisal of its tokens (nats), its end (a line break) the last of them.

    Returns:
        float64 of shape (n, 2 * len(FEATURES)): each feature and its square.
    """
    out = np.zeros((len(surprisals), len(FEATURES)))
    for i, nats in enumerate(surprisals):
        if len(nats) < 2:
            continue
        body, end = np.asarray(nats[:-1], np.float64), float(nats[-1])
        inner = body[1:] if len(body) > 1 else body  # the first token is predicted from nothing
        high = np.sort(inner)[::-1]
        out[i] = (
            inner.mean(),
            high[0],
            high[:2].mean(),
            high[:3].mean(),
            np.median(inner),
            inner.std(),
            end,
            body[-1],
            np.log(len(body)),
            (inner > _RARE).mean(),
            np.abs(np.diff(body)).mean() if len(body) > 1 else 0.0,
        )
    return np.concatenate([out, out**2], axis=1)


@dataclass(frozen=True)
class Acceptability:
    """A fitted logistic regression over some features.

    Attributes:
        mean: Of each feature over the sentences it was fitted on.
        scale: Their standard deviation.
        weights: Of the standardised features.
        bias: Added.
        threshold: Score from which a sentence counts as acceptable.
        quality: What was measured of it on sentences it was not fitted on.
        of: What it was fitted on: language model, its revision, the sentences.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    threshold: float
    quality: dict[str, Any] = field(default_factory=dict)
    of: dict[str, Any] = field(default_factory=dict)

    def score(self, features: Array) -> Array:
        """Probability that each of n sentences is whole.

        Args:
            features: (n, k), as it was fitted.
        """
        x = (features - np.array(self.mean)) / np.array(self.scale)
        return _sigmoid(np.clip(x, -6, 6) @ np.array(self.weights) + self.bias)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Acceptability:
        """Read what `save` wrote.

        Raises:
            ModelError: The file is not one.
        """
        try:
            record: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
            lists = {k: tuple(map(float, record[k])) for k in ("mean", "scale", "weights")}
            return cls(
                **lists,
                bias=float(record["bias"]),
                threshold=float(record["threshold"]),
                quality=dict(record["quality"]),
                of=dict(record["of"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is no fitted acceptability model ({error}); fit it again") from error


def fit_acceptability(
    whole: Array,
    broken: Array,
    *,
    held_whole: Array | None = None,
    held_broken: Array | None = None,
    penalty: float = _PENALTY,
    of: Mapping[str, Any] | None = None,
) -> Acceptability:
    """Fit by Newton's method with an L2 penalty; both classes weigh the same.

    Args:
        whole: (n, k) features of whole sentences.
        broken: (m, k) features of broken ones.
        held_whole: Features of whole sentences not fitted on, for the threshold and the quality; None takes `whole`.
        held_broken: Likewise.
        penalty: Of the squared weights.
        of: What it is fitted on, for the record.

    Raises:
        ModelError: Too few sentences.
    """
    if min(len(whole), len(broken)) < 20:
        raise ModelError(
            f"{len(whole)} whole and {len(broken)} broken sentences are too few to calibrate fluency on; give 100 or more"
        )
    x = np.concatenate([whole, broken])
    y = np.concatenate([np.ones(len(whole)), np.zeros(len(broken))])
    balance = np.where(y == 1, 0.5 / len(whole), 0.5 / len(broken)) * len(y)
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-9)
    design = np.concatenate([np.clip((x - mean) / scale, -6, 6), np.ones((len(x), 1))], axis=1)
    ridge = np.full(design.shape[1], penalty)
    ridge[-1] = 0.0
    weights = np.zeros(design.shape[1])
    for _ in range(50):
        p = _sigmoid(design @ weights)
        gradient = design.T @ (balance * (p - y)) + ridge * weights
        curvature = (design * (balance * p * (1 - p))[:, None]).T @ design + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    fitted = Acceptability(
        tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights[:-1].tolist()), float(weights[-1]), 0.5
    )
    good = fitted.score(whole if held_whole is None else held_whole)
    bad = fitted.score(broken if held_broken is None else held_broken)
    threshold = float(np.quantile(good, 1 - PASS))
    quality = {
        "auc": round(auc(good, bad), 4),
        "whole_passed": round(float((good >= threshold).mean()), 4),
        "broken_refused": round(float((bad < threshold).mean()), 4),
        "whole": len(good),
        "broken": len(bad),
    }
    return Acceptability(
        fitted.mean, fitted.scale, fitted.weights, fitted.bias, threshold, quality, dict(of or {})
    )


def auc(positives: npt.ArrayLike, negatives: npt.ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half."""
    good, bad = np.sort(np.asarray(positives, np.float64)), np.asarray(negatives, np.float64)
    above = len(good) - np.searchsorted(good, bad, side="right")
    equal = np.searchsorted(good, bad, side="right") - np.searchsorted(good, bad, side="left")
    return float((above + 0.5 * equal).sum() / (len(good) * len(bad)))


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -40, 40))))
