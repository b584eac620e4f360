"""Intervals and paired differences by the bootstrap, the same numbers on every machine.

The unit that is drawn with replacement is the one the study could have drawn differently: a prompt, a sentence, a
document. What was measured several times on one unit (seeds, samples) is averaged within it first, or given as its
cluster; otherwise the interval would claim more evidence than there is. (B. Efron, R. Tibshirani, *An Introduction to
the Bootstrap*, 1993; P. Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004, for
the paired form.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import TamisError

Values = Sequence[float] | npt.NDArray[Any]
Array = npt.NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95
CELLS_AT_ONCE = (
    4_000_000  # bounds the memory of the drawn indices; part of the result only through the stream
)


@dataclass(frozen=True)
class Interval:
    """An estimate and how far it could be off.

    Attributes:
        mean: The estimate on the data as it is.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Independent units behind it (prompts, sentences; clusters where there are any).
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        """Whether there is an interval at all: a single unit says nothing of how another would have been."""
        return self.n > 1 or self.low < self.high

    def apart(self, other: Interval) -> bool:
        """Whether the two intervals do not touch; of a single unit that is not known, so they do."""
        return self.known and other.known and (self.high < other.low or other.high < self.low)

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of a monotone function of the estimate (`math.exp` of a mean log-loss: perplexity)."""
        ends = sorted((function(self.low), function(self.high)))
        return Interval(function(self.mean), ends[0], ends[1], self.n)

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} {ends(asdict(self))}"


def ends(
    figure: Mapping[str, Any], places: int = 3, sign: str = "", scale: float = 1.0, between: str = ", "
) -> str:
    """The ends of an interval as text: `[0.371, 0.455]`, or `[–]` where a single unit has none.

    Args:
        figure: What `Interval.as_dict` gave.
        places: Decimals.
        sign: `+` shows it of positive numbers too.
        scale: 100 for percent.
        between: What stands between the two; where it is not a comma the brackets are left out.
    """
    low, high = figure["low"], figure["high"]
    known = figure.get("n", 2) > 1 or low < high
    text = f"{scale * low:{sign}.{places}f}{between}{scale * high:{sign}.{places}f}" if known else "–"
    return f"[{text}]" if between == ", " else text


@dataclass(frozen=True)
class PairedDifference:
    """How much two systems differ on the same units.

    Attributes:
        difference: Interval of mean(a) - mean(b).
        p_value: Two-sided, of "no difference"; never below 1 / (draws + 1), which is all that so many draws can say, nor
            below what so many units can (`two_sided`).
    """

    difference: Interval
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"difference": self.difference.as_dict(), "p_value": self.p_value}


def resampled_sums(columns: npt.NDArray[Any], seed: int = 0, draws: int = DRAWS) -> Array:
    """Column sums of `draws` resamples of the rows, with replacement: what every interval here is made of.

    Args:
        columns: (n, k), one row a unit. All k columns of a unit are drawn together.
        seed: Of the draws.
        draws: How many.

    Returns:
        (draws, k) float64. A statistic that is a function of sums (a mean, a ratio, micro F1) of each row of it is
        a draw from that statistic's bootstrap distribution.
    """
    units, width = columns.shape
    generator = np.random.default_rng(seed)
    sums = np.empty((draws, width))
    step = max(1, CELLS_AT_ONCE // max(1, units))
    for start in range(0, draws, step):
        stop = min(draws, start + step)
        drawn = generator.integers(0, units, size=(stop - start, units))
        for column in range(width):
            sums[start:stop, column] = columns[:, column][drawn].sum(axis=1)
    return sums


def mean_interval(values: Values, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """Percentile interval of a mean.

    Args:
        values: One number a unit.
        seed: Of the draws.
        draws: How many resamples.
        level: Mass inside the interval.

    Raises:
        TamisError: No values, or one that is not a number.
    """
    numbers = _clean(values, "values")
    _check(draws, level)
    means = resampled_sums(numbers[:, None], seed, draws)[:, 0] / len(numbers)
    return _percentiles(float(numbers.mean()), means, level, len(numbers))


def share_interval(values: Values, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """Interval of a share: the mean of values within [0, 1], most often zeros and ones.

    Where all of them are 0 (or 1) a resample can only repeat that, and the bootstrap would claim certainty; Wilson's
    score interval is given instead, which says how many units there were to see an exception in.

    Raises:
        TamisError: No values, one that is not a number, or one outside [0, 1].
    """
    numbers = _clean(values, "values")
    if (numbers < 0).any() or (numbers > 1).any():
        raise TamisError("a share is made of values within [0, 1]")
    if (numbers == numbers[0]).all() and numbers[0] in (0.0, 1.0):
        _check(draws, level)
        low, high = _wilson(float(numbers.sum()), len(numbers), level)
        return Interval(float(numbers[0]), low, high, len(numbers))
    return mean_interval(numbers, seed, draws, level)


def ratio_interval(
    numerators: Values, denominators: Values, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> Interval:
    """Percentile interval of a ratio of sums (loss over tokens, hits over predictions), drawn by unit.

    Raises:
        TamisError: Lengths differ, a value is not a number, or the denominators do not sum to something positive.
    """
    above, below = _clean(numerators, "numerators"), _clean(denominators, "denominators")
    _same_length(above, below)
    _check(draws, level)
    if below.sum() <= 0 or (below < 0).any():
        raise TamisError("a ratio needs denominators of 0 or more, at least one of them positive")
    sums = resampled_sums(np.stack([above, below], axis=1), seed, draws)
    kept = sums[:, 1] > 0  # a resample of nothing but empty units has no ratio
    return _percentiles(float(above.sum() / below.sum()), sums[kept, 0] / sums[kept, 1], level, len(above))


def clustered_interval(
    values: Values,
    clusters: Sequence[Hashable] | npt.NDArray[Any],
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of a mean where values come in clusters (samples of one prompt): whole clusters are drawn.

    Args:
        values: One number an observation.
        clusters: Each observation's cluster, in the order of `values`.
        seed: Of the draws.
        draws: How many resamples.
        level: Mass inside the interval.

    Returns:
        The mean over observations; `n` counts clusters.

    Raises:
        TamisError: No values, one that is not a number, or lengths differ.
    """
    numbers = _clean(values, "values")
    sums, counts = _by_cluster([numbers], clusters)
    return ratio_interval(sums[:, 0], counts, seed, draws, level)


def paired_difference(
    a: Values,
    b: Values,
    clusters: Sequence[Hashable] | npt.NDArray[Any] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> PairedDifference:
    """Difference of the means of two systems measured on the same units, by the paired bootstrap.

    Args:
        a: One number a unit under the first system.
        b: The same units, in the same order, under the second.
        clusters: Each unit's cluster where units are not independent; whole clusters are then drawn.
        seed: Of the draws.
        draws: How many resamples.
        level: Mass inside the interval.

    Raises:
        TamisError: Lengths differ, or a value is not a number.
    """
    first, second = _clean(a, "a"), _clean(b, "b")
    _same_length(first, second)
    _check(draws, level)
    gaps = first - second
    if clusters is None:
        units = len(gaps)
        drawn = resampled_sums(gaps[:, None], seed, draws)[:, 0] / units
        own = gaps
    else:
        sums, counts = _by_cluster([gaps], clusters)
        units, own = len(counts), sums[:, 0]
        both = resampled_sums(np.stack([sums[:, 0], counts], axis=1), seed, draws)
        drawn = both[:, 0] / both[:, 1]
    interval = _percentiles(float(gaps.mean()), drawn, level, units)
    return PairedDifference(interval, two_sided(drawn, own))


def stratified_interval(
    values: Values,
    strata: Sequence[Hashable] | npt.NDArray[Any],
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of the plain mean of the strata's means (a macro average): each is drawn from apart.

    Args:
        values: One number a unit.
        strata: Each unit's stratum (its group of prompts); every one counts the same, however large.
        seed: Of the draws.
        draws: How many resamples.
        level: Mass inside the interval.

    Returns:
        `n` counts units.

    Raises:
        TamisError: No values, one that is not a number, or lengths differ.
    """
    numbers = _clean(values, "values")
    _check(draws, level)
    mean, drawn = _macro_draws(numbers, strata, seed, draws)
    return _percentiles(mean, drawn, level, len(numbers))


def stratified_difference(
    a: Values,
    b: Values,
    strata: Sequence[Hashable] | npt.NDArray[Any],
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> PairedDifference:
    """Like `paired_difference`, of the plain mean of the strata's means.

    Raises:
        TamisError: As `stratified_interval`.
    """
    first, second = _clean(a, "a"), _clean(b, "b")
    _same_length(first, second)
    _check(draws, level)
    mean, drawn = _macro_draws(first - second, strata, seed, draws)
    return PairedDifference(_percentiles(mean, drawn, level, len(first)), two_sided(drawn, first - second))


def _macro_draws(
    numbers: Array, strata: Sequence[Hashable] | npt.NDArray[Any], seed: int, draws: int
) -> tuple[float, Array]:
    if len(strata) != len(numbers):
        raise TamisError(f"{len(numbers)} values but {len(strata)} strata: give one for each")
    members: dict[Any, list[int]] = {}
    for i, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(i)
    drawn, mean = np.zeros(draws), 0.0
    for number, rows in enumerate(members.values()):
        own = numbers[rows]
        drawn += resampled_sums(own[:, None], seed + number, draws)[:, 0] / len(own)
        mean += float(own.mean())
    return mean / len(members), drawn / len(members)


def two_sided(drawn: npt.NDArray[Any], gaps: npt.NDArray[Any]) -> float:
    """Two-sided p-value of "zero" from bootstrap draws of a difference: how often a draw falls on the other side.

    Args:
        drawn: Draws of the difference.
        gaps: The differences themselves, one a unit. Of k that are not zero the signs could all have been the same by
            chance once in 2 ** (k - 1) times: the least p-value of a test by sign flips, which resamples of few units
            would go below.

    Returns:
        In (0, 1]; one draw is added on either side, so that no number of draws ever claims impossibility.
    """
    draws = len(drawn)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    least = 2.0 ** (1 - int(np.count_nonzero(gaps)))
    return min(1.0, max(least, 2.0 * (tail + 1) / (draws + 1)))


def _by_cluster(
    columns: Sequence[Array], clusters: Sequence[Hashable] | npt.NDArray[Any]
) -> tuple[Array, Array]:
    """Sums of each column and number of observations by cluster, clusters in order of first appearance."""
    if len(clusters) != len(columns[0]):
        raise TamisError(f"{len(columns[0])} values but {len(clusters)} clusters: give one for each")
    place: dict[Any, int] = {}
    codes = np.array([place.setdefault(cluster, len(place)) for cluster in clusters])
    sums = np.stack([np.bincount(codes, weights=column, minlength=len(place)) for column in columns], axis=1)
    return sums, np.bincount(codes, minlength=len(place)).astype(np.float64)


def _clean(values: Values, what: str) -> Array:
    """The values as float64, (n,), refused unless every one of them is a finite number."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise TamisError(f"{what}: one number for each unit is needed, not an array of shape {numbers.shape}")
    if not len(numbers):
        raise TamisError(f"{what}: there is nothing to take an interval of")
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise TamisError(
            f"{what}: {int(bad.sum())} of {len(numbers)} are not finite numbers (the first at {int(np.argmax(bad))}); "
            "leave them out and say how many, or mend what made them"
        )
    return numbers


def _check(draws: int, level: float) -> None:
    if draws < 1 or not 0 < level < 1:
        raise TamisError(
            f"a bootstrap needs 1 draw or more and a level within (0, 1), not {draws} and {level}"
        )


def _same_length(a: Array, b: Array) -> None:
    if len(a) != len(b):
        raise TamisError(f"a pair needs both its sides: {len(a)} values against {len(b)}")


def _percentiles(mean: float, drawn: Array, level: float, units: int) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    # The estimate lies inside its interval; rounding of sums in another order must not say otherwise.
    return Interval(mean, min(float(low), mean), max(float(high), mean), units)


def _wilson(hits: float, units: int, level: float) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927)."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / units, z * z / units
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / units + spread / (4 * units))
    return max(0.0, centre - half), min(1.0, centre + half)
