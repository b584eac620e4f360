"""The token store: examples tokenised once, kept as memory-mapped Arrow files, one per shard.

A trainer shuffles, packs and resumes by example number; so examples are tokenised once, shard by shard, into a folder
that a killed run finds again. Only lengths are held in memory (four bytes an example); tokens are mapped from disk.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from models.training.data import Example, ExampleEncoder, is_held_out
from models.training.shards import ShardReader
from schemas.errors import InputError
from schemas.fingerprint import fingerprint

_SCHEMA = pa.schema(
    [
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("spans", pa.list_(pa.int32()), nullable=False),  # start, end, start, end ...
        pa.field("held_out", pa.bool_(), nullable=False),
    ]
)
_EXAMPLES_PER_BATCH = 4096
IntArray = npt.NDArray[np.int64]


class TokenStore:
    """Tokenised examples, by number.

    Attributes:
        lengths: Tokens of each example, shape (n,).
        train: Numbers of the examples to train on.
        held_out: Numbers of those held out for evaluation.
        counts: What encoding counted (rows, examples, tokens, loss_tokens, empty, too_long, chunked).
        prefix: Token ids with which every example begins and which carry no loss: a prompt's fixed part.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.counts: Counter[str] = Counter()
        prefix: list[int] | None = None
        self._ids: list[_Lists] = []
        self._spans: list[_Lists] = []
        lengths, held_out = [], []
        for path in files:
            notes = orjson.loads(path.with_suffix(".json").read_bytes())
            self.counts.update(notes["counts"])
            if notes["counts"].get("examples"):
                prefix = common_prefix(prefix, notes["prefix"])
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            for i in range(file.num_record_batches):
                batch = file.get_batch(i)
                self._ids.append(_Lists.of(batch.column(0)))
                self._spans.append(_Lists.of(batch.column(1)))
                lengths.append(np.diff(self._ids[-1].offsets))
                held_out.append(batch.column(2).to_numpy(zero_copy_only=False))
        self.prefix: list[int] = prefix or []
        self.lengths: IntArray = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        side = np.concatenate([np.zeros(0, bool), *held_out])
        self.train: IntArray = np.flatnonzero(~side)
        self.held_out: IntArray = np.flatnonzero(side)
        self._starts = np.cumsum([0, *(len(a.offsets) - 1 for a in self._ids)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[IntArray, list[tuple[int, int]]]:
        """Token ids of an example and its (start, end) loss ranges."""
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = int(number - self._starts[chunk])
        flat = self._spans[chunk].item(row).tolist()
        return self._ids[chunk].item(row).astype(np.int64), list(zip(flat[::2], flat[1::2], strict=True))

    def loss_tokens(self, numbers: IntArray) -> int:
        """Tokens that carry the loss in some of the examples."""
        return sum(end - start for n in numbers for start, end in self[int(n)][1])


def build_store(
    reader: ShardReader,
    encoder: ExampleEncoder,
    folder: Path,
    *,
    fingerprints: Sequence[str],
    key: dict[str, Any],
    eval_fraction: float,
    notify: Callable[[str], None] = lambda line: None,
) -> TokenStore:
    """Tokenise a listing into `folder`, keeping what an earlier run has finished there.

    Args:
        reader: Reads the columns `encoder` needs.
        encoder: Makes the examples.
        folder: Where the files go; each appears by rename when its shard is done.
        fingerprints: One per shard, of its bytes.
        key: What else the tokens depend on (tokenizer, form, max_length).
        eval_fraction: Share of the contents held out.
        notify: Called with one line per shard tokenised.

    Raises:
        InputError: A shard cannot be read, or there is no example in any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, content in enumerate(fingerprints):
        tag = fingerprint(content, orjson.dumps(key, option=orjson.OPT_SORT_KEYS), str(eval_fraction))
        path = folder / f"{index:05d}-{tag[:16]}.arrow"
        files.append(path)
        if not path.with_suffix(".json").exists():
            counts = _write(reader, index, encoder, path, eval_fraction)
            name = reader.listing.shards[index].name
            notify(f"tokenised {name}: {counts['examples']:,} examples, {counts['tokens']:,} tokens")
    store = TokenStore(files)
    if len(store.train) == 0:
        hint = (
            f"; {store.counts['too_long']:,} are longer than --max-length" if store.counts["too_long"] else ""
        )
        raise InputError(
            f"{reader.listing.source}: no example to train on in {store.counts['rows']:,} rows{hint}"
        )
    return store


def common_prefix(one: Sequence[int] | None, other: Sequence[int]) -> list[int]:
    """The token ids both begin with; None stands for "no example seen yet"."""
    if one is None:
        return list(other)
    n = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return list(one[:n])


def _write(
    reader: ShardReader, index: int, encoder: ExampleEncoder, path: Path, eval_fraction: float
) -> Counter[str]:
    encoder.counts = Counter()
    prefix: list[int] | None = None
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            pending: list[Example] = []
            for batch in reader.read_shard(index):
                pending += encoder(batch)
                if len(pending) >= _EXAMPLES_PER_BATCH:
                    prefix = _fold(prefix, pending)
                    writer.write_batch(_batch(pending, eval_fraction))
                    pending = []
            if pending:
                prefix = _fold(prefix, pending)
                writer.write_batch(_batch(pending, eval_fraction))
        temporary.replace(path)
        # The notes come last and stand for "this shard is done".
        temporary.write_bytes(orjson.dumps({"counts": dict(encoder.counts), "prefix": prefix or []}))
        temporary.replace(path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)
    return Counter(encoder.counts)


def _fold(prefix: list[int] | None, examples: Sequence[Example]) -> list[int]:
    for example in examples:
        # One token less than where the loss begins: that token's successor differs between examples.
        first = example.spans[0][0] if example.spans else len(example.ids)
        prefix = common_prefix(prefix, example.ids[: max(0, first - 1)])
    return prefix or []


def _batch(examples: Sequence[Example], eval_fraction: float) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            pa.array([e.ids for e in examples], pa.list_(pa.int32())),
            pa.array([[x for span in e.spans for x in span] for e in examples], pa.list_(pa.int32())),
            pa.array([is_held_out(e.key, eval_fraction) for e in examples], pa.bool_()),
        ],
        schema=_SCHEMA,
    )


class _Lists(NamedTuple):
    """A list column as two flat arrays, so that reading an item makes no Arrow object."""

    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]

    @classmethod
    def of(cls, array: pa.ListArray) -> _Lists:
        return cls(array.values.to_numpy(), array.offsets.to_numpy())

    def item(self, row: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]
