"""Turning a judge's log-odds into probabilities with labels people gave: two numbers, fitted on a few hundred pairs.

A judge may rank well and still say yes to everything. Platt's scaling (J. Platt 1999) fits a slope and a bias by logistic
regression; nothing is judged again, and the order within a query stays as it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.errors import InputError

# Pairs of each kind below which the fit says nothing.
LEAST = 5


@dataclass(frozen=True)
class Platt:
    """Calibrated log-odds are `slope * value + bias`.

    Attributes:
        slope: Never negative: a judge whose order is upside down gets 0, which is to say it tells nothing.
        bias: In log-odds.
        pairs: Pairs fitted on.
        positives: Of them, what people judged relevant.
        queries: Queries they belong to; what agreement is measured on leaves these out.
    """

    slope: float
    bias: float
    pairs: int
    positives: int
    queries: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For the manifest."""
        return {**asdict(self), "queries": list(self.queries)}


def fit_platt(values: npt.ArrayLike, positive: npt.ArrayLike, queries: tuple[str, ...] = ()) -> Platt:
    """Fit slope and bias by maximum likelihood (Newton's method, targets smoothed as Platt says).

    Args:
        values: (n,) log-odds.
        positive: (n,) booleans.
        queries: Recorded.

    Raises:
        InputError: Too few pairs of either kind.
    """
    x, y = np.asarray(values, np.float64), np.asarray(positive, bool)
    positives = int(y.sum())
    if min(positives, len(y) - positives) < LEAST:
        raise InputError(
            f"--calibrate-on: {positives} positive and {len(y) - positives} negative pairs of this pool are labelled "
            f"there; {LEAST} of each are needed"
        )
    target = np.where(y, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))
    center, scale = float(x.mean()), float(x.std()) or 1.0
    z = np.stack([(x - center) / scale, np.ones_like(x)], axis=1)
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(z @ weights, -500, 500)))
        gradient = z.T @ (p - target)
        hessian = (z * (p * (1 - p))[:, None]).T @ z + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Halved where it would not improve: far from the optimum a full step may overshoot.
        while (
            np.abs(step).max() > 1e-12
            and _loss(z, target, weights - step) > _loss(z, target, weights) + 1e-12
        ):
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    if weights[0] < 0:
        prior = float(target.mean())
        return Platt(0.0, float(np.log(prior / (1 - prior))), len(y), positives, queries)
    slope = float(weights[0] / scale)
    return Platt(slope, float(weights[1] - slope * center), len(y), positives, queries)


def _loss(
    z: npt.NDArray[np.float64], target: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> float:
    logits = z @ weights
    return float((np.logaddexp(0, logits) - target * logits).sum())


def calibrate(rows: pl.DataFrame, platt: Platt, threshold: float) -> pl.DataFrame:
    """Rows with value, probability and binary as the calibrated judge gives them; rows without a value as they are."""
    odds = pl.col("value") * platt.slope + platt.bias
    probability = 1 / (1 + (-odds).exp())
    has = pl.col("value").is_not_null()
    return rows.with_columns(
        pl.when(has).then(odds).otherwise(pl.col("value")).alias("value"),
        pl.when(has).then(probability).otherwise(pl.col("probability")).alias("probability"),
        pl.when(has).then(probability > threshold).otherwise(pl.col("binary")).alias("binary"),
    )
