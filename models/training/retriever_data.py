"""Training groups in memory: numbers for documents, ragged lists as flat arrays, texts once each.

Nothing is copied per group: a document that is a candidate of a hundred queries stands here once.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from models.training.shards import ShardListing, ShardReader
from schemas.errors import InputError

COLUMNS = ["query_id", "query", "stage", "stage_number", "positives", "negatives"]
_BATCH_ROWS = 512  # a group with a hundred candidates and their texts is a large row
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ragged:
    """Lists of numbers: list i is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: IntArray
    values: IntArray

    def __getitem__(self, i: int) -> IntArray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """Length of every list."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """From lists."""
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        values = np.fromiter((v for one in lists for v in one), np.int64, int(sizes.sum()))
        return cls(np.concatenate([[0], np.cumsum(sizes)]), values)


@dataclass(frozen=True)
class GroupData:
    """Groups of all stages.

    Attributes:
        query_ids: Of each row.
        queries: Text of each row's query; None where the groups hold ids only.
        stages: Names, in the order they are trained.
        stage: int64: number, in `stages`, of each row's.
        document_ids: Every document, once.
        documents: Its text, title first; None where the groups hold ids only.
        positives: Documents of each row, best first.
        negatives: The same.
        positive_grades: float32 beside `positives.values`; NaN where there is no grade.
        negative_grades: The same beside the negatives.
        mask: Documents that must not be a row's negatives, those known here.
        labels: (stage, label source, annotator) -> positives.
    """

    query_ids: list[str]
    queries: list[str | None]
    stages: list[str]
    stage: IntArray
    document_ids: list[str]
    documents: list[str | None]
    positives: Ragged
    negatives: Ragged
    positive_grades: FloatArray
    negative_grades: FloatArray
    mask: Ragged
    labels: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def rows(self, stage: int) -> IntArray:
        """Numbers of a stage's rows."""
        return np.flatnonzero(self.stage == stage)

    def row_name(self, row: int) -> str:
        """What names a row in every draw, as `models.training.groups.row_name` does."""
        return f"{self.stages[int(self.stage[row])]}\x1f{self.query_ids[row]}"


class _Documents:
    """Numbers for document ids, in order of appearance, and the text of each."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.texts: list[str | None] = []

    def add(self, items: pa.StructArray) -> IntArray:
        """Numbers of the structs' documents."""
        encoded = pc.struct_field(items, "doc_id").dictionary_encode()
        indices = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        distinct = encoded.dictionary.to_pylist()
        new = [i for i, name in enumerate(distinct) if name not in self.numbers]
        if new:
            first = np.zeros(len(distinct), np.int64)
            values, at = np.unique(indices, return_index=True)
            first[values] = at
            picked = items.take(pa.array(first[new]))
            titles, texts = (pc.struct_field(picked, f).to_pylist() for f in ("title", "text"))
            for i, title, text in zip(new, titles, texts, strict=True):
                self.numbers[distinct[i]] = len(self.texts)
                self.texts.append(join_title(title, text))
        numbers = np.fromiter((self.numbers[d] for d in distinct), np.int64, len(distinct))
        return numbers[indices] if len(indices) else np.zeros(0, np.int64)


def join_title(title: str | None, text: str | None) -> str | None:
    """A document as retrievers read it: its title, a space, its text. None where there is no text."""
    if text is None:
        return None
    return f"{title} {text}".strip() if title else text


def read_groups(listing: ShardListing) -> GroupData:
    """Read the groups of a folder, and its mask.

    Args:
        listing: Of the output of `tamis groups`, or of other shards with its columns.

    Raises:
        InputError: They are no groups, or one has no positive.
    """
    documents = _Documents()
    ids: list[str] = []
    queries: list[str | None] = []
    stage_of: list[str] = []
    order: dict[str, int] = {}
    sizes: dict[str, list[IntArray]] = {"positives": [], "negatives": []}
    values: dict[str, list[IntArray]] = {"positives": [], "negatives": []}
    grades: dict[str, list[FloatArray]] = {"positives": [], "negatives": []}
    labels: Counter[tuple[str, str, str]] = Counter()
    for batch in ShardReader(listing, COLUMNS, batch_rows=_BATCH_ROWS):
        ids += batch.column("query_id").to_pylist()
        queries += batch.column("query").to_pylist()
        stages = batch.column("stage").to_pylist()
        stage_of += stages
        order.update(zip(stages, batch.column("stage_number").to_pylist(), strict=True))
        for side in sizes:
            column = batch.column(side)
            if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
                raise InputError(
                    f"{listing.source}: column '{side}' holds no lists; pass an output of `tamis groups`"
                )
            lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
            items = column.flatten()
            sizes[side].append(lengths.astype(np.int64))
            values[side].append(documents.add(items))
            grade = pc.struct_field(items, "grade").cast(pa.float32())
            grades[side].append(grade.fill_null(float("nan")).to_numpy(zero_copy_only=False))
            if side == "positives":
                _count_labels(labels, stages, lengths, items)
    if not ids:
        raise InputError(f"{listing.source} holds no group")
    lists = {side: _ragged(sizes[side], values[side]) for side in sizes}
    empty = np.flatnonzero(lists["positives"].lengths == 0)
    if len(empty):
        raise InputError(f"query '{ids[empty[0]]}' has no positive; `tamis groups` drops such queries")
    names = sorted(order, key=lambda s: order[s])
    place = {name: i for i, name in enumerate(names)}
    return GroupData(
        query_ids=ids,
        queries=queries,
        stages=names,
        stage=np.fromiter((place[s] for s in stage_of), np.int64, len(stage_of)),
        document_ids=list(documents.numbers),
        documents=documents.texts,
        positives=lists["positives"],
        negatives=lists["negatives"],
        positive_grades=np.concatenate(grades["positives"]),
        negative_grades=np.concatenate(grades["negatives"]),
        mask=_read_mask(listing, ids, documents.numbers, lists["positives"]),
        labels=labels,
    )


def _count_labels(
    labels: Counter[tuple[str, str, str]], stages: list[str], lengths: npt.NDArray[Any], items: pa.StructArray
) -> None:
    owners = np.repeat(np.array(stages, object), lengths)
    parts = (pc.struct_field(items, f).to_pylist() for f in ("label_source", "annotator"))
    labels.update(zip(owners.tolist(), *parts, strict=True))


def _read_mask(listing: ShardListing, ids: list[str], numbers: dict[str, int], positives: Ragged) -> Ragged:
    """The mask of every row: what the side table names, and its positives, drawn or not."""
    named: dict[str, list[int]] = {}
    for path in mask_files(listing):
        for batch in _parquet(listing, path):
            for query, docs in zip(
                *(batch.column(c).to_pylist() for c in ("query_id", "doc_ids")), strict=True
            ):
                named[query] = [numbers[d] for d in docs if d in numbers]
    return Ragged.of([sorted({*named.get(query, ()), *positives[i].tolist()}) for i, query in enumerate(ids)])


def mask_files(listing: ShardListing) -> list[str]:
    """Paths, within the folder, of the side tables that mask false negatives."""
    tables = (listing.manifest or {}).get("tables", [])
    return [t["path"] for t in tables if str(t["path"]).startswith("mask/")]


def _parquet(listing: ShardListing, path: str) -> Any:
    import fsspec
    import pyarrow.parquet as pq

    url = posixpath.join(listing.source.rstrip("/"), path)
    with fsspec.open(url, "rb", **listing.options) as stream:
        yield from pq.ParquetFile(stream).iter_batches()


def _ragged(sizes: list[IntArray], values: list[IntArray]) -> Ragged:
    lengths = np.concatenate(sizes)
    return Ragged(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(values))
