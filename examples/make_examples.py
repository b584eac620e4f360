"""Write `corpus.parquet` from `corpus.jsonl`: the same documents, in the column types real corpora have.

`corpus.jsonl` is written by hand (and its lines are spaced and escaped in several ways on purpose, as exporters do).
The Parquet file holds the same rows with a nested column, a dictionary column, timestamps, large strings and schema
metadata, in several row groups, so that a drop-in copy has something to keep.

    python examples/make_examples.py
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent

META = pa.struct(
    [
        pa.field("author", pa.string()),
        pa.field("votes", pa.int32()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("quality", pa.float32()),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string()),
        pa.field("source", pa.dictionary(pa.int8(), pa.string())),
        pa.field("lang", pa.dictionary(pa.int8(), pa.string())),
        pa.field("url", pa.string()),
        pa.field("published", pa.timestamp("ms", tz="UTC")),
        pa.field("meta", META),
    ],
    metadata={"corpus": "tamis examples", "license": "Apache-2.0"},
)


def read_documents(path: Path = HERE / "corpus.jsonl") -> list[dict]:
    """Return the hand-written documents, one mapping each."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def to_table(documents: list[dict]) -> pa.Table:
    """Give the documents the column types of `SCHEMA`: n rows, 7 columns."""
    rows = [
        {
            "id": d["id"],
            "text": d["text"],
            "source": d["meta"]["source"],
            "lang": d["meta"]["lang"],
            "url": d["url"],
            "published": datetime.fromisoformat(d["timestamp"].replace("Z", "+00:00")),
            "meta": {name: d["meta"].get(name) for name in ("author", "votes", "tags", "quality")},
        }
        for d in documents
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def main() -> None:
    """Write the Parquet file beside this one."""
    table = to_table(read_documents())
    pq.write_table(table, HERE / "corpus.parquet", compression="zstd", row_group_size=16)


if __name__ == "__main__":
    main()
