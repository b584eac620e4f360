"""Calibration of a classifier's logits, folded into its last layer; and the figures of a classifier.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599): logits are divided by one number, chosen to minimise the loss on
held-out texts. Where classes were weighted the base rate is off as well, which an offset per label undoes (Platt 1999).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BINS = 15
_TEMPERATURES = (0.05, 20.0)
_PRIOR = 1.0  # labels' worth of belief that nothing need change: decides where there is little to fit on
_DRAWS = 500


@dataclass(frozen=True)
class Calibration:
    """New logits are `logits / temperature + shift`.

    Attributes:
        temperature: One for all labels.
        shift: One a label.
        examples: What it was fitted on.
    """

    temperature: float
    shift: tuple[float, ...]
    examples: int

    def apply(self, logits: npt.ArrayLike) -> Array:
        """Calibrated logits of (n, labels) logits."""
        return np.asarray(logits, np.float64) / self.temperature + np.asarray(self.shift)


def fit_calibration(
    logits: npt.ArrayLike, targets: npt.ArrayLike, *, method: str = "temperature"
) -> Calibration:
    """Fit to held-out logits.

    Args:
        logits: (n, labels).
        targets: (n, labels) probabilities, NaN where unknown.
        method: `temperature`, `shift` (temperature and offsets) or `none`.

    Returns:
        The calibration; it changes nothing where there is nothing to fit on.
    """
    from scipy.optimize import minimize

    scores, wanted = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    labels = scores.shape[1]
    known = ~np.isnan(wanted)
    if method == "none" or not known.any():
        return Calibration(1.0, (0.0,) * labels, 0)
    filled = np.where(known, wanted, 0.0)
    count = known.sum()

    def loss(parameters: Array) -> tuple[float, Array]:
        scale = np.exp(-parameters[0])
        new = scores * scale + parameters[1:]
        each = np.where(known, np.logaddexp(0.0, new) - filled * new, 0.0)
        slope = np.where(known, _sigmoid(new) - filled, 0.0)
        gradient = np.concatenate([[-(slope * scores * scale).sum()], slope.sum(axis=0)]) / count
        if method == "temperature":
            gradient[1:] = 0.0
        pull = _PRIOR / count
        return float(each.sum() / count + pull * (parameters**2).sum()), gradient + 2 * pull * parameters

    low, high = np.log(_TEMPERATURES)
    found = minimize(
        loss,
        np.zeros(1 + labels),
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high)] + [(-10, 10)] * labels,
    ).x
    shift = tuple(float(x) for x in found[1:]) if method == "shift" else (0.0,) * labels
    return Calibration(float(np.exp(found[0])), shift, int(known.any(axis=1).sum()))


def fold(layer: Any, calibration: Calibration) -> None:
    """Put a calibration into the linear layer that makes the logits, in place.

    Args:
        layer: torch Linear with a bias and one row a label.
        calibration: Fitted on its outputs.
    """
    import torch

    with torch.no_grad():
        layer.weight.div_(calibration.temperature)
        layer.bias.div_(calibration.temperature).add_(torch.tensor(calibration.shift))


def expected_calibration_error(
    probability: npt.ArrayLike, truth: npt.ArrayLike, *, bins: int = BINS
) -> float:
    """Mean distance of a probability from the observed rate, over equal-width bins weighted by their size.

    Args:
        probability: (n,) of the positive class.
        truth: (n,) 0/1 or probabilities.
        bins: Number of bins.
    """
    p, y = np.asarray(probability, np.float64), np.asarray(truth, np.float64)
    if not len(p):
        return float("nan")
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=p - y, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def area_under_curve(score: npt.ArrayLike, truth: npt.ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive outscores a negative, ties counting half; NaN without either."""
    from scipy.stats import rankdata

    y = np.asarray(truth, bool)
    positives, negatives = int(y.sum()), int((~y).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(np.asarray(score, np.float64))
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def label_figures(
    before: npt.ArrayLike, after: npt.ArrayLike, targets: npt.ArrayLike, *, seed: int = 0, draws: int = _DRAWS
) -> dict[str, Any]:
    """Figures of one label, each with a 95 % bootstrap interval over texts.

    Args:
        before: (n,) logits as trained.
        after: (n,) calibrated logits.
        targets: (n,) probabilities, NaN where unknown; at least 0.5 counts as positive.
        seed: Of the bootstrap.
        draws: Resamples.

    Returns:
        `n`, `positives`, and {value, low, high} of base_rate, auc, precision, recall, f1 (at 0.5), ece_before, ece.
    """
    wanted = np.asarray(targets, np.float64)
    known = ~np.isnan(wanted)
    y = wanted[known]
    raw, final = (_sigmoid(np.asarray(v, np.float64)[known]) for v in (before, after))
    positive, flagged = y >= 0.5, final >= 0.5

    def precision(i: Any) -> float:
        return _ratio((positive & flagged)[i], flagged[i])

    def recall(i: Any) -> float:
        return _ratio((positive & flagged)[i], positive[i])

    def f1(i: Any) -> float:
        total = int(positive[i].sum() + flagged[i].sum())
        return 2 * int((positive & flagged)[i].sum()) / total if total else float("nan")

    statistics: dict[str, Callable[[Any], float]] = {
        "base_rate": lambda i: float(y[i].mean()),
        "auc": lambda i: area_under_curve(final[i], positive[i]),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "ece_before": lambda i: expected_calibration_error(raw[i], y[i]),
        "ece": lambda i: expected_calibration_error(final[i], y[i]),
    }
    out: dict[str, Any] = {"n": int(known.sum()), "positives": int(positive.sum())}
    if out["n"]:
        rng = np.random.default_rng(seed)
        samples = [rng.integers(0, out["n"], out["n"]) for _ in range(draws)]
        out.update({name: _interval(statistic, out["n"], samples) for name, statistic in statistics.items()})
    return out


def _interval(
    statistic: Callable[[Any], float], n: int, samples: Sequence[npt.NDArray[np.int64]]
) -> dict[str, float | None]:
    values = np.array([statistic(i) for i in samples])
    low, high = (
        np.quantile(values[~np.isnan(values)], [0.025, 0.975]) if (~np.isnan(values)).any() else (np.nan,) * 2
    )
    figures = {"value": statistic(np.arange(n)), "low": float(low), "high": float(high)}
    return {k: None if np.isnan(v) else round(v, 4) for k, v in figures.items()}


def _ratio(part: Any, whole: Any) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else float("nan")


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))
