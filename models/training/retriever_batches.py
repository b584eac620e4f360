"""Batches of groups: which queries a step sees, which of their documents are drawn, and the tensors made of them.

Pure functions of (groups, settings, seed, epoch), so a resumed run makes the batches it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.training.groups import DrawPolicy, draw_group
from models.training.retriever_data import GroupData
from schemas.fingerprint import derive_seed

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.integer[Any]]
_NOTHING = np.zeros(0, np.int64)


class GroupRow(NamedTuple):
    """A row of a batch: a group, as an epoch draws it."""

    number: int
    epoch: int


@dataclass(frozen=True)
class GroupPlan:
    """Plans the batches of any epoch of a stage.

    Attributes:
        numbers: Rows of the stage.
        batch_size: Queries a batch.
        seed: Of the run.
        stage: Name of the stage, so that stages are shuffled apart.
    """

    numbers: IntArray
    batch_size: int
    seed: int
    stage: str = ""

    def batches(self, epoch: int, *, shuffle: bool = True) -> list[list[GroupRow]]:
        """The batches of an epoch; every epoch has equally many, the last may be smaller."""
        order = self.numbers
        if shuffle:
            order = np.random.default_rng(derive_seed(self.seed, self.stage, "batches", epoch)).permutation(
                order
            )
        rows = [GroupRow(int(n), epoch) for n in order]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]


@dataclass(frozen=True)
class TokenTable:
    """Token ids of many texts in one array; text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: TokenIds
    offsets: IntArray

    def __getitem__(self, i: int) -> TokenIds:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> IntArray:
        """Tokens of every text."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], vocabulary: int) -> TokenTable:
        """From sequences, in two bytes a token where the vocabulary fits."""
        kind = np.uint16 if vocabulary <= 1 << 16 else np.int32
        sizes = np.fromiter(map(len, sequences), np.int64, len(sequences))
        ids = np.fromiter((t for one in sequences for t in one), kind, int(sizes.sum()))
        return cls(ids, np.concatenate([[0], np.cumsum(sizes)]))


@dataclass(frozen=True)
class GroupCollator:
    """Draws the groups of a batch and makes its tensors; picklable, deterministic.

    Attributes:
        groups: All of them.
        policy: How they are drawn.
        seed: Of the run.
        features: Makes what the model takes of query rows and document numbers.
        in_batch: Documents of other queries are negatives.
        mask: Keep masked documents out of the negatives.
        teacher: Give the grades as a teacher's scores.
        distributed: Other processes bring documents too: masks are given whole.
        all_documents: Every document of the groups is in every batch, instead of those that are drawn.
    """

    groups: GroupData
    policy: DrawPolicy
    seed: int
    features: Callable[[IntArray, IntArray], tuple[dict[str, Any], IntArray]]
    in_batch: bool = True
    mask: bool = True
    teacher: bool = False
    distributed: bool = False
    all_documents: bool = False

    def __call__(self, rows: Sequence[GroupRow]) -> dict[str, Any]:
        """Tensors of b groups.

        Returns:
            What `features` makes; `groups`: a dict of the fields of `models.losses.targets.GroupIds`; `usable`:
            int64 (), queries with a positive and a negative.
        """
        import torch

        drawn = [self._draw(row) for row in rows]
        if self.all_documents:
            every = np.arange(len(self.groups.document_ids), dtype=np.int64)
        else:
            every = np.unique(np.concatenate([np.concatenate(d[:2]) for d in drawn]))
        numbers = np.fromiter((row.number for row in rows), np.int64, len(rows))
        made, order = self.features(numbers, every)
        masks = [self.groups.mask[row.number] if self.mask else _NOTHING for row in rows]
        if not self.distributed:  # what is not in the batch needs no masking
            masks = [m[np.isin(m, every, assume_unique=True, kind="sort")] for m in masks]
        fields: dict[str, Any] = {
            "documents": torch.from_numpy(order),
            "positives": _pad([d[0] for d in drawn]),
            "negatives": _pad([d[1] for d in drawn]),
            "masked": _pad(masks),
        }
        if self.teacher:
            fields["positive_teacher"] = _pad([d[2] for d in drawn])
            fields["negative_teacher"] = _pad([d[3] for d in drawn])
        usable = sum(self._usable(d, m, len(every)) for d, m in zip(drawn, masks, strict=True))
        return {**made, "groups": fields, "usable": torch.tensor(usable)}

    def _usable(self, drawn: tuple[IntArray, ...], masked: IntArray, documents: int) -> bool:
        """Whether a query has a negative; `masked` are documents of the batch, once each (a positive is always drawn)."""
        if self.in_batch:  # other processes bring more
            return self.distributed or documents > len(np.union1d(masked, drawn[0]))
        return bool((~np.isin(drawn[1], np.union1d(masked, drawn[0]))).any())

    def _draw(self, row: GroupRow) -> tuple[IntArray, ...]:
        """Documents of the drawn positives and negatives; and, for a teacher, their grades."""
        groups, n = self.groups, row.number
        positives, negatives = groups.positives[n], groups.negatives[n]
        draw = draw_group(
            groups.row_name(n),
            len(positives),
            0 if self.all_documents else len(negatives),
            seed=self.seed,
            epoch=row.epoch,
            policy=self.policy,
        )
        chosen = np.array(draw.positives, np.int64)
        # Where all documents are candidates its own are among them; a teacher's grades of them still count.
        others = np.arange(len(negatives)) if self.all_documents else np.array(draw.negatives, np.int64)
        sides: tuple[Any, ...] = (positives[chosen], negatives[others])
        if not self.teacher:
            return sides
        good = groups.positive_grades[groups.positives.offsets[n] + chosen]
        # A negative nobody judged has the grade 0: that is what training on it means.
        bad = np.nan_to_num(groups.negative_grades[groups.negatives.offsets[n] + others])
        return (*sides, good, bad)


@dataclass(frozen=True)
class TextFeatures:
    """Token tensors of a batch's queries and documents, the documents in chunks of like length.

    Attributes:
        queries: Tokens of each row's query.
        documents: Tokens of each document.
        pad: Padding token id.
        chunk: Documents a chunk.
    """

    queries: TokenTable
    documents: TokenTable
    pad: int
    chunk: int

    def __call__(self, rows: IntArray, documents: IntArray) -> tuple[dict[str, Any], IntArray]:
        """`queries` and `documents`: lists of chunks (ids, mask), int64 (n, t) each; and the documents' order."""
        order = documents[np.argsort(-self.documents.lengths[documents], kind="stable")]
        return {
            "queries": _chunks(self.queries, rows, self.pad, self.chunk),
            "documents": _chunks(self.documents, order, self.pad, self.chunk),
        }, order


@dataclass(frozen=True)
class QueryFeatures:
    """Token tensors of a batch's queries and vectors of its documents, for queries trained against vectors.

    Attributes:
        queries: Tokens of each row's query.
        documents: float32 (documents, d).
        pad: Padding token id.
        chunk: Queries a chunk.
    """

    queries: TokenTable
    documents: FloatArray
    pad: int
    chunk: int

    def __call__(self, rows: IntArray, documents: IntArray) -> tuple[dict[str, Any], IntArray]:
        """`queries`: chunks (ids, mask), int64 (n, t) each; `documents` float32 (m, d), in their order."""
        import torch

        return {
            "queries": _chunks(self.queries, rows, self.pad, self.chunk),
            "documents": torch.from_numpy(self.documents[documents]),
        }, documents


@dataclass(frozen=True)
class VectorFeatures:
    """Vectors of a batch's queries and documents, for heads over a frozen encoder.

    Attributes:
        queries: float32 (rows, d).
        documents: float32 (documents, d).
    """

    queries: FloatArray
    documents: FloatArray

    def __call__(self, rows: IntArray, documents: IntArray) -> tuple[dict[str, Any], IntArray]:
        """`queries` float32 (b, d) and `documents` float32 (m, d); the documents stay in their order."""
        import torch

        return {
            "queries": torch.from_numpy(self.queries[rows]),
            "documents": torch.from_numpy(self.documents[documents]),
        }, documents


def _chunks(table: TokenTable, numbers: IntArray, pad: int, chunk: int) -> list[tuple[Any, Any]]:
    """Padded ids and masks of some texts, so many together."""
    import torch

    made = []
    for start in range(0, len(numbers), chunk):
        sequences = [table[n] for n in numbers[start : start + chunk]]
        width = max(map(len, sequences))
        ids = np.full((len(sequences), width), pad, np.int64)
        mask = np.zeros((len(sequences), width), np.int64)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = sequence
            mask[i, : len(sequence)] = 1
        made.append((torch.from_numpy(ids), torch.from_numpy(mask)))
    return made


def _pad(lists: Sequence[npt.NDArray[Any]]) -> Any:
    """Ragged lists as a matrix: numbers filled up with -1, scores with NaN."""
    import torch

    width = max((len(one) for one in lists), default=0)
    floats = bool(lists) and np.issubdtype(lists[0].dtype, np.floating)
    out = np.full((len(lists), width), np.nan if floats else -1, np.float32 if floats else np.int64)
    for i, one in enumerate(lists):
        out[i, : len(one)] = one
    return torch.from_numpy(out)
