"""Training groups: one row a query, with all its positives in order of quality and all its negatives.

The lists are ragged and whole. How many of them a training step sees, and which in which epoch, is drawn by the trainer
(`models.training.groups`), so that another draw needs no other file.
"""

from __future__ import annotations

import pyarrow as pa

POSITIVE_TYPE = pa.struct(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("quality_rank", pa.int32(), nullable=False),  # 1 = best; the order of the list
        pa.field("grade", pa.int32()),
        pa.field("value", pa.float64()),
        pa.field("label_source", pa.string(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),  # null where the group holds ids only
    ]
)

NEGATIVE_TYPE = pa.struct(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # judged, or the pool's source: bm25, random, ...
        pa.field("rank", pa.int32()),  # in that source
        pa.field("score", pa.float64()),  # of that source
        pa.field("grade", pa.int32()),  # where it was judged
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
    ]
)

GROUP_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string()),
        pa.field("stage", pa.string(), nullable=False),  # the training stage the group belongs to
        pa.field("stage_number", pa.int32(), nullable=False),  # stages are trained in this order, from 0
        pa.field("positives", pa.list_(POSITIVE_TYPE), nullable=False),  # best first
        pa.field(
            "negatives", pa.list_(NEGATIVE_TYPE), nullable=False
        ),  # hardest first, as their source ranks them
    ]
)

# Documents that must not count as negatives of a query, even as another query's positive in the same batch.
MASK_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_ids", pa.list_(pa.string()), nullable=False),  # sorted
    ]
)

# Queries that made no group in a stage, and why.
DROPPED_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("positives", pa.int32(), nullable=False),  # how many there were
        pa.field("negatives", pa.int32(), nullable=False),
    ]
)

# Candidates that did not become negatives (or positives), and why.
REJECTED_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float64()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("limit", pa.float64()),  # the score it had to stay below, where a margin rejected it
    ]
)
