"""Batches: which examples stand together in a step, and the tensors made of them.

Everything here is a pure function of (lengths, settings, seed, epoch): a resumed run plans the same batches again and
skips those it has had. Three ways to fill a batch:

- `off`: one example a row, rows of like length together, padded to the longest of the batch;
- `isolated`: several whole examples a row, which cannot see one another (a block mask, positions restarted). Where
  all examples begin with the same prompt, it can stand once at the head of the row, seen by all of them
  (`share_prefix`): the same mathematics with a fraction of the tokens;
- `concat`: one stream of all tokens cut into rows, neighbours visible to each other, nothing padded: the habit of
  pretraining.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.training.tokens import TokenStore
from schemas.fingerprint import derive_seed

PACKINGS = ("off", "isolated", "concat")
IGNORE = -100  # what torch's cross entropy leaves out
PAD_SEGMENT = -1
_WINDOW = 2048  # examples that are packed together; larger wastes less and mixes less
_GROUP = 50  # batches sorted by length together (the habit of transformers' length grouping)


class Piece(NamedTuple):
    """A stretch of one example: tokens `start` to `stop` of example `number`."""

    number: int
    start: int
    stop: int


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Plans the batches of any epoch.

    Attributes:
        lengths: Tokens of every example of the store.
        numbers: The examples to use.
        batch_size: Rows per batch.
        max_length: Most tokens of a row.
        packing: `off`, `isolated` or `concat`.
        prefix: Length of the prompt that all examples of a row share; 0 = not shared. `isolated` only.
        seed: Of the run.
    """

    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    batch_size: int
    max_length: int
    packing: str = "off"
    prefix: int = 0
    seed: int = 0

    def batches(self, epoch: int, *, shuffle: bool = True) -> list[list[Row]]:
        """The batches of an epoch, in order. Every epoch has the same number of them."""
        rng = np.random.default_rng(derive_seed(self.seed, "batches", epoch))
        if self.packing == "off":
            return self._by_length(rng, shuffle)
        if self.packing == "concat":
            rows = self._stream(rng.permutation(self.numbers) if shuffle else self.numbers)
            return _cut(rows, self.batch_size)
        # Which examples share a row is settled once (rows hide them from each other, so it does not matter),
        # so that epochs have equally many rows; only the order of the rows changes.
        fixed = np.random.default_rng(derive_seed(self.seed, "packing"))
        rows = self._packed(fixed.permutation(self.numbers) if shuffle else self.numbers)
        order = rng.permutation(len(rows)) if shuffle else np.arange(len(rows))
        return _cut([rows[i] for i in order], self.batch_size)

    def _by_length(self, rng: np.random.Generator, shuffle: bool) -> list[list[Row]]:
        numbers = rng.permutation(self.numbers) if shuffle else self.numbers
        groups = [
            numbers[i : i + _GROUP * self.batch_size]
            for i in range(0, len(numbers), _GROUP * self.batch_size)
        ]
        batches = []
        for group in groups:
            ordered = group[np.argsort(-self.lengths[group], kind="stable")]
            rows: list[Row] = [(Piece(int(n), 0, int(self.lengths[n])),) for n in ordered]
            batches += _cut(rows, self.batch_size)
        if not shuffle:
            return batches
        # A last batch that is not full stays last: its place must not depend on the epoch.
        full, rest = [b for b in batches if len(b) == self.batch_size], batches[-1:]
        rest = rest if rest and len(rest[0]) < self.batch_size else []
        return [full[i] for i in rng.permutation(len(full))] + rest

    def _packed(self, numbers: npt.NDArray[np.int64]) -> list[Row]:
        """First fit decreasing, in windows of shuffled examples."""
        room = self.max_length - self.prefix
        rows: list[Row] = []
        for i in range(0, len(numbers), _WINDOW):
            window = numbers[i : i + _WINDOW]
            sizes = self.lengths[window] - self.prefix
            bins: list[list[Piece]] = []
            free: list[tuple[int, int]] = []  # (room left, bin), sorted
            for j in np.argsort(-sizes, kind="stable"):
                number, size = int(window[j]), int(sizes[j])
                at = bisect.bisect_left(free, (size, -1))  # the fullest bin it fits in
                if at < len(free):
                    left, which = free.pop(at)
                else:
                    left, which = room, len(bins)
                    bins.append([])
                bins[which].append(Piece(number, self.prefix, int(self.lengths[number])))
                bisect.insort(free, (left - size, which))
            rows += [tuple(b) for b in bins]
        return rows

    def _stream(self, numbers: npt.NDArray[np.int64]) -> list[Row]:
        rows: list[Row] = []
        row: list[Piece] = []
        room = self.max_length
        for n in numbers:
            start, length = 0, int(self.lengths[n])
            while start < length:
                take = min(room, length - start)
                row.append(Piece(int(n), start, start + take))
                start, room = start + take, room - take
                if room == 0:
                    rows.append(tuple(row))
                    row, room = [], self.max_length
        return [*rows, tuple(row)] if row else rows


@dataclass(frozen=True)
class Collator:
    """Makes a batch's tensors; picklable, deterministic.

    Attributes:
        store: Where the tokens are.
        pad: Token id that fills rows up; its value is never seen.
        packing: As in `BatchPlan`.
        prefix: As in `BatchPlan`.
    """

    store: TokenStore
    pad: int
    packing: str = "off"
    prefix: int = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Build the tensors of b rows.

        Returns:
            `input_ids`, `position_ids`, `shift_labels` (the NEXT token where it carries the loss, else -100) and
            `segments`, all int64 of shape (b, t). Tokens see earlier tokens of their own segment, and of segment 0
            (a shared prefix); `PAD_SEGMENT` marks padding.
        """
        import torch

        built = [self._row(row) for row in rows]
        width = max(len(ids) for ids, _, _, _ in built)
        fills = (self.pad, 0, IGNORE, PAD_SEGMENT)
        arrays = [np.full((len(built), width), fill, np.int64) for fill in fills]
        for i, parts in enumerate(built):
            for array, part in zip(arrays, parts, strict=True):
                array[i, : len(part)] = part
        names = ("input_ids", "position_ids", "shift_labels", "segments")
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    def _row(self, row: Row) -> tuple[npt.NDArray[np.int64], ...]:
        head = np.asarray(self.store.prefix[: self.prefix], np.int64)
        ids, positions = [head], [np.arange(len(head))]
        labels, segments = [np.full(len(head), IGNORE)], [np.zeros(len(head), np.int64)]
        seen = 0
        for k, (number, start, stop) in enumerate(row, 1):
            tokens, spans = self.store[number]
            next_token = np.full(len(tokens), IGNORE)
            for a, b in spans:
                a = max(a, 1)  # nothing predicts an example's first token
                next_token[a - 1 : b - 1] = tokens[a:b]
            ids.append(tokens[start:stop])
            labels.append(next_token[start:stop])
            together = self.packing == "concat"
            first = seen if together else start
            positions.append(np.arange(first, first + stop - start))
            segments.append(np.full(stop - start, 1 if together else k))
            seen += stop - start
        return tuple(np.concatenate(part) for part in (ids, positions, labels, segments))


def block_mask(segments: Any) -> Any:
    """Which token sees which: earlier ones of its own segment and of segment 0; padding sees and is seen by itself alone.

    Args:
        segments: int64 tensor of shape (b, t).

    Returns:
        Boolean tensor of shape (b, 1, t, t); True where row (query) sees column (key).
    """
    import torch

    t = segments.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    shared = (segments[:, None, :] == 0) & (segments[:, :, None] != PAD_SEGMENT)
    # Padding sees (earlier) padding: a row of nothing but False would make softmax NaN.
    return ((same | shared) & causal)[:, None]


def _cut(rows: Sequence[Row], size: int) -> list[list[Row]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
