"""Shard formats: how each is surveyed, read by row range, and written again with a delta applied."""

from __future__ import annotations

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


def format_of(name: str) -> str | None:
    """Name of the format a file name stands for (`parquet`, `jsonl`, `arrow`), None if it is no shard."""
    base = name.rsplit("/", 1)[-1].lower()
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if base.endswith(suffix) and len(base) > len(suffix):
            return SUFFIXES[suffix]
    return None


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
    "format_of",
    "get_format",
]
