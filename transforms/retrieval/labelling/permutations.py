"""Several readings of one list in different orders, and one label out of them.

What a model picks from a list depends on where things stand in it. Shown the same candidates in several orders, its
preference for a place falls evenly on all of them, and what is left is about the documents.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.fingerprint import derive_seed

# A passage is selected where at least half of the readings select it.
MAJORITY = 0.5


def orders(n: int, count: int, seed: int, *key: str | int) -> list[tuple[int, ...]]:
    """Orders to show n candidates in.

    One order is the pool's own. Several are rows of random Latin squares: over n of them every candidate stands once in
    every place, so a judge that always picks one place gives everybody the same number of votes; with fewer, nobody
    stands in a place twice.

    Args:
        n: Candidates.
        count: Orders wanted.
        seed: The run's seed.
        *key: What is judged (the query); equal keys give equal orders.

    Returns:
        `count` permutations of range(n): entry p is the candidate shown at place p.
    """
    if count == 1 or n < 2:
        return [tuple(range(n))] * count
    found = []
    for reading in range(count):
        square, row = divmod(reading, n)
        draw = random.Random(derive_seed(seed, *key, "order", square))
        candidates, places, shifts = list(range(n)), list(range(n)), list(range(n))
        for drawn in (candidates, places, shifts):
            draw.shuffle(drawn)
        found.append(tuple(candidates[(places[p] + shifts[row]) % n] for p in range(n)))
    return found


def unpermute(numbers: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Candidates behind the numbers of a reply (1 = the first shown) to a list shown in `order`."""
    return tuple(order[number - 1] for number in numbers)


@dataclass(frozen=True)
class Vote:
    """What the readings of a list say of one candidate.

    Attributes:
        share: Selected by this share of the readings; of orders: how far up it stands, 1 = first in all of them, 1/n =
            last.
        readings: Readings that could be read.
        rank: Its place by mean rank, from 1 (ties in pool order); None for selections, and where no reading placed it.
    """

    share: float
    readings: int
    rank: int | None = None


def merge_selections(selections: Sequence[Sequence[int]], n: int) -> list[Vote]:
    """Votes for n candidates.

    Args:
        selections: The readings that could be read: candidates (from 0) each selects.
        n: Candidates.

    Returns:
        One vote a candidate; empty where no reading could be read.
    """
    if not selections:
        return []
    sets = [frozenset(selection) for selection in selections]
    return [Vote(sum(i in s for s in sets) / len(sets), len(sets)) for i in range(n)]


def merge_rankings(rankings: Sequence[Sequence[int]], n: int) -> list[Vote]:
    """Mean ranks of n candidates (Borda's count); those a reading leaves out share the places that are left.

    Args:
        rankings: The readings that could be read: candidates (from 0), best first.
        n: Candidates.

    Returns:
        One vote a candidate; empty where no reading could be read.
    """
    if not rankings:
        return []
    sums = [0.0] * n
    placed = [False] * n
    for ranking in rankings:
        left = (len(ranking) + 1 + n) / 2  # mean of the places behind the last one given
        place = {candidate: float(rank) for rank, candidate in enumerate(ranking, 1)}
        for i in range(n):
            sums[i] += place.get(i, left)
            placed[i] = placed[i] or i in place
    means = [total / len(rankings) for total in sums]
    best = sorted(range(n), key=lambda i: (means[i], i))
    rank = {candidate: number for number, candidate in enumerate(best, 1)}
    return [Vote(1 - (means[i] - 1) / n, len(rankings), rank[i] if placed[i] else None) for i in range(n)]


def top_share(n: int, percent: float) -> int:
    """How many of n the top `percent` are: rounded down, at least one."""
    return max(1, int(n * percent / 100 + 1e-9)) if n else 0
