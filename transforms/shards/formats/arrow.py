"""Arrow IPC, file and stream (`datasets` saves streams): batch boundaries and body compression are kept."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from schemas.columns import check_extra_columns, check_id_column, check_text_column
from schemas.fingerprint import schema_fingerprint
from transforms.shards.deltas import DeltaCursor, apply_delta, pick_rows
from transforms.shards.files import Folder
from transforms.shards.formats.base import (
    Assembled,
    AssembleOptions,
    OnRemoved,
    ReadUnit,
    Survey,
    UnitLimits,
    UnitPlan,
    pack,
    projection,
    regroup,
)

_MAGIC = b"ARROW1"


class ArrowFormat:
    """Arrow IPC shards."""

    name = "arrow"

    def survey(
        self,
        folder: Folder,
        name: str,
        limits: UnitLimits,
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Survey:
        """Plan by walking the batches (memory-mapped where the file is local)."""
        with _batches(folder, name) as (schema, batches, _):
            check_text_column(schema, text_column, shard=name)
            check_id_column(schema, id_column, shard=name)
            check_extra_columns(schema, extra, shard=name)
            index = schema.get_field_index(text_column)
            chunks = [(b.num_rows, b.column(index).nbytes) for b in batches]
            return Survey(schema, sum(n for n, _ in chunks), tuple(pack(chunks, limits)))

    def read(
        self,
        folder: Folder,
        name: str,
        units: Sequence[UnitPlan],
        text_column: str,
        id_column: str | None,
        extra: Sequence[str] = (),
    ) -> Iterator[ReadUnit]:
        """Walk the batches and cut them at unit boundaries."""
        columns = projection(text_column, id_column, extra)
        with _batches(folder, name) as (_, batches, _):
            for plan, batch in regroup((b.select(columns) for b in batches), 0, units):
                yield ReadUnit(plan, batch)

    def scan(self, folder: Folder, name: str) -> Iterator[pa.Table]:
        """Read batch by batch."""
        with _batches(folder, name) as (schema, batches, _):
            for batch in batches:
                yield pa.Table.from_batches([batch], schema)

    def assemble(
        self,
        folder: Folder,
        name: str,
        units: Sequence[UnitPlan],
        cursor: DeltaCursor,
        target: Path,
        text_column: str,
        options: AssembleOptions,
        on_removed: OnRemoved,
    ) -> Assembled:
        """Write batch by batch, as a file or a stream, whichever the source is."""
        with _batches(folder, name) as (schema, batches, is_file):
            codec = options.compression or _compression(folder, name)
            settings = pa.ipc.IpcWriteOptions(
                compression=None if codec == "none" else codec,
                # A dictionary-encoded text column gets new words; in a file every batch must then share one dictionary.
                unify_dictionaries=is_file,
            )
            create = pa.ipc.new_file if is_file else pa.ipc.new_stream
            unify = is_file and any(pa.types.is_dictionary(f.type) for f in schema)
            written = row = 0
            held: list[pa.Table] = []
            with pa.OSFile(str(target), "wb") as sink, create(sink, schema, options=settings) as writer:
                for batch in batches:
                    chunk = pa.Table.from_batches([batch], schema)
                    delta = cursor.take(row, chunk.num_rows)
                    if delta.removed.any():
                        rows = [row + int(r) for r in delta.removed.nonzero()[0]]
                        on_removed(pick_rows(chunk, delta.removed), rows)
                    row += chunk.num_rows
                    chunk = apply_delta(chunk, delta, text_column)
                    written += chunk.num_rows
                    if unify:
                        held.append(chunk)
                    else:
                        for part in chunk.to_batches():
                            writer.write_batch(part)
                if held:
                    writer.write_table(pa.concat_tables(held).unify_dictionaries())
            return Assembled(written, schema_fingerprint(schema))


@contextmanager
def _batches(folder: Folder, name: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch], bool]]:
    source = (
        pa.memory_map(folder.path(name)) if folder.is_local else pa.PythonFile(folder.open(name), mode="r")
    )
    with source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches)), True
        else:
            with pa.ipc.open_stream(source) as stream:
                yield stream.schema, iter(stream), False


def _compression(folder: Folder, name: str) -> str | None:
    """Body compression of the first record batch: `lz4`, `zstd` or None (Arrow format, `BodyCompression`)."""
    with folder.open(name) as file:
        head = file.read(8)
        if head[:6] != _MAGIC:
            file.seek(0)
        for message in _messages(file):
            if message.type == "record batch":
                return _codec_of(message.metadata.to_pybytes())
    return None


def _messages(file: object) -> Iterator[pa.ipc.Message]:
    reader = pa.ipc.MessageReader.open_stream(pa.PythonFile(file, mode="r"))
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _codec_of(message: bytes) -> str | None:
    """Read RecordBatch.compression from a message's flatbuffer (Message.fbs: Message.header is field 2)."""
    root = struct.unpack_from("<I", message, 0)[0]
    header = _field(message, root, 2)
    if header is None:
        return None
    batch = header + struct.unpack_from("<I", message, header)[0]
    slot = _field(message, batch, 3)
    if slot is None:
        return None
    compression = slot + struct.unpack_from("<I", message, slot)[0]
    codec = _field(message, compression, 0)
    number = struct.unpack_from("<b", message, codec)[0] if codec is not None else 0
    return {0: "lz4", 1: "zstd"}.get(number)


def _field(data: bytes, table: int, index: int) -> int | None:
    """Offset of field `index` of the flatbuffer table at `table`; None where it holds its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size = struct.unpack_from("<H", data, vtable)[0]
    if 4 + 2 * index >= size:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0]
    return table + offset if offset else None
