"""Shard formats: how each is surveyed, read by row range, and written again with a delta applied."""

from __future__ import annotations

from collections.abc import Iterable

from schemas.errors import InputError
from transforms.shards.formats.base import (
    Assembled,
    AssembleOptions,
    ReadUnit,
    ShardFormat,
    Survey,
    UnitLimits,
    UnitPlan,
)

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.zst": "jsonl",
    ".ndjson.zst": "jsonl",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
}
CODECS = {
    "parquet": ("snappy", "zstd", "gzip", "brotli", "lz4", "none"),
    "arrow": ("zstd", "lz4", "none"),
}


def format_of(name: str) -> str | None:
    """Name of the format a file name stands for (`parquet`, `jsonl`, `arrow`), None if it is no shard."""
    base = name.rsplit("/", 1)[-1].lower()
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if base.endswith(suffix) and len(base) > len(suffix):
            return SUFFIXES[suffix]
    return None


def check_compression(codec: str | None, names: Iterable[str]) -> None:
    """Refuse a codec that one of the shards cannot be written with, before any work.

    Args:
        codec: Of `AssembleOptions`; None keeps each shard's own.
        names: Of the shards. Lines of JSON are packed as their names say, whatever the codec.

    Raises:
        InputError: With the codecs that fit.
    """
    if codec is None:
        return
    names = list(names)
    if names and not any(format_of(name) in CODECS for name in names):
        raise InputError(
            f"--compression {codec} fits none of the shards: lines of JSON are packed as their names say; leave it out"
        )
    for name in names:
        format_ = format_of(name)
        allowed = CODECS.get(format_ or "")
        if allowed is not None and codec not in allowed:
            raise InputError(
                f"{name}: {format_} cannot be compressed with '{codec}'; pass one of {', '.join(allowed)}"
            )


def get_format(name: str) -> ShardFormat:
    """The implementation of a format by its name."""
    if name == "parquet":
        from transforms.shards.formats.parquet import ParquetFormat

        return ParquetFormat()
    if name == "jsonl":
        from transforms.shards.formats.jsonl import JsonlFormat

        return JsonlFormat()
    if name == "arrow":
        from transforms.shards.formats.arrow import ArrowFormat

        return ArrowFormat()
    raise ValueError(f"no shard format '{name}'")


__all__ = [
    "AssembleOptions",
    "Assembled",
    "ReadUnit",
    "ShardFormat",
    "Survey",
    "UnitLimits",
    "UnitPlan",
    "check_compression",
    "format_of",
    "get_format",
]
