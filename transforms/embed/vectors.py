"""Vectors as Arrow columns, and reading them back from an output, some rows at a time.

An embedding attribute is `fixed_size_list<float | halffloat | int8>[d]`. A row that has no vector (empty text) holds
a list of d nulls: a null list would be the natural thing, but pyarrow cannot read null fixed-size lists back from
Parquet before version 26 (apache/arrow#35692). Beside it, `<name>_info` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import InputError, OutputError
from transforms.shards.files import Folder, sidecar_name
from transforms.shards.finish import MANIFEST

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Store = Literal["float32", "float16", "int8"]

INFO_SUFFIX, SCALE_SUFFIX = "_info", "_scale"
OK, EMPTY, NULL = "ok", "empty", "null"
INFO_TYPE = pa.struct(
    [
        pa.field("status", pa.string()),  # ok | truncated | mean | empty | null
        pa.field("tokens", pa.int32()),
        pa.field("windows", pa.int32()),
        pa.field("norm", pa.float32()),
    ]
)
_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
_NUMPY = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def to_arrow(vectors: FloatArray, missing: BoolArray, store: Store) -> tuple[pa.Array, pa.Array | None]:
    """Vectors as a column.

    Args:
        vectors: float32 (n, d).
        missing: bool (n,): rows that have no vector.
        store: Type of the numbers. `int8` divides each vector by a scale of its own, its largest absolute number over
            127, and rounds to even.

    Returns:
        The column, and for `int8` the scales (float32, null where there is no vector).

    Raises:
        ValueError: A number does not fit into float16.
    """
    n, d = vectors.shape
    scales = None
    if store == "int8":
        peak = np.abs(vectors).max(axis=1) if d else np.zeros(n, np.float32)
        scale = np.where(peak > 0, peak / np.float32(127), np.float32(1)).astype(np.float32)
        numbers: npt.NDArray[Any] = np.rint(vectors / scale[:, None]).astype(np.int8)
        scales = pa.array(scale, mask=missing)
    else:
        numbers = np.ascontiguousarray(vectors.astype(_NUMPY[store]))
        if store == "float16" and not np.isfinite(numbers[~missing]).all():
            raise ValueError("a vector holds a number too large for float16; store it as float32")
    mask = np.repeat(missing, d) if missing.any() else None
    flat = pa.array(numbers.reshape(-1), _TYPES[store], mask=mask)
    return pa.FixedSizeListArray.from_arrays(flat, d), scales


def from_arrow(values: pa.Array, scales: pa.Array | None = None) -> tuple[FloatArray, BoolArray]:
    """A column as vectors.

    Args:
        values: n lists of d numbers, as `to_arrow` makes them (null lists are understood too).
        scales: The scales of an int8 column.

    Returns:
        float32 (n, d), null rows as zeros; bool (n,): rows that have no vector.
    """
    n, d = len(values), values.type.list_size
    there = values.is_valid().to_numpy(zero_copy_only=False)
    flat = values.flatten()  # without the null lists
    whole = np.ones(int(there.sum()), bool)
    if flat.null_count:
        whole = flat.is_valid().to_numpy(zero_copy_only=False).reshape(-1, d).all(axis=1)
        if pa.types.is_float16(flat.type):
            flat = flat.cast(pa.float32())  # Arrow fills no nulls of half floats
        flat = flat.fill_null(0)
    numbers = flat.to_numpy(zero_copy_only=False).reshape(-1, d)
    vectors = np.zeros((n, d), np.float32)
    vectors[there] = np.where(whole[:, None], numbers, 0)
    missing = ~there
    missing[there] = ~whole
    if scales is not None:
        vectors *= scales.fill_null(1).to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
    return vectors, missing


class Block(NamedTuple):
    """A stretch of vectors of one shard, as they lie on disk together.

    Attributes:
        shard: Name of the shard.
        group: Row group of its sidecars.
        position: Number, in `data/<shard>`, of the first row.
        rows: Rows, those without a vector included.
        first: Ordinal of the first vector among all vectors of the output.
        vectors: How many rows have a vector.
    """

    shard: str
    group: int
    position: int
    rows: int
    first: int
    vectors: int


class Place(NamedTuple):
    """Where a hit lies: its id, its shard, and its row in `data/<shard>`."""

    id: str
    shard: str
    position: int


class VectorBatch(NamedTuple):
    """Vectors that were read: their rows in `data/<shard>` (int64), and float32 (n, d)."""

    shard: str
    positions: IntArray
    vectors: FloatArray


class VectorShards:
    """The embeddings of a finished output; nothing is held but what is being looked at.

    Args:
        url: Output of `tamis embed`, local or any fsspec URL.
        attribute: Which embedding; None takes the one the job wrote.
        options: fsspec options.

    Raises:
        OutputError: It is not a finished output, or has no such embedding.
    """

    def __init__(
        self, url: str, attribute: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Folder(url, **(options or {}))
        if not self.folder.exists(MANIFEST):
            raise OutputError(f"{url} is not a finished tamis output; pass the --output of `tamis embed`")
        self.manifest: dict[str, Any] = orjson.loads(self.folder.read(MANIFEST))
        self.attribute = attribute or str(self.manifest.get("config", {}).get("attribute", "embedding"))
        made = self.manifest.get("outputs", {}).get("attributes", [])
        if self.attribute not in made or self.attribute + INFO_SUFFIX not in made:
            has = ", ".join(made) or "none"
            raise OutputError(
                f"{url} has no embedding '{self.attribute}' (its attributes: {has}); run `tamis embed` first"
            )
        self.shards = [s["path"] for s in self.manifest["shards"] if not s.get("error")]
        self._scaled = self.attribute + SCALE_SUFFIX in made
        self.dimension = self._dimension()

    def sidecar(self, shard: str, suffix: str = "") -> str:
        """Path of the sidecar of a shard that holds the vectors (or, with a suffix, what belongs to them)."""
        return f"attributes/{self.attribute}{suffix}/{sidecar_name(shard)}"

    def ids(self) -> Iterator[tuple[Block, pa.Array, BoolArray]]:
        """All blocks in order, with the ids of their rows and which of them have a vector; no vector is read."""
        ordinal = 0
        for shard in self.shards:
            position = 0
            with self._open(shard, INFO_SUFFIX) as file:
                for group in range(file.metadata.num_row_groups):
                    table = file.read_row_group(group, columns=["id", "value.status"], use_threads=False)
                    status = pc.struct_field(table.column("value").combine_chunks(), "status")
                    absent = pc.is_in(status, value_set=pa.array([EMPTY, NULL]))
                    present = ~absent.to_numpy(zero_copy_only=False)
                    count = int(present.sum())
                    block = Block(shard, group, position, table.num_rows, ordinal, count)
                    yield block, table.column("id").combine_chunks(), present
                    position += table.num_rows
                    ordinal += count

    def read(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, VectorBatch]]:
        """The vectors of blocks, one block at a time; shards are opened once for neighbouring blocks."""
        at = 0
        while at < len(blocks):
            shard = blocks[at].shard
            end = at
            while end < len(blocks) and blocks[end].shard == shard:
                end += 1
            with self._open(shard) as file:
                for block in blocks[at:end]:
                    yield block, self._read(file, block)
            at = end

    def batches(self) -> Iterator[VectorBatch]:
        """All vectors, in the order of the manifest's shards."""
        for block, _, _ in self.ids():
            with self._open(block.shard) as file:
                yield self._read(file, block)

    def locate(self, ordinals: IntArray) -> dict[int, Place]:
        """Where vectors lie, by ordinal; ids are read, vectors are not."""
        wanted = np.unique(ordinals[ordinals >= 0])
        found: dict[int, Place] = {}
        for block, ids, present in self.ids():
            mine = wanted[(wanted >= block.first) & (wanted < block.first + block.vectors)]
            rows = np.flatnonzero(present)
            for ordinal in mine.tolist():
                row = int(rows[ordinal - block.first])
                found[ordinal] = Place(ids[row].as_py(), block.shard, block.position + row)
        return found

    def _read(self, file: pq.ParquetFile, block: Block) -> VectorBatch:
        values = file.read_row_group(block.group, columns=["value"], use_threads=False).column("value")
        scales = None
        if self._scaled:
            with self._open(block.shard, SCALE_SUFFIX) as other:
                table = other.read_row_group(block.group, columns=["value"], use_threads=False)
                scales = table.column("value").combine_chunks()
        vectors, missing = from_arrow(_one(values), scales)
        if len(vectors) != block.rows or int((~missing).sum()) != block.vectors:
            raise InputError(
                f"{self.sidecar(block.shard)} does not match {self.sidecar(block.shard, INFO_SUFFIX)}; "
                "remove the output and embed again"
            )
        positions = block.position + np.flatnonzero(~missing)
        return VectorBatch(block.shard, positions, vectors[~missing] if missing.any() else vectors)

    def _dimension(self) -> int:
        for shard in self.shards:
            with self._open(shard) as file:
                type_ = file.schema_arrow.field("value").type
                if not pa.types.is_fixed_size_list(type_):
                    raise OutputError(f"attribute '{self.attribute}' is {type_}, not an embedding")
                return int(type_.list_size)
        raise OutputError(f"{self.folder.url} holds no shard with vectors")

    def _open(self, shard: str, suffix: str = "") -> pq.ParquetFile:
        name = self.sidecar(shard, suffix)
        if self.folder.is_local:
            # Not mapped: what was looked at would count as memory of this process until the file is closed.
            return pq.ParquetFile(self.folder.path(name), pre_buffer=False)
        return pq.ParquetFile(self.folder.open(name), pre_buffer=False)


def _one(values: pa.ChunkedArray) -> pa.Array:
    return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
