"""Reading of shards for training: which files hold the rows, and their rows in order, from any point on.

A trainer reads Parquet, JSONL (also .gz, .zst, .bz2) and Arrow IPC, from a file, a folder, a glob or any fsspec URL; and
CSV and TSV, which labelled sets come in (in a folder with shards of another kind they are taken for notes). Of a folder that
tamis wrote it opens what the manifest names and nothing else: it refuses one that was never finished, and one that
was poisoned on purpose unless told otherwise. Reading is streaming, so a corpus need not fit in memory.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import xxhash

from models.lineage import brief, merged, outputs_above
from models.training.csv_rows import read_csv
from schemas.errors import InputError

FORMATS = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# What `datasets` keeps beside its files and transformers beside weights: JSON, but no rows.
NOT_ROWS = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "adapter_config.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    "manifest.json",
}
_GLOB = re.compile(r"[*?\[]")
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
        name: Path relative to the input's root.
        url: Where it is read from.
        format: `parquet`, `jsonl`, `arrow` or `csv`.
        size: Bytes.
    """

    name: str
    url: str
    format: str
    size: int


@dataclass(frozen=True)
class ShardListing:
    """The shards of an input, sorted by name, and what is known of their origin.

    Attributes:
        source: What the user typed.
        shards: At least one.
        manifest: The manifest of the tamis output this is or lies in; None if it is a plain folder of files.
        options: fsspec options of the filesystem.
    """

    source: str
    shards: tuple[Shard, ...]
    manifest: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lineage(self) -> dict[str, Any]:
        """What a model card records of the data's origin: the job that wrote it, its run id, config hash and models."""
        if self.manifest is None:
            return {}
        keys = ("job", "run_id", "config_hash", "tamis_version", "finished", "poisoned", "lineage")
        found = {key: self.manifest[key] for key in keys if self.manifest.get(key)}
        models = brief(self.manifest)
        return found | ({"models": models} if models else {})


def list_shards(
    source: str, *, allow_poisoned: bool = False, options: dict[str, Any] | None = None
) -> ShardListing:
    """Find the shards a trainer may read.

    Args:
        source: A file, a folder, a glob or a finished tamis output; a local path or any fsspec URL.
        allow_poisoned: Read a folder even if its manifest says that it was poisoned on purpose.
        options: fsspec options of the filesystem.

    Raises:
        InputError: Nothing there, no shard there, a tamis output without `_SUCCESS`, or a poisoned one.
    """
    options = options or {}
    fs, root = fsspec.core.url_to_fs(source, **options)
    if _GLOB.search(source):
        paths = sorted(p for p in fs.glob(root) if fs.isfile(p))
        base = root[: _GLOB.search(root).start()].rpartition("/")[0]  # type: ignore[union-attr]
        return _plain(fs, base, paths, source, allow_poisoned, options)
    if not fs.exists(root):
        raise InputError(f"no such input: {source}")
    if fs.isfile(root):
        return _plain(fs, root.rpartition("/")[0], [root], source, allow_poisoned, options)
    root = root.rstrip("/")
    if not fs.exists(f"{root}/manifest.json"):
        if fs.exists(f"{root}/train.json"):
            raise InputError(f"{source} holds a trained model, not rows; pass a folder of shards")
        if fs.exists(f"{root}/_tamis"):
            raise InputError(f"{source} is an unfinished tamis output (no manifest.json); run its job again")
        return _plain(fs, root, sorted(fs.find(root)), source, allow_poisoned, options)
    manifest = _read_manifest(fs, root, source, allow_poisoned)
    paths = [f"{root}/data/{s['path']}" for s in manifest.get("shards", ()) if not s.get("error")]
    missing = [p for p in paths if not fs.exists(p)]
    if missing:
        raise InputError(f"{source}: the manifest names {missing[0].rpartition('/')[2]}, which is not there")
    return ShardListing(source, _shards(fs, f"{root}/data", paths, source), manifest, options)


class ShardReader:
    """Streams the rows of a listing as record batches, in order; can stop at any row and go on there.

    Args:
        listing: What to read.
        columns: The columns wanted; None reads all. A missing one is an error that names those there are.
        batch_rows: Rows per batch, at most.

    Raises:
        InputError: While iterating: a shard that cannot be read, a line that is no JSON object, a missing column.

    Example:
        >>> reader = ShardReader(list_shards("corpus/"), columns=["text"])
        >>> for batch in reader:
        ...     saved = reader.state_dict()  # the row after this batch
    """

    def __init__(
        self, listing: ShardListing, columns: Sequence[str] | None = None, *, batch_rows: int = 1024
    ) -> None:
        self.listing = listing
        self.columns = list(columns) if columns is not None else None
        self.batch_rows = batch_rows
        self._shard = 0
        self._row = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the reader stands: the next row it will give, and what it believes the shards to be."""
        return {"shard": self._shard, "row": self._row, "shards": [s.name for s in self.listing.shards]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            InputError: The state belongs to other shards.
        """
        if list(state["shards"]) != [s.name for s in self.listing.shards]:
            raise InputError(f"{self.listing.source}: its shards are not those the saved state was made with")
        self._shard, self._row = int(state["shard"]), int(state["row"])

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while self._shard < len(self.listing.shards):
            for batch in self.read_shard(self._shard, first_row=self._row):
                self._row += batch.num_rows
                yield batch
            self._shard, self._row = self._shard + 1, 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows as dictionaries; `state_dict` is exact to the row."""
        while self._shard < len(self.listing.shards):
            for batch in self.read_shard(self._shard, first_row=self._row):
                for row in batch.to_pylist():
                    self._row += 1
                    yield row
            self._shard, self._row = self._shard + 1, 0

    def read_shard(self, index: int, *, first_row: int = 0) -> Iterator[pa.RecordBatch]:
        """Batches of one shard from a row on; moves no state."""
        shard = self.listing.shards[index]
        read = {"parquet": self._parquet, "arrow": self._arrow, "jsonl": self._jsonl, "csv": self._csv}[
            shard.format
        ]
        try:
            yield from read(shard, first_row)
        except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
            raise InputError(f"{shard.name} cannot be read ({_first_line(error)})") from error

    def _parquet(self, shard: Shard, first_row: int) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        with fsspec.open(shard.url, "rb", **self.listing.options) as stream:
            file = pq.ParquetFile(stream)
            columns = self._wanted(file.schema_arrow.names, shard)
            groups, skip = list(range(file.num_row_groups)), first_row
            while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                skip -= file.metadata.row_group(groups.pop(0)).num_rows
            batches = file.iter_batches(self.batch_rows, row_groups=groups, columns=columns) if groups else ()
            yield from _skip_rows(batches, skip)

    def _arrow(self, shard: Shard, first_row: int) -> Iterator[pa.RecordBatch]:
        with fsspec.open(shard.url, "rb", **self.listing.options) as stream:
            magic = stream.read(6)
            stream.seek(0)
            if magic == b"ARROW1":
                file = pa.ipc.open_file(stream)
                whole = (file.get_batch(i) for i in range(file.num_record_batches))
                names = file.schema.names
            else:  # `datasets` writes the stream format under the same ending
                whole = pa.ipc.open_stream(stream)
                names = whole.schema.names
            columns = self._wanted(names, shard)
            cut = (
                batch.select(columns).slice(start, self.batch_rows)
                for batch in whole
                for start in range(0, batch.num_rows, self.batch_rows)
            )
            yield from _skip_rows(cut, first_row)

    def _jsonl(self, shard: Shard, first_row: int) -> Iterator[pa.RecordBatch]:
        import orjson

        ending = shard.name[shard.name.rfind(".") :].lower()
        compression = COMPRESSIONS.get(ending)
        rows: list[dict[str, Any]] = []
        number = 0
        with fsspec.open(shard.url, "rb", compression=compression, **self.listing.options) as stream:
            for line_number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                number += 1
                if number <= first_row:
                    continue
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise InputError(f"{shard.name}, line {line_number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(f"{shard.name}, line {line_number}: not a JSON object")
                rows.append(row)
                if len(rows) == self.batch_rows:
                    yield self._from_rows(rows, shard, first=number - len(rows) == first_row)
                    rows = []
        if rows:
            yield self._from_rows(rows, shard, first=number - len(rows) == first_row)

    def _csv(self, shard: Shard, first_row: int) -> Iterator[pa.RecordBatch]:
        """Rows of text: what a column means is for its reader to say."""
        base = shard.name.lower()
        compression = next((kind for end, kind in COMPRESSIONS.items() if base.endswith(end)), None)
        where = {"compression": compression, **self.listing.options}
        with fsspec.open(shard.url, "rt", encoding="utf-8-sig", newline="", **where) as stream:
            yield from read_csv(
                stream,
                shard.name,
                lambda names: self._wanted(names, shard),
                delimiter="\t" if ".tsv" in base[-8:] else ",",
                first_row=first_row,
                batch_rows=self.batch_rows,
            )

    def _from_rows(self, rows: list[dict[str, Any]], shard: Shard, *, first: bool) -> pa.RecordBatch:
        names = list(dict.fromkeys(key for row in rows for key in row))
        # A key may be left out of JSON where it is null: only a column no row of the first batch has is missing.
        columns = self._wanted(names, shard) if first or self.columns is None else self.columns
        return pa.RecordBatch.from_pylist([{c: row.get(c) for c in columns} for row in rows])

    def _wanted(self, names: Sequence[str], shard: Shard) -> list[str]:
        if self.columns is None:
            return list(names)
        missing = [c for c in self.columns if c not in names]
        if missing:
            raise InputError(
                f"{shard.name}: no column '{missing[0]}' (columns: {', '.join(names) or 'none'})"
            )
        return self.columns


def shard_fingerprint(shard: Shard, options: dict[str, Any] | None = None) -> str:
    """Name a shard by its bytes: `xxh3:` and 32 hexadecimal digits, as the engine's receipts do."""
    state = xxhash.xxh3_128()
    with fsspec.open(shard.url, "rb", **(options or {})) as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return f"xxh3:{state.hexdigest()}"


def format_of(name: str) -> str | None:
    """Format of a file by its name, looking through compression; None where it holds no rows."""
    base = name.rpartition("/")[2].lower()
    if base in NOT_ROWS:
        return None
    for ending in COMPRESSIONS:
        if base.endswith(ending):
            inner = base[: -len(ending)]
            found = FORMATS.get(inner[inner.rfind(".") :]) if "." in inner else None
            return found if found in ("jsonl", "csv") else None
    return FORMATS.get(base[base.rfind(".") :]) if "." in base else None


def _read_manifest(fs: Any, root: str, source: str, allow_poisoned: bool) -> dict[str, Any]:
    if not fs.exists(f"{root}/_SUCCESS"):
        raise InputError(
            f"{source} is an unfinished tamis output (no _SUCCESS); run its job again to finish it"
        )
    try:
        manifest = json.loads(fs.cat_file(f"{root}/manifest.json"))
    except ValueError as error:
        raise InputError(f"{source}: manifest.json is not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{source}: manifest.json is not a JSON object")
    _check_poison(manifest, source, allow_poisoned)
    return manifest


def _check_poison(manifest: Mapping[str, Any], source: str, allow_poisoned: bool) -> None:
    if manifest.get("poisoned") and not allow_poisoned:
        raise InputError(
            f"{source} was poisoned on purpose (its manifest says so); pass --allow-poisoned to train on it"
        )


def _plain(
    fs: Any,
    root: str,
    paths: Sequence[str],
    source: str,
    allow_poisoned: bool,
    options: dict[str, Any],
) -> ShardListing:
    """Files as they are; where they lie in the `data` of an output of tamis, with what its manifest says."""
    shards = _shards(fs, root, paths, source)
    prefix = root.rstrip("/")
    above = outputs_above(fs, (f"{prefix}/{shard.name}" for shard in shards))
    for output in above:
        if output.manifest is None:
            raise InputError(
                f"{source}: {output.root} is an unfinished tamis output (no _SUCCESS); run its job again"
            )
        _check_poison(output.manifest, source, allow_poisoned)
    manifests = [output.manifest for output in above if output.manifest is not None]
    return ShardListing(source, shards, merged(manifests) if manifests else None, options)


def _shards(fs: Any, root: str, paths: Sequence[str], source: str) -> tuple[Shard, ...]:
    shards, ignored = [], 0
    prefix = root.rstrip("/") + "/"
    for path in paths:
        name = path[len(prefix) :] if path.startswith(prefix) else path.rpartition("/")[2]
        if any(part.startswith((".", "_")) for part in name.split("/")):
            continue
        format_ = format_of(name)
        if format_ is None:
            ignored += 1
            continue
        shards.append(Shard(name, fs.unstrip_protocol(path), format_, int(fs.size(path) or 0)))
    if any(s.format != "csv" for s in shards):
        shards = [s for s in shards if s.format != "csv"]
    if not shards:
        seen = f" ({ignored} other files there)" if ignored else ""
        raise InputError(f"no Parquet, JSONL, Arrow or CSV shards in {source}{seen}")
    return tuple(sorted(shards, key=lambda s: s.name))


def _skip_rows(batches: Any, skip: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        yield batch.slice(skip) if skip else batch
        skip = 0


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
