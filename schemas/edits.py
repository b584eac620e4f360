"""The record of a change: one struct per edit in flight, one row per edit in `edits/<shard>.parquet`."""

from __future__ import annotations

import pyarrow as pa

SPAN_TYPE = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),  # characters from the start of the document's text
        pa.field("end", pa.int32(), nullable=False),  # exclusive
        pa.field("score", pa.float32()),  # how much of the toxicity the span carries, in [0, 1]
        pa.field("source", pa.string()),  # lexicon | occlusion | socd | ...
    ]
)

REJECT_TYPE = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("toxicity", pa.float32()),
        pa.field("similarity", pa.float32()),
        pa.field(
            "fluency", pa.float32()
        ),  # how much it reads like a whole sentence; null where that does not count
        # (1 - lambda) * similarity - lambda * toxicity (+ weight * fluency)
        pa.field("fusion", pa.float32()),
        pa.field("temperature", pa.float32()),
        pa.field("reasons", pa.list_(pa.string())),  # the hard conditions it failed; empty = passed
    ]
)

EDIT_FIELDS = [
    pa.field("segment", pa.int32()),  # index of the sentence in the document; null = the whole text
    pa.field("start", pa.int32(), nullable=False),  # characters in the ORIGINAL text
    pa.field("end", pa.int32(), nullable=False),  # exclusive
    pa.field("before", pa.string(), nullable=False),
    pa.field("after", pa.string(), nullable=False),
    pa.field("action", pa.string(), nullable=False),  # rewrite | span_edit | redact | drop_segment | flag
    pa.field("toxicity_before", pa.float32()),
    pa.field("toxicity_after", pa.float32()),
    pa.field("similarity", pa.float32()),
    pa.field("labels", pa.list_(pa.string())),  # the ranker's labels, in the order of the two lists below
    pa.field("scores_before", pa.list_(pa.float32())),
    pa.field("scores_after", pa.list_(pa.float32())),
    pa.field("spans", pa.list_(SPAN_TYPE)),  # what was found toxic
    pa.field("candidates", pa.list_(REJECT_TYPE)),  # all distinct candidates, best fusion score first
    pa.field("temperature", pa.float32()),  # of the chosen candidate
    pa.field("seed", pa.uint64()),  # of the chosen candidate
    pa.field("scorer", pa.string()),  # name@revision
    pa.field("model", pa.string()),  # name@revision
    pa.field("prompt", pa.string()),  # name@hash
]
EDIT_TYPE = pa.struct(EDIT_FIELDS)

EDIT_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        *EDIT_FIELDS,
    ]
)
