"""Accept: rank the candidates, keep what meets every condition, send the rest down the ladder, put texts together.

Everything is measured in a few calls over the whole batch. Each change is one edit (`schemas.edits`), in offsets of
the original text; a changed text is segmented and scored once more, and a change that does not hold goes further down
the ladder. Attribute `toxicity_after` holds what the final text scores, the maximum over its segments, as `toxicity`
does for the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.protocols import Encoder, ToxicityScorer
from schemas import flight
from transforms.detox.assemble import edited_ranges, removal_ranges
from transforms.detox.checks import Source, Trial, failed_conditions, normal_form
from transforms.detox.ladder import Document, FloatArray, Judge, Outcome, Scored, Unit, descend
from transforms.detox.localize import flagged_rows
from transforms.detox.options import (
    ACCEPT_DEFAULTS,
    GATE_DEFAULTS,
    SEGMENT_DEFAULTS,
    AcceptOptions,
    GateOptions,
    SegmentOptions,
)
from transforms.detox.rewrite import core
from transforms.detox.segment import segment_spans
from transforms.edits import apply_edits
from transforms.shards.cache import RequestCache

AFTER_TYPE = pa.struct([pa.field("score", pa.float32()), pa.field("labels", pa.list_(pa.float32()))])
DROP_REASON = "no_acceptable_rewrite"

Count = Callable[[str, int], None]


def accept_rewrites(
    batch: pa.RecordBatch,
    *,
    text_column: str,
    scorer: ToxicityScorer,
    encoder: Encoder | None,
    options: AcceptOptions = ACCEPT_DEFAULTS,
    gate: GateOptions = GATE_DEFAULTS,
    segmenting: SegmentOptions = SEGMENT_DEFAULTS,
    cache: RequestCache | None = None,
    count: Count | None = None,
    stage: str = "AcceptRewrites",
) -> pa.RecordBatch:
    """Replace the text of flagged rows, record edits, set attribute `toxicity_after`.

    Args:
        batch: n rows in flight with attribute `toxicity`; attribute `spans` and scratch column `candidates` are used
            where there are any (without candidates the ladder starts at its second rung).
        text_column: Name of the text column.
        scorer: The ranker: the gate's classifier.
        encoder: For similarity; may be None where no rung needs it (`redact`, `drop_*`, `flag`).
        options: Ranking, conditions, ladder.
        gate: The gate's options: its labels, and its threshold where `options` names none.
        segmenting: How changed texts are cut for the second look: as the originals were.
        cache: Where scores are remembered.
        count: Counter to add to (`accept.units`, `accept.candidates`, `accept.<action>`, `reject.<reason>`,
            `accept.rechecked`, `accept.recheck_failed`).
        stage: Stands with a dropped row.

    Returns:
        The batch; text outside the edits is untouched, to the byte.
    """
    count = count or (lambda name, amount: None)
    judge = Judge(scorer, encoder, options.under(gate), gate.labels, cache)
    documents, units = collect_units(batch, text_column, judge)
    rank_candidates(batch, units, judge)
    for unit in units:
        count("accept.candidates", len(unit.candidates))
        for reason, n in Counter(r for c in unit.candidates for r in c.reasons).items():
            count(f"reject.{reason}", n)
    rechecked: dict[int, list[FloatArray]] = {}
    descend(units, documents, judge)
    while options.recheck and documents:
        failed, rechecked = recheck(units, documents, judge, segmenting)
        if not failed:
            break
        count("accept.recheck_failed", len(failed))
        for unit in failed:
            unit.outcome = None
        descend(units, documents, judge)
    by_row: dict[int, list[Unit]] = {row: [] for row in documents}
    for unit in units:
        by_row[unit.row].append(unit)
        if unit.outcome is not None:
            count(f"accept.{unit.outcome.action}", 1)
    count("accept.units", len(units))
    return _write(batch, text_column, by_row, documents, rechecked, judge, stage)


def collect_units(
    batch: pa.RecordBatch, text_column: str, judge: Judge
) -> tuple[dict[int, Document], list[Unit]]:
    """The documents with something flagged, by row, and their units: whole texts where those were rewritten."""
    column, toxicity = batch.column(text_column), flight.attribute(batch, "toxicity")
    documents: dict[int, Document] = {}
    units: list[Unit] = []
    for row in flagged_rows(toxicity):
        text, segments = column[row].as_py(), toxicity[row]["segments"].as_py()
        spans = [(s["start"], s["end"], s["score"], s["source"]) for s in _listed(batch, "attr.spans", row)]
        flagged = tuple(i for i, s in enumerate(segments) if s["flagged"])
        documents[row] = Document(text, tuple((s["start"], s["end"]) for s in segments), flagged)
        labels = [np.array(segments[i]["labels"], np.float32) for i in flagged if segments[i]["labels"]]
        whole = any(c["segment"] is None for c in _listed(batch, "tmp.candidates", row))
        if whole:
            start, end = core(text, 0, len(text))
            units.append(_unit(row, None, text, start, end, labels, judge.columns, spans))
            continue
        for i in flagged:
            start, end = core(text, segments[i]["start"], segments[i]["end"])
            if end > start:  # what is flagged without a score (gate "none") may be blank
                mine = [np.array(segments[i]["labels"], np.float32)] if segments[i]["labels"] else []
                units.append(_unit(row, i, text, start, end, mine, judge.columns, spans))
    return documents, units


def rank_candidates(batch: pa.RecordBatch, units: Sequence[Unit], judge: Judge) -> None:
    """Give every unit its distinct candidates, measured, best fusion score first; two calls over the batch."""
    sources: list[Source] = []
    texts: list[str] = []
    origin: list[tuple[float | None, int | None]] = []
    owners: list[Unit] = []
    refused: list[tuple[Unit, Scored]] = []
    raw: dict[int, list[dict[str, Any]]] = {}
    for unit in units:
        rows = raw.setdefault(unit.row, _listed(batch, "tmp.candidates", unit.row))
        seen: set[str] = set()
        for candidate in (c for c in rows if c["segment"] == unit.segment):
            form = normal_form(candidate["text"])
            if form in seen:
                continue
            seen.add(form)
            trial = Trial(candidate["text"], 1.0, 0.0, candidate["parsed"])
            hopeless = failed_conditions(unit.source, trial, judge.options, only=frozenset())
            if hopeless:  # no whole answer: there is nothing to measure
                nan = float("nan")
                scored = Scored(
                    trial.text,
                    candidate["temperature"],
                    candidate["seed"],
                    None,
                    nan,
                    nan,
                    nan,
                    tuple(hopeless),
                )
                refused.append((unit, scored))
                continue
            owners.append(unit)
            sources.append(unit.source)
            texts.append(candidate["text"])
            origin.append((candidate["temperature"], candidate["seed"]))
    for unit, scored in zip(owners, judge.measure(sources, texts, origin=origin), strict=True):
        unit.candidates.append(scored)
    for unit in units:
        unit.candidates.sort(
            key=lambda c: -c.fusion
        )  # stable: the order of temperature and index breaks ties
    for unit, scored in refused:
        unit.candidates.append(scored)


def recheck(
    units: Sequence[Unit], documents: dict[int, Document], judge: Judge, segmenting: SegmentOptions
) -> tuple[list[Unit], dict[int, list[FloatArray]]]:
    """Segment and score the changed texts once more.

    Returns:
        The units whose replacement lies in a segment that is toxic after all, and by row the labels of every
        segment that was not in the original.
    """
    texts: list[str] = []
    places: list[tuple[int, int, int]] = []
    mine: dict[int, list[Unit]] = {row: [] for row in documents}
    for unit in units:
        mine[unit.row].append(unit)
    changed: dict[int, list[tuple[Unit, int, int]]] = {}
    for row, document in documents.items():
        if any(u.outcome is not None and u.outcome.action == "drop_document" for u in mine[row]):
            continue
        edits = make_edits(mine[row], document)
        final = apply_edits(document.text, [e for _, e in edits])
        if final == document.text:
            continue
        ranges = edited_ranges([e for _, e in edits])
        changed[row] = [(u, a, b) for (u, _), (a, b) in zip(edits, ranges, strict=True)]
        known = {document.text[a:b].strip() for a, b in document.segments}
        for start, end in segment_spans(final, segmenting):
            a, b = core(final, start, end)
            if b > a and final[a:b] not in known:
                texts.append(final[a:b])
                places.append((row, a, b))
    labels, scores = judge.toxicity(texts)
    failed: dict[int, Unit] = {}
    found: dict[int, list[FloatArray]] = {row: [] for row in changed}
    for i, (row, start, end) in enumerate(places):
        found[row].append(labels[i])
        if scores[i] >= judge.options.toxicity_limit:
            for unit, a, b in changed[row]:
                kept = unit.outcome is None or unit.outcome.action == "flag"
                if not kept and a < max(end, start + 1) and start <= b:
                    failed[id(unit)] = unit
    return list(failed.values()), found


def make_edits(units: Sequence[Unit], document: Document) -> list[tuple[Unit, dict[str, Any]]]:
    """The edits of one document, ascending: start, end, before, after and action of each unit's outcome."""
    dropped = [
        u.segment for u in units if u.segment is not None and u.outcome and u.outcome.action == "drop_segment"
    ]
    ranges = removal_ranges(document.text, document.segments, sorted(s for s in dropped if s is not None))
    out = []
    for unit in sorted(units, key=lambda u: u.start):
        outcome = unit.outcome
        if outcome is None:
            continue
        start, end = unit.start, unit.end
        if outcome.action == "drop_segment" and unit.segment is not None:
            start, end = ranges[unit.segment]
        edit = {"start": start, "end": end, "before": document.text[start:end], "after": outcome.after}
        out.append((unit, {"segment": unit.segment, "action": outcome.action, **edit}))
    return out


def _unit(
    row: int,
    segment: int | None,
    text: str,
    start: int,
    end: int,
    labels: Sequence[FloatArray],
    columns: Sequence[int],
    spans: Sequence[tuple[int, int, float, str]],
) -> Unit:
    inside = [s for s in spans if s[0] < end and start < s[1]]
    relative = tuple((max(s[0], start) - start, min(s[1], end) - start) for s in inside)
    worst = np.max(labels, axis=0) if labels else None
    toxicity = float(worst[list(columns)].max()) if worst is not None else 1.0
    return Unit(row, segment, start, end, Source(text[start:end], toxicity, relative), worst, inside)


def _write(
    batch: pa.RecordBatch,
    text_column: str,
    by_row: dict[int, list[Unit]],
    documents: dict[int, Document],
    rechecked: dict[int, list[FloatArray]],
    judge: Judge,
    stage: str,
) -> pa.RecordBatch:
    n = batch.num_rows
    edits: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    reasons: list[str | None] = [None] * n
    final: dict[int, str] = {}
    after = _before_is_after(flight.attribute(batch, "toxicity"))
    for row, units in by_row.items():
        document = documents[row]
        made = make_edits(units, document)
        if any(edit["action"] == "drop_document" for _, edit in made):
            reasons[row] = DROP_REASON
            # The document goes to dropped/ as it was: what else would have been changed in it was not.
            made = [(u, {**e, "action": "drop_document", "after": e["before"]}) for u, e in made]
            after[row] = None
        else:
            text = apply_edits(document.text, [e for _, e in made])
            if text != document.text:
                final[row] = text
            after[row] = _after(batch, row, units, rechecked.get(row), judge)
        edits[row] = [_record(batch, row, unit, edit, judge) for unit, edit in made]
    if final:
        batch = _replace_texts(batch, text_column, final)
    batch = flight.set_attribute(batch, "toxicity_after", pa.array(after, AFTER_TYPE))
    if documents:
        batch = flight.add_edits(batch, edits)
    return flight.drop_rows(batch, reasons, stage=stage) if any(reasons) else batch


def _record(
    batch: pa.RecordBatch, row: int, unit: Unit, edit: dict[str, Any], judge: Judge
) -> dict[str, Any]:
    scored = (
        unit.outcome.scored if unit.outcome is not None and edit["action"] == unit.outcome.action else None
    )
    unchanged = unit if edit["before"] == edit["after"] else None
    labels_after = unchanged.labels if unchanged else scored.labels if scored else None
    rewriter = _scalar(batch, "tmp.rewriter", row) or {}
    return {
        **edit,
        "toxicity_before": unit.source.toxicity if unit.labels is not None else None,
        "toxicity_after": unit.source.toxicity if unchanged else scored.toxicity if scored else None,
        "similarity": 1.0 if unchanged else _number(scored.similarity if scored else None),
        "labels": list(judge.scorer.labels),
        "scores_before": _list(unit.labels),
        "scores_after": _list(labels_after),
        "spans": [dict(zip(("start", "end", "score", "source"), s, strict=True)) for s in unit.spans],
        "candidates": [
            {
                "text": c.text,
                "toxicity": _number(c.toxicity),
                "similarity": _number(c.similarity),
                "fusion": _number(c.fusion),
                "temperature": c.temperature,
                "reasons": list(c.reasons),
            }
            for c in unit.candidates
        ],
        "temperature": scored.temperature if scored else None,
        "seed": scored.seed if scored else None,
        "scorer": judge.scorer.info.tag,
        "model": rewriter.get("model"),
        "prompt": rewriter.get("prompt"),
    }


def _before_is_after(toxicity: pa.Array) -> list[dict[str, Any] | None]:
    """For rows that stay as they are: the score they had, and the maximum of each label over their segments."""
    out: list[dict[str, Any] | None] = []
    segments = pc.struct_field(toxicity, "segments")
    for row, score in enumerate(pc.struct_field(toxicity, "score")):
        if not toxicity[row].is_valid:
            out.append(None)
            continue
        measured = segments[row].values.field("labels").drop_null()
        labels = _matrix(measured)
        out.append({"score": score.as_py(), "labels": _list(labels.max(axis=0)) if len(labels) else None})
    return out


def _after(
    batch: pa.RecordBatch, row: int, units: Sequence[Unit], rechecked: list[FloatArray] | None, judge: Judge
) -> dict[str, Any]:
    segments = flight.attribute(batch, "toxicity")[row]["segments"].as_py()
    replaced = {u.segment for u in units if u.outcome is not None and u.outcome.action != "flag"}
    whole = None in replaced
    labels = [
        np.array(s["labels"], np.float32)
        for i, s in enumerate(segments)
        if s["labels"] and not whole and i not in replaced
    ]
    if rechecked is not None:
        labels += rechecked
    else:
        labels += [u.outcome.scored.labels for u in units if _measured(u.outcome)]  # type: ignore[union-attr,misc]
    if not labels:
        return {"score": 0.0, "labels": None}
    worst = np.max(labels, axis=0)
    return {"score": float(worst[judge.columns].max()), "labels": _list(worst)}


def _measured(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.scored is not None and outcome.scored.labels is not None


def _replace_texts(batch: pa.RecordBatch, text_column: str, final: dict[int, str]) -> pa.RecordBatch:
    index = batch.schema.get_field_index(text_column)
    field, column = batch.schema.field(index), batch.column(index)
    mask = np.zeros(batch.num_rows, np.bool_)
    rows = sorted(final)
    mask[rows] = True
    replacements = pa.array([final[r] for r in rows], field.type)
    values = pc.replace_with_mask(column, pa.array(mask), replacements)
    return batch.set_column(index, field, values)


def _listed(batch: pa.RecordBatch, name: str, row: int) -> list[dict[str, Any]]:
    return _scalar(batch, name, row) or []


def _scalar(batch: pa.RecordBatch, name: str, row: int) -> Any:
    index = batch.schema.get_field_index(flight.PREFIX + name)
    return None if index < 0 else batch.column(index)[row].as_py()


def _matrix(labels: pa.Array) -> FloatArray:
    flat: FloatArray = labels.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(labels), -1) if len(labels) else np.empty((0, 0), np.float32)


def _number(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value


def _list(values: FloatArray | None) -> list[float] | None:
    return None if values is None else [float(v) for v in values]
