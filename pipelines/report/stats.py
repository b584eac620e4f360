"""Accumulators that see a table once, batch by batch, and stay small: histograms, correlations, samples."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

Floats = npt.NDArray[np.float64]
THRESHOLDS = (0.3, 0.5, 0.7)


class Histogram:
    """Counts of values in equal bins of [low, high], with count, mean and extremes; NaN is left out.

    Args:
        bins: Number of bins.
        low: Lower edge of the first bin.
        high: Upper edge of the last bin, inclusive; values outside are counted in the outer bins.
    """

    def __init__(self, bins: int = 20, low: float = 0.0, high: float = 1.0) -> None:
        self.edges = np.linspace(low, high, bins + 1)
        self.counts = np.zeros(bins, np.int64)
        self.n = 0
        self.total = 0.0
        self.above = dict.fromkeys(THRESHOLDS, 0)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count values, of any shape."""
        values = np.asarray(values, np.float64).ravel()
        values = values[~np.isnan(values)]
        if not len(values):
            return
        self.counts += np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges)[0]
        self.n += len(values)
        self.total += float(values.sum())
        for threshold in THRESHOLDS:
            self.above[threshold] += int((values >= threshold).sum())

    @property
    def mean(self) -> float | None:
        """Mean of what was counted; None where that is nothing."""
        return self.total / self.n if self.n else None


class Agreement:
    """Pearson correlations between scorers, and how often they disagree at a threshold.

    Each pair is compared on the items both have scored: in a cascade the later scorer sees only some.

    Args:
        names: Names of the k scorers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        k = len(self.names)
        self._sums = np.zeros((k, k, 6))  # n, x, y, xx, yy, xy over the pairs both scored
        self.table = np.zeros((k, k, len(THRESHOLDS), 2), np.int64)  # only the first above; only the second

    def add(self, columns: Sequence[Floats]) -> None:
        """Add n items: for each scorer n scores, NaN where it gave none."""
        known = [~np.isnan(x) for x in columns]
        for i, j in itertools.combinations_with_replacement(range(len(columns)), 2):
            both = known[i] & known[j]
            a, b = columns[i][both], columns[j][both]
            # Plain sums: BLAS would start its threads for every one of these short products.
            xx, yy, xy = (a * a).sum(), (b * b).sum(), (a * b).sum()
            self._sums[i, j] += (len(a), a.sum(), b.sum(), xx, yy, xy)
            if i != j:
                self._sums[j, i] += (len(a), b.sum(), a.sum(), yy, xx, xy)
            for t, threshold in enumerate(THRESHOLDS):
                over_a, over_b = a >= threshold, b >= threshold
                splits = int((over_a & ~over_b).sum()), int((~over_a & over_b).sum())
                self.table[i, j, t] += splits
                if i != j:
                    self.table[j, i, t] += splits[::-1]

    def count(self, i: int, j: int) -> int:
        """Items both scorers have scored."""
        return int(self._sums[i, j, 0])

    def correlation(self, i: int, j: int) -> float | None:
        """Pearson's r of a pair; None where fewer than two items, or no variance, are there to speak of."""
        n, x, y, xx, yy, xy = self._sums[i, j]
        if n < 2:
            return None
        vx, vy = n * xx - x * x, n * yy - y * y
        if vx <= 1e-9 * n * xx or vy <= 1e-9 * n * yy:
            return None
        return float(np.clip((n * xy - x * y) / np.sqrt(vx * vy), -1, 1))


@dataclass
class Smallest:
    """Keeps the k items with the smallest keys; with hashes as keys, a uniform and deterministic sample.

    Attributes:
        k: How many to keep.
    """

    k: int
    _heap: list[tuple[float, int, Any]] = field(default_factory=list)  # negated key: the largest is on top
    _serial: int = 0

    def offer(self, keys: npt.NDArray[Any], items: Sequence[Any]) -> None:
        """Offer items; `keys` are n numbers, NaN meaning "not this one"."""
        keys = np.asarray(keys, np.float64)
        limit = -self._heap[0][0] if len(self._heap) >= self.k else np.inf
        good = np.flatnonzero(keys < limit)
        if len(good) > self.k:
            good = good[np.argsort(keys[good], kind="stable")[: self.k]]
        for i in good.tolist():
            # Ties keep the earlier item: the serial counts down on the negated side.
            entry = (-float(keys[i]), -self._serial, items[i])
            self._serial += 1
            if len(self._heap) < self.k:
                heapq.heappush(self._heap, entry)
            elif entry[:2] > self._heap[0][:2]:
                heapq.heapreplace(self._heap, entry)

    @property
    def items(self) -> list[Any]:
        """What was kept, smallest key first."""
        return [item for _, _, item in sorted(self._heap, key=lambda e: (-e[0], -e[1]))]


def row_hashes(shard: str, rows: npt.NDArray[Any], salt: int = 0) -> Floats:
    """Hash (shard, row) to [0, 1): the same on every machine and in every batch size.

    Args:
        shard: Name of the shard.
        rows: n integers.
        salt: Tells several draws over the same rows apart.

    Returns:
        n floats, as good as uniform.
    """
    seed = np.uint64(xxhash.xxh3_64_intdigest(shard.encode(), seed=salt))
    with np.errstate(over="ignore"):  # splitmix64 (Steele, Lea and Flood 2014) is defined modulo 2**64
        z = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def numbers(values: pa.Array | None, n: int = 0) -> Floats:
    """A numeric or boolean Arrow array as float64, nulls as NaN; n NaNs where there is no array."""
    if values is None:
        return np.full(n, np.nan)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return np.asarray(pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)


def field_of(values: pa.Array, *path: str) -> pa.Array | None:
    """A nested field of a struct array, with the struct's own nulls applied; None where there is no such field."""
    for name in path:
        if not pa.types.is_struct(values.type) or values.type.get_field_index(name) < 0:
            return None
        values = pc.struct_field(values, name)
    return values
