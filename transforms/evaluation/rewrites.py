"""Rewrites judged sentence by sentence: style, similarity, fluency, their product, and what sets systems apart.

STA  1 where the judge does not find the rewrite toxic (scores below 0.5), else 0
SIM  cosine of rewrite and source by a sentence encoder, within [0, 1]; 0 where nothing is left
FL   1 where the rewrite is an acceptable sentence, else 0; 0 where nothing is left
J    mean over sentences of STA x SIM x FL (Krishna et al., 2020): a product of means would credit a system for
being harmless in one sentence and fluent in another
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

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

METRICS = ("J", "STA", "SIM", "FL")


@dataclass(frozen=True)
class Measures:
    """What was measured of one system's n outputs.

    Attributes:
        toxicity: The judge's score.
        sta: 0 or 1.
        sim: In [0, 1].
        acceptability: The fluency model's score in [0, 1].
        fl: 0 or 1.
        empty: Whether nothing readable is left.
        copied: Whether the output is the source but for case, spaces and Unicode form.
        whole: Whether every number, name, address and negation outside listed words is still there, and none is new.
        chrf: Against references, in [0, 100]; NaN where there is none. None without references.
        given: Rows the system is measured on (people's rewrites: those that have one); the others count in nothing.
            None = all.
    """

    toxicity: Array
    sta: Array
    sim: Array
    acceptability: Array
    fl: Array
    empty: npt.NDArray[np.bool_]
    copied: npt.NDArray[np.bool_]
    whole: npt.NDArray[np.bool_]
    chrf: Array | None = None
    given: npt.NDArray[np.bool_] | None = None

    @property
    def rows(self) -> npt.NDArray[np.bool_]:
        """Which of the n rows count."""
        return np.ones(len(self.sta), bool) if self.given is None else self.given

    def only(self, rows: npt.NDArray[np.bool_]) -> Measures:
        """The same of some rows alone."""
        taken = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("chrf", "given")}
        return Measures(**taken, chrf=None if self.chrf is None else self.chrf[rows])

    @property
    def joint(self) -> Array:
        """STA x SIM x FL of each sentence."""
        return self.sta * self.sim * self.fl

    def metric(self, name: str) -> Array:
        """One of `METRICS`, by sentence."""
        return {"J": self.joint, "STA": self.sta, "SIM": self.sim, "FL": self.fl}[name]


@dataclass(frozen=True)
class SystemFigures:
    """One system.

    Attributes:
        metrics: Mean of each of `METRICS`, drawn by sentence.
        geometric: Cube root of the product of the three means, as earlier work reports.
        toxicity: Mean score of the judge.
        chrf: Mean sentence chrF; None without references.
        bleu: Corpus BLEU; None without references.
        empty: Share of outputs with nothing left.
        copied: Share of outputs equal to their source.
        facts: Share of outputs that lost and invented no fact.
    """

    metrics: dict[str, Interval]
    geometric: Interval
    toxicity: Interval
    chrf: Interval | None
    bleu: Interval | None
    empty: float
    copied: float
    facts: Interval


def system_figures(
    m: Measures, *, bleu: Interval | None = None, seed: int = 0, draws: int = DRAWS
) -> SystemFigures:
    """Means and intervals of one system's measures.

    Args:
        m: Of n outputs.
        bleu: Corpus BLEU, measured elsewhere.
        seed: Of the bootstrap.
        draws: How many resamples.
    """
    m = m.only(m.rows)
    metrics = {name: mean_interval(m.metric(name), seed, draws) for name in ("J", "SIM")}
    metrics |= {name: share_interval(m.metric(name), seed, draws) for name in ("STA", "FL")}
    chrf = None
    if m.chrf is not None and np.isfinite(m.chrf).any():
        chrf = mean_interval(m.chrf[np.isfinite(m.chrf)], seed, draws)
    return SystemFigures(
        {name: metrics[name] for name in METRICS},
        geometric_interval(m, seed=seed, draws=draws),
        mean_interval(m.toxicity, seed, draws),
        chrf,
        bleu,
        float(m.empty.mean()),
        float(m.copied.mean()),
        share_interval(m.whole.astype(np.float64), seed, draws),
    )


def geometric_interval(m: Measures, *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """(mean STA x mean SIM x mean FL) ** (1/3), drawn by sentence."""
    columns = np.stack([m.sta, m.sim, m.fl], axis=1)
    n = len(columns)
    drawn = np.cbrt(np.clip(resampled_sums(columns, seed, draws) / n, 0, None).prod(axis=1))
    value = float(np.cbrt(max(0.0, columns.mean(axis=0).prod())))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(float(low), value), max(float(high), value), n)


def compare_systems(
    measures: Mapping[str, Measures], against: str, *, seed: int = 0, draws: int = DRAWS
) -> dict[str, dict[str, PairedDifference]]:
    """Each other system against one, metric by metric, sentences drawn in pairs.

    Returns:
        System -> metric -> its mean minus that of `against`, over the rows both are measured on; a system that has none
        of these in common is left out.
    """
    base = measures[against]
    found: dict[str, dict[str, PairedDifference]] = {}
    for name, m in measures.items():
        common = m.rows & base.rows
        if name != against and common.any():
            a, b = m.only(common), base.only(common)
            found[name] = {
                k: paired_difference(a.metric(k), b.metric(k), seed=seed, draws=draws) for k in METRICS
            }
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons (Holm, 1979), in their order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, round((len(order) - rank) * p_values[i], 12)))
        out[i] = largest
    return out
