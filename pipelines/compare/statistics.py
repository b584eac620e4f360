"""What is said of arms from figures by prompt and seed: means with intervals, reductions, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.metrics.bootstrap import (
    DRAWS,
    LEVEL,
    Interval,
    PairedDifference,
    mean_interval,
    paired_difference,
    resampled_sums,
    share_interval,
)

Array = npt.NDArray[np.float64]
BySeed = Mapping[int, Array]


@dataclass(frozen=True)
class Measure:
    """A figure of one arm.

    Attributes:
        value: Mean over training seeds, with an interval by prompt.
        by_seed: Its mean for each training seed.
        spread: Standard deviation over training seeds (of the sample); None with one seed.
    """

    value: Interval
    by_seed: dict[int, float]
    spread: float | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        seeds = {str(seed): value for seed, value in self.by_seed.items()}
        return {**self.value.as_dict(), "by_seed": seeds, "spread": self.spread}


def measure(values: BySeed, *, share: bool = False, seed: int = 0) -> Measure:
    """Mean of a figure over prompts and training seeds.

    Args:
        values: Training seed -> (n,) one figure a prompt, prompts in one order.
        share: The figures are shares.
        seed: Of the bootstrap.
    """
    means = {s: float(v.mean()) for s, v in values.items()}
    by_prompt = np.mean(list(values.values()), axis=0)
    interval = (share_interval if share else mean_interval)(by_prompt, seed)
    spread = float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None
    return Measure(interval, means, spread)


def paired(a: BySeed, b: BySeed, seed: int = 0) -> PairedDifference | None:
    """Difference a - b by prompt, over the training seeds both have; None where they have none in common."""
    pair = _common(a, b)
    return paired_difference(pair[0], pair[1], seed=seed) if pair is not None else None


def reduction(
    arm: BySeed, raw: BySeed, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> Interval | None:
    """By what share a figure is lower than under the raw corpus: 1 - arm / raw, prompts drawn in pairs.

    Args:
        arm: Training seed -> (n,) figures.
        raw: The same under the raw corpus.
        seed: Of the bootstrap.
        draws: How many resamples.
        level: Mass inside the interval.

    Returns:
        The interval; None where nothing can be said (no seed in common, or the raw figure is 0).
    """
    pair = _common(arm, raw)
    if pair is None or pair[1].sum() <= 0:
        return None
    sums = resampled_sums(np.stack(pair, axis=1), seed, draws)
    sums = sums[sums[:, 1] > 0]
    value = float(1 - pair[0].sum() / pair[1].sum())
    low, high = np.quantile(1 - sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(float(low), value), max(float(high), value), len(pair[0]))


def _common(a: BySeed, b: BySeed) -> tuple[Array, Array] | None:
    """Both sides' means by prompt over the seeds they share; None where they share none."""
    seeds: Sequence[int] = sorted(set(a) & set(b))
    if not seeds:
        return None
    return np.mean([a[s] for s in seeds], axis=0), np.mean([b[s] for s in seeds], axis=0)
