"""What each document of a batch is to each query, by id: positives, negatives, and what must be neither.

A document stands once in a batch, however many queries bring it. It is a negative of every query it is not masked for: the
mask holds whatever any judge found good for the query, so another query's positive is pushed away only where it may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NONE = -1  # fills ragged rows up


@dataclass(frozen=True)
class GroupIds:
    """The groups of b queries, by the numbers of their documents.

    Attributes:
        documents: int64 (m,): the documents of the batch, each once.
        positives: int64 (b, p): best first, filled up with -1.
        negatives: int64 (b, n): the query's own, filled up with -1.
        masked: int64 (b, k): must not be its negatives; filled up with -1.
        positive_teacher: float (b, p): the teacher's scores, NaN where there is none; None without a teacher.
        negative_teacher: float (b, n).
    """

    documents: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    masked: torch.Tensor
    positive_teacher: torch.Tensor | None = None
    negative_teacher: torch.Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """What `GroupScores` needs beside scores: masks bool (b, m), `first` int64 (b,), teacher float (b, m) or None."""

    positive: torch.Tensor
    negative: torch.Tensor
    first: torch.Tensor
    teacher: torch.Tensor | None = None


def make_targets(groups: GroupIds, *, in_batch: bool = True) -> Targets:
    """Lay the groups over the documents of the batch.

    Args:
        groups: With every drawn positive among `documents`.
        in_batch: Take the other queries' documents for negatives too; else a query's own only.
    """
    finder = _Columns(groups.documents)
    shape = (len(groups.positives), len(groups.documents))
    device = groups.documents.device
    positive_at, negative_at = finder(groups.positives), finder(groups.negatives)
    positive = _scatter(shape, positive_at, device)
    if in_batch:
        negative = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        negative = _scatter(shape, negative_at, device)
    negative &= ~_scatter(shape, finder(groups.masked), device) & ~positive
    # Positives are a list in order of quality: the first that is there is the best.
    rank = torch.where(positive_at >= 0, 0, 1).argmin(dim=1, keepdim=True)
    first = positive_at.gather(1, rank).squeeze(1).clamp(min=0)
    teacher = None
    if groups.positive_teacher is not None and groups.negative_teacher is not None:
        teacher = torch.full(shape, float("nan"), device=device)
        for at, values in (
            (negative_at, groups.negative_teacher),
            (positive_at, groups.positive_teacher),
        ):
            rows, slots = torch.nonzero(at >= 0, as_tuple=True)
            teacher[rows, at[rows, slots]] = values[rows, slots].to(teacher.dtype)
    return Targets(positive, negative, first, teacher)


class _Columns:
    """Finds the column of a document by its number."""

    def __init__(self, documents: torch.Tensor) -> None:
        self._sorted, self._order = documents.sort()

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """Columns, int64 of the shape of `numbers`; -1 for what is not in the batch."""
        if not numbers.numel() or not self._sorted.numel():
            return torch.full_like(numbers, NONE)
        at = torch.searchsorted(self._sorted, numbers.contiguous()).clamp(max=len(self._sorted) - 1)
        return torch.where(self._sorted[at] == numbers, self._order[at], NONE)


def _scatter(shape: tuple[int, int], columns: torch.Tensor, device: torch.device) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    rows, slots = torch.nonzero(columns >= 0, as_tuple=True)
    mask[rows, columns[rows, slots]] = True
    return mask
