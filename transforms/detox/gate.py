"""The gate: which segments are toxic, by a cascade of scorers from cheap to good.

The cheap stages (lexicon, linear model) see every segment; the classifier that decides sees those which at least one
of them lets pass. Everything measured is kept in attribute `toxicity`, so another threshold needs no new inference:

    score     float32    maximum of the classifier's score over the segments it saw; 0 where it saw none
    flagged   bool       whether any segment is toxic
    segments  list<struct<start, end, lexicon, linear, labels, score, flagged>>
              lexicon, linear: the cheap stages' scores, null where a stage is not used;
              labels: all labels of the classifier, and score: its verdict, null where it was not asked
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.protocols import ToxicityScorer
from schemas import flight
from schemas.errors import ModelError
from transforms.detox.options import GATE_DEFAULTS, GateOptions
from transforms.requests import score_cached
from transforms.shards.cache import RequestCache

FloatArray = npt.NDArray[np.float32]

SEGMENT_SCORE_TYPE = pa.struct(
    [
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
        pa.field("lexicon", pa.float32()),
        pa.field("linear", pa.float32()),
        pa.field("labels", pa.list_(pa.float32())),
        pa.field("score", pa.float32()),
        pa.field("flagged", pa.bool_(), nullable=False),
    ]
)
TOXICITY_TYPE = pa.struct(
    [
        pa.field("score", pa.float32()),
        pa.field("flagged", pa.bool_()),
        pa.field("segments", pa.list_(SEGMENT_SCORE_TYPE)),
    ]
)


@dataclass(frozen=True)
class Verdicts:
    """What the gate measured on n texts.

    Attributes:
        lexicon: n scores, or None where the stage is not used.
        linear: n scores, or None.
        reached: n booleans: the classifier was asked.
        labels: float32 (n, labels); rows not reached are 0.
        score: n scores of the classifier; 0 where it was not asked.
        flagged: n booleans.
    """

    lexicon: FloatArray | None
    linear: FloatArray | None
    reached: npt.NDArray[np.bool_]
    labels: FloatArray
    score: FloatArray
    flagged: npt.NDArray[np.bool_]


def gate_toxicity(
    batch: pa.RecordBatch,
    *,
    text_column: str,
    classifier: ToxicityScorer,
    lexicon: ToxicityScorer | None = None,
    linear: ToxicityScorer | None = None,
    options: GateOptions = GATE_DEFAULTS,
    cache: RequestCache | None = None,
    count: Callable[[str, int], None] | None = None,
) -> pa.RecordBatch:
    """Score the segments of a batch and set attribute `toxicity`; one call a stage, over all segments of all rows.

    Args:
        batch: n rows in flight, with scratch column `segments`.
        text_column: Name of the text column.
        classifier: Decides.
        lexicon: First cheap stage; None leaves it out.
        linear: Second cheap stage; None leaves it out.
        options: Thresholds and mode.
        cache: Where the classifier's scores are remembered.
        count: Counter to add to.

    Returns:
        The batch, its text untouched.
    """
    segments = flight.scratch(batch, "segments")
    texts = segment_strings(batch.column(text_column), segments)
    verdicts = judge(
        texts, classifier=classifier, lexicon=lexicon, linear=linear, options=options, cache=cache
    )
    if count:
        count("gate.segments", len(texts))
        count("gate.reached", int(verdicts.reached.sum()))
        count("gate.flagged", int(verdicts.flagged.sum()))
    return flight.set_attribute(batch, "toxicity", _attribute(segments, verdicts))


def judge(
    texts: Sequence[str],
    *,
    classifier: ToxicityScorer,
    lexicon: ToxicityScorer | None = None,
    linear: ToxicityScorer | None = None,
    options: GateOptions = GATE_DEFAULTS,
    cache: RequestCache | None = None,
) -> Verdicts:
    """The cascade on n texts, outside any batch (what the measurements of the gate call)."""
    n = len(texts)
    columns = label_columns(classifier, options.labels)
    low = _headline(lexicon, texts)
    mid = _headline(linear, texts)
    reached = np.zeros(n, np.bool_)
    if options.gate != "cascade" or (low is None and mid is None):
        reached[:] = True
    if low is not None:
        reached |= low >= options.lexicon_pass
    if mid is not None:
        reached |= mid >= options.linear_pass
    labels = np.zeros((n, len(classifier.labels)), np.float32)
    asked: list[int] = np.flatnonzero(reached).tolist()
    labels[asked] = score_cached(classifier, [texts[i] for i in asked], cache)
    score = labels[:, columns].max(axis=1) if n else np.empty(0, np.float32)
    flagged = reached & (score >= options.tau)
    if options.gate == "none":
        flagged = np.ones(n, np.bool_)
    return Verdicts(low, mid, reached, labels, score, flagged)


def label_columns(scorer: ToxicityScorer, labels: Sequence[str]) -> list[int]:
    """Columns of the scorer's output whose maximum is the score: those of `labels`, or the headline one.

    Raises:
        ModelError: The scorer has no such label.
    """
    unknown = [x for x in labels if x not in scorer.labels]
    if unknown:
        raise ModelError(
            f"scorer {scorer.info.name} has no label '{unknown[0]}'; it has: {', '.join(scorer.labels)}"
        )
    return [scorer.labels.index(x) for x in labels] or [0]


def segment_strings(texts: pa.Array, segments: pa.Array) -> list[str]:
    """The segments' texts, flat, in order of row and offset."""
    out: list[str] = []
    for text, spans in zip(texts, segments, strict=True):
        if spans.is_valid and len(spans):
            whole = text.as_py()
            starts, ends = (spans.values.field(k).to_pylist() for k in ("start", "end"))
            out.extend(whole[a:b] for a, b in zip(starts, ends, strict=True))
    return out


def _headline(scorer: ToxicityScorer | None, texts: Sequence[str]) -> FloatArray | None:
    return None if scorer is None else score_cached(scorer, texts, None)[:, 0]


def _attribute(segments: pa.Array, verdicts: Verdicts) -> pa.Array:
    n = len(verdicts.reached)
    spans = segments.flatten()  # skips what null rows may hold
    width = verdicts.labels.shape[1]
    offsets = pa.array(np.arange(n + 1) * width, pa.int32())
    unasked = ~verdicts.reached
    values = pa.StructArray.from_arrays(
        [
            spans.field("start"),
            spans.field("end"),
            _floats(verdicts.lexicon, n),
            _floats(verdicts.linear, n),
            pa.ListArray.from_arrays(offsets, pa.array(verdicts.labels.ravel()), mask=pa.array(unasked)),
            pa.array(verdicts.score, mask=unasked),
            pa.array(verdicts.flagged),
        ],
        fields=list(SEGMENT_SCORE_TYPE),
    )
    lengths = np.array([len(s) if s.is_valid else 0 for s in segments], np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    score = np.zeros(len(segments), np.float32)
    flagged = np.zeros(len(segments), np.bool_)
    full = np.flatnonzero(lengths)
    if len(full):  # reduceat over non-empty runs only: an empty one would take its neighbour's first value
        score[full] = np.maximum.reduceat(verdicts.score, bounds[full])
        flagged[full] = np.logical_or.reduceat(verdicts.flagged, bounds[full])
    nulls = segments.is_null()
    listed = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values, mask=nulls)
    return pa.StructArray.from_arrays(
        [pa.array(score), pa.array(flagged), listed], fields=list(TOXICITY_TYPE), mask=nulls
    )


def _floats(values: FloatArray | None, n: int) -> pa.Array:
    return pa.nulls(n, pa.float32()) if values is None else pa.array(values)
