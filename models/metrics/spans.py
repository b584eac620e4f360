"""Character F1 of toxic spans, as SemEval-2021 task 5 defines it (Pavlopoulos et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def character_f1(predicted: Iterable[int], gold: Iterable[int]) -> float:
    """F1 of two sets of character offsets: 1 where both are empty, 0 where exactly one is.

    Example:
        >>> character_f1([0, 1, 2], [1, 2, 3])
        0.6666666666666666
    """
    a, b = set(predicted), set(gold)
    if not a or not b:
        return float(a == b)
    return 2 * len(a & b) / (len(a) + len(b))


def offsets_of(spans: Iterable[Sequence[int] | tuple[int, ...]]) -> set[int]:
    """Character offsets covered by spans given as (start, end, ...)."""
    return {i for span in spans for i in range(int(span[0]), int(span[1]))}


def mean_character_f1(predicted: Sequence[Iterable[int]], gold: Sequence[Iterable[int]]) -> float:
    """Mean of the per-post F1 over n posts (the task's score).

    Raises:
        ValueError: Lengths differ, or there are no posts.
    """
    if len(predicted) != len(gold) or not gold:
        raise ValueError(
            f"need as many predictions as posts, and at least one: {len(predicted)}, {len(gold)}"
        )
    return float(np.mean([character_f1(p, g) for p, g in zip(predicted, gold, strict=True)]))
