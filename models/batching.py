"""Batches for models: packed by a token budget, of like length, independent of their neighbours.

A model that takes whole files in order pads every text to the longest of its batch and so computes mostly
padding. Here texts are sorted by length, batched so that rows x padded length stays within a budget, and
their results put back in order.

Sorting alone would make a text's score depend, in its last bits, on what happened to stand beside it, because
its padded length would. Therefore a text is padded to a length that is a function of its own length only
(`padded_lengths`), and batches hold one padded length each. With at least `MIN_ROWS` rows a matrix product
then treats every row alike (below that BLAS libraries switch kernels), so on a CPU a score is the same bit
for bit in any company, and a job's output the same for any number of shards and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# Measured with MKL: fewer than four rows take another kernel, whose sums round otherwise.
MIN_ROWS = 4
_SMALLEST_STEP = 8


class Batch(NamedTuple):
    """Rows to be computed together.

    Attributes:
        rows: Indices into the caller's sequence, int64.
        length: What each is padded to.
    """

    rows: IntArray
    length: int


class Windows(NamedTuple):
    """Pieces of sequences: `sequence[owner[i]][start[i]:end[i]]` is piece i; int64 arrays of one length."""

    owner: IntArray
    start: IntArray
    end: IntArray


def padded_lengths(lengths: npt.ArrayLike, limit: int) -> IntArray:
    """Length each sequence is padded to: a function of its own length alone.

    Steps grow with length (8 tokens up to 128, then a sixteenth of the next power of two), so at most an
    eighth is padding beyond 64 tokens. There is always at least one padding position, except at the limit
    itself: attention takes another kernel for batches without padding, and a row must not change kernels with
    its neighbours.

    Args:
        lengths: n lengths, each in [0, limit].
        limit: The model's longest sequence.

    Returns:
        n lengths, int64, each in (length, limit], or limit where length is limit.
    """
    wanted = np.asarray(lengths, np.int64) + 1
    if wanted.size and wanted.max() > limit + 1:
        raise ValueError(
            f"a sequence of {wanted.max() - 1} exceeds the limit of {limit}; cut it into windows first"
        )
    power = 2 ** np.ceil(np.log2(np.maximum(wanted, 1))).astype(np.int64)
    step = np.maximum(_SMALLEST_STEP, power // 16)
    return np.minimum(-(-wanted // step) * step, limit)


def token_budget_batches(
    lengths: npt.ArrayLike, budget: int, *, limit: int, max_rows: int | None = None
) -> list[Batch]:
    """Pack sequences into batches of one padded length, longest first (so that lack of memory shows at once).

    Args:
        lengths: n token counts, each in [0, limit].
        budget: Most padded tokens in a batch; a sequence longer than the budget gets a batch of its own.
        limit: The model's longest sequence.
        max_rows: Most rows in a batch.

    Returns:
        Batches that hold every index in [0, n) exactly once.
    """
    own = np.asarray(lengths, np.int64)
    padded = padded_lengths(own, limit)
    # A row as long as the limit has no padding: it stays apart from padded rows of the same length.
    group = 2 * padded + (own == padded)
    order = np.lexsort((np.arange(len(own)), -own, -group))
    batches: list[Batch] = []
    edges = np.flatnonzero(np.diff(group[order])) + 1
    for rows in np.split(order, edges):
        if not len(rows):
            continue
        length = int(padded[rows[0]])
        size = max(1, budget // max(1, length))
        if max_rows is not None:
            size = min(size, max_rows)
        batches.extend(Batch(rows[i : i + size], length) for i in range(0, len(rows), size))
    return batches


def fill_rows(rows: IntArray, least: int = MIN_ROWS) -> IntArray:
    """Repeat the last index until there are `least`; the caller discards what is beyond `len(rows)`."""
    missing = least - len(rows)
    return rows if missing <= 0 else np.concatenate([rows, np.full(missing, rows[-1], np.int64)])


def windows(lengths: npt.ArrayLike, limit: int, overlap: int) -> Windows:
    """Cut over-long sequences into windows that overlap; the others are one window each.

    Windows of a sequence are as even as the limit allows and overlap by at least `overlap`, so whatever is
    shorter than the overlap stands whole in one of them.

    Args:
        lengths: n lengths; a sequence of length 0 has one empty window.
        limit: Longest window.
        overlap: Positions that neighbouring windows share, in [0, limit).

    Returns:
        The windows, in order of their owners.
    """
    if not 0 <= overlap < limit:
        raise ValueError(f"overlap must lie in [0, {limit}), not {overlap}")
    own = np.asarray(lengths, np.int64)
    count = np.where(own <= limit, 1, -(-(own - overlap) // (limit - overlap)))
    owner = np.repeat(np.arange(len(own)), count)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    last = np.maximum(own - limit, 0)[owner]  # start of an over-long sequence's last window
    start = nth * last // np.maximum(count[owner] - 1, 1)
    return Windows(owner, start, np.minimum(start + limit, own[owner]))


def max_by_owner(scores: FloatArray, owner: IntArray, n: int) -> FloatArray:
    """Maximum over each owner's windows.

    Args:
        scores: (windows, labels).
        owner: (windows,) in ascending order, every owner in [0, n) present.
        n: Number of owners.

    Returns:
        float32 of shape (n, labels).
    """
    if n == 0:
        return np.zeros((0, scores.shape[1]), np.float32)
    first = np.searchsorted(owner, np.arange(n))
    return np.maximum.reduceat(scores, first, axis=0).astype(np.float32, copy=False)


def run_batches(
    sequences: Sequence[Sequence[int]],
    compute: Callable[[list[Sequence[int]], int], FloatArray],
    *,
    budget: int,
    limit: int,
    width: int,
    min_rows: int = MIN_ROWS,
) -> FloatArray:
    """Compute a row of numbers for every token sequence, in budgeted batches, restored to order.

    Args:
        sequences: n token sequences, none longer than `limit`.
        compute: Called with `min_rows` sequences or more and what to pad them to; returns (rows, width).
        budget: Most padded tokens in a batch.
        limit: The model's longest sequence.
        width: Numbers per sequence.
        min_rows: Fewest rows of a batch. One is enough where every matrix product is over tokens (a batch has eight
            tokens at least), and none over sequences, as a classifier's head is.

    Returns:
        float32 of shape (n, width).
    """
    out = np.empty((len(sequences), width), np.float32)
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    for batch in token_budget_batches(lengths, budget, limit=limit):
        filled = fill_rows(batch.rows, min_rows)
        out[batch.rows] = compute([sequences[i] for i in filled], batch.length)[: len(batch.rows)]
    return out


def slices(weights: npt.ArrayLike, budget: int) -> Iterator[slice]:
    """Consecutive slices whose summed weight stays within a budget (a heavier single item stands alone)."""
    totals = np.cumsum(np.asarray(weights, np.int64))
    begin = 0
    while begin < len(totals):
        used = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, used + budget, side="right")))
        yield slice(begin, end)
        begin = end
