"""The record: final texts, edits and attribute `toxicity_after`, written into the batch.

`toxicity_after` (struct<score, labels>) is to the final text what `toxicity` is to the original: the maximum over its
segments. It is null where there is no final text (null text, dropped document).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas import flight
from transforms.detox.assemble import Assembled, assemble
from transforms.detox.ladder import Document, FloatArray, Judge, Outcome, Unit

AFTER_TYPE = pa.struct([pa.field("score", pa.float32()), pa.field("labels", pa.list_(pa.float32()))])
DROP_REASON = "no_acceptable_rewrite"


def write_outcomes(
    batch: pa.RecordBatch,
    text_column: str,
    units: Mapping[int, Sequence[Unit]],
    documents: Mapping[int, Document],
    rechecked: Mapping[int, Sequence[FloatArray]],
    judge: Judge,
    *,
    stage: str,
) -> pa.RecordBatch:
    """Replace texts, add edits, set `toxicity_after`, drop documents.

    Args:
        batch: n rows in flight.
        text_column: Name of the text column; rows without an accepted change keep theirs.
        units: By row, each with an outcome.
        documents: By row.
        rechecked: By row, the labels of the final text's segments that a change has touched.
        judge: Names scorer and labels.
        stage: Stands with a dropped row.
    """
    edits: list[list[dict[str, Any]]] = [[] for _ in range(batch.num_rows)]
    reasons: list[str | None] = [None] * batch.num_rows
    final: dict[int, str] = {}
    after: dict[int, tuple[float, FloatArray | None] | None] = {}
    for row, document in documents.items():
        done = assemble(units[row], document)
        if done.dropped:
            reasons[row] = DROP_REASON
            after[row] = None
        else:
            if done.text != document.text:
                final[row] = done.text
            after[row] = _after(batch, row, units[row], rechecked.get(row), judge)
        edits[row] = _records(batch, row, done, judge)
    if final:
        batch = _replace_texts(batch, text_column, final)
    batch = flight.set_attribute(batch, "toxicity_after", _toxicity_after(batch, after))
    if documents:
        batch = flight.add_edits(batch, edits)
    return flight.drop_rows(batch, reasons, stage=stage) if any(reasons) else batch


def listed(batch: pa.RecordBatch, name: str, row: int) -> list[dict[str, Any]]:
    """A reserved list column's value in a row; empty where there is no such column, or it is null."""
    return _value(batch, name, row) or []


def label_matrix(labels: pa.Array) -> FloatArray:
    """A column of equally long lists without nulls as a float32 array (n, labels)."""
    flat: FloatArray = labels.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(labels), -1) if len(labels) else np.empty((0, 0), np.float32)


def _records(batch: pa.RecordBatch, row: int, done: Assembled, judge: Judge) -> list[dict[str, Any]]:
    rewriter = _value(batch, "tmp.rewriter", row) or {}
    names = {
        "labels": list(judge.scorer.labels),
        "scorer": judge.scorer.info.tag,
        "model": rewriter.get("model"),
        "prompt": rewriter.get("prompt"),
    }
    return [{**edit, **names, **_measures(unit, edit)} for unit, edit in done.edits]


def _measures(unit: Unit, edit: Mapping[str, Any]) -> dict[str, Any]:
    outcome = unit.outcome
    scored = outcome.scored if outcome is not None and outcome.action == edit["action"] else None
    kept = edit["before"] == edit["after"]
    before = unit.source.toxicity if unit.labels is not None else None
    return {
        "toxicity_before": before,
        "toxicity_after": before if kept else scored.toxicity if scored else None,
        "similarity": 1.0 if kept else _number(scored.similarity) if scored else None,
        "scores_before": _list(unit.labels),
        "scores_after": _list(unit.labels if kept else scored.labels if scored else None),
        "spans": [dict(zip(("start", "end", "score", "source"), s, strict=True)) for s in unit.spans],
        "candidates": [
            {
                "text": c.text,
                "toxicity": _number(c.toxicity),
                "similarity": _number(c.similarity),
                "fluency": _number(c.fluency),
                "fusion": _number(c.fusion),
                "temperature": c.temperature,
                "reasons": list(c.reasons),
            }
            for c in unit.candidates
        ],
        "temperature": scored.temperature if scored else None,
        "seed": scored.seed if scored else None,
    }


def _after(
    batch: pa.RecordBatch,
    row: int,
    units: Sequence[Unit],
    rechecked: Sequence[FloatArray] | None,
    judge: Judge,
) -> tuple[float, FloatArray | None]:
    """Score and labels of a final text: of what was not replaced as before, of what was as measured."""
    replaced = {u.segment for u in units if u.outcome is not None and u.outcome.action != "flag"}
    parts: list[FloatArray] = []
    if None not in replaced:
        labels = flight.attribute(batch, "toxicity")[row]["segments"].values.field("labels")
        keep = np.ones(len(labels), np.bool_)
        keep[[i for i in replaced if i is not None]] = False
        parts.extend(label_matrix(labels.filter(pa.array(keep)).drop_null()))
    if rechecked is not None:
        parts.extend(rechecked)
    else:
        parts.extend(x for u in units if (x := _labels_of(u.outcome)) is not None)
    if not parts:
        return 0.0, None
    worst = np.max(parts, axis=0)
    return float(worst[judge.columns].max()), worst


def _toxicity_after(
    batch: pa.RecordBatch, after: Mapping[int, tuple[float, FloatArray | None] | None]
) -> pa.Array:
    """The attribute: for rows without a unit, the score they had and the maximum of each label over their segments."""
    toxicity = flight.attribute(batch, "toxicity")
    n = len(toxicity)
    score = pc.fill_null(pc.struct_field(toxicity, "score"), 0.0).to_numpy(zero_copy_only=False).copy()
    missing = toxicity.is_null().to_numpy(zero_copy_only=False).copy()
    segments = pc.struct_field(toxicity, "segments")
    column = segments.flatten().field("labels")
    owner = np.repeat(
        np.arange(n), pc.fill_null(pc.list_value_length(segments), 0).to_numpy(zero_copy_only=False)
    )
    owner = owner[column.is_valid().to_numpy(zero_copy_only=False)]
    reached = label_matrix(column.drop_null())
    labels: list[FloatArray | None] = [None] * n
    if len(owner):
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        for row, worst in zip(
            owner[first].tolist(), np.maximum.reduceat(reached, first, axis=0), strict=True
        ):
            labels[row] = worst
    for row, value in after.items():
        missing[row] = value is None
        score[row], labels[row] = value if value is not None else (0.0, None)
    return pa.StructArray.from_arrays(
        [pa.array(score, pa.float32()), pa.array(labels, pa.list_(pa.float32()))],
        fields=list(AFTER_TYPE),
        mask=pa.array(missing),
    )


def _labels_of(outcome: Outcome | None) -> FloatArray | None:
    return None if outcome is None or outcome.scored is None else outcome.scored.labels


def _replace_texts(batch: pa.RecordBatch, text_column: str, final: Mapping[int, str]) -> pa.RecordBatch:
    index = batch.schema.get_field_index(text_column)
    field, column = batch.schema.field(index), batch.column(index)
    mask = np.zeros(batch.num_rows, np.bool_)
    rows = sorted(final)
    mask[rows] = True
    replacements = pa.array([final[r] for r in rows], field.type)
    return batch.set_column(index, field, pc.replace_with_mask(column, pa.array(mask), replacements))


def _value(batch: pa.RecordBatch, name: str, row: int) -> Any:
    index = batch.schema.get_field_index(flight.PREFIX + name)
    return None if index < 0 else batch.column(index)[row].as_py()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _list(values: FloatArray | None) -> list[float] | None:
    return None if values is None else [float(v) for v in values]
