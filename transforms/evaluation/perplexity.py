"""Perplexity of a text under several models: intervals by document, and differences paired by document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.metrics.bootstrap import DRAWS, LEVEL, Interval, ratio_interval, resampled_sums, two_sided

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DocumentLosses:
    """What one model makes of n documents.

    Attributes:
        nats: Summed -ln p of each document's tokens.
        tokens: How many tokens each has under this model's tokenizer.
    """

    nats: Array
    tokens: Array


@dataclass(frozen=True)
class PerplexityFigures:
    """One model on one text.

    Attributes:
        perplexity: exp of the mean loss by token; comparable between models of one tokenizer.
        bits_per_byte: Loss in bits by UTF-8 byte of text; comparable between any two models.
    """

    perplexity: Interval
    bits_per_byte: Interval


@dataclass(frozen=True)
class PerplexityChange:
    """How one model's loss differs from another's on the same documents.

    Attributes:
        perplexity_ratio: Perplexity of the one by that of the other, minus 1 (0.03: 3 % worse); by token where both
            have one tokenizer, else at the length of a byte.
        bits_per_byte: Difference in bits by byte.
        p_value: Two-sided, of "no difference".
        by_token: Whether the ratio is by token.
    """

    perplexity_ratio: Interval
    bits_per_byte: Interval
    p_value: float
    by_token: bool


def perplexity_figures(
    losses: DocumentLosses, sizes: Array, *, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> PerplexityFigures:
    """Perplexity and bits by byte with intervals by document.

    Args:
        losses: Of n documents.
        sizes: Their UTF-8 bytes.
        seed: Of the bootstrap.
        draws: How many resamples.
        level: Mass inside the intervals.
    """
    per_token = ratio_interval(losses.nats, losses.tokens, seed, draws, level)
    bits = ratio_interval(losses.nats / math.log(2), sizes, seed, draws, level)
    return PerplexityFigures(per_token.map(math.exp), bits)


def perplexity_change(
    a: DocumentLosses,
    b: DocumentLosses,
    sizes: Array,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> PerplexityChange:
    """How much worse `a` is than `b`, documents drawn in pairs.

    Args:
        a: One model's losses on n documents.
        b: Another's, on the same.
        sizes: The documents' UTF-8 bytes.
        seed: Of the bootstrap.
        draws: How many resamples.
        level: Mass inside the intervals.
    """
    by_token = bool(np.array_equal(a.tokens, b.tokens))
    below = a.tokens if by_token else sizes
    columns = np.stack([a.nats - b.nats, below, sizes], axis=1)
    sums = resampled_sums(columns, seed, draws)
    sums = sums[(sums[:, 1] > 0) & (sums[:, 2] > 0)]
    whole = columns.sum(axis=0)
    ratios = np.expm1(sums[:, 0] / sums[:, 1])
    bits = sums[:, 0] / sums[:, 2] / math.log(2)
    n = len(sizes)
    return PerplexityChange(
        _interval(float(np.expm1(whole[0] / whole[1])), ratios, level, n),
        _interval(float(whole[0] / whole[2] / math.log(2)), bits, level, n),
        two_sided(sums[:, 0], columns[:, 0]),
        by_token,
    )


def cut_documents(texts: Sequence[str], max_chars: int) -> list[str]:
    """Each text's head of at most `max_chars` characters, cut at white space where there is any; 0 cuts nothing."""
    if not max_chars:
        return list(texts)
    out = []
    for text in texts:
        head = text[:max_chars]
        if len(text) > max_chars and not text[max_chars].isspace():
            words = head.rsplit(None, 1)
            head = words[0] if len(words) == 2 else head
        out.append(head)
    return out


def _interval(value: float, drawn: Array, level: float, n: int) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(float(low), value), max(float(high), value), n)
