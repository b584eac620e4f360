"""Accept: rank the candidates, keep what meets every condition, send the rest down the ladder, put texts together.

Everything is measured in a few calls over the whole batch. Each change is one edit (`schemas.edits`), in offsets of
the original text; a changed text is segmented and scored once more, and a change that does not hold goes further down
the ladder.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from models.protocols import Encoder, ToxicityScorer
from schemas import flight
from transforms.detox.assemble import recheck
from transforms.detox.checks import Source, Trial, failed_conditions, normal_form
from transforms.detox.ladder import Document, FloatArray, Judge, Scored, Unit, descend
from transforms.detox.localize import flagged_rows
from transforms.detox.options import (
    ACCEPT_DEFAULTS,
    GATE_DEFAULTS,
    SEGMENT_DEFAULTS,
    AcceptOptions,
    GateOptions,
    SegmentOptions,
)
from transforms.detox.record import label_matrix, listed, write_outcomes
from transforms.detox.rewrite import core
from transforms.shards.cache import RequestCache

Count = Callable[[str, int], None]


def accept_rewrites(
    batch: pa.RecordBatch,
    *,
    text_column: str,
    scorer: ToxicityScorer,
    encoder: Encoder | None,
    lexicon: ToxicityScorer | None = None,
    fluency: ToxicityScorer | None = None,
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
        lexicon: Word list whose strong words no replacement may hold; None = none.
        fluency: What candidates are ranked by, beside similarity and toxicity, as `options.fluency_weight` says; None = not.
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
    judge = Judge(scorer, encoder, options.under(gate), gate.labels, cache, lexicon, fluency)
    documents, units = collect_units(batch, text_column, judge)
    rank_candidates(batch, units, judge)
    count("accept.candidates", sum(len(u.candidates) for u in units))
    for reason, n in Counter(r for u in units for c in u.candidates for r in c.reasons).items():
        count(f"reject.{reason}", n)
    by_row: dict[int, list[Unit]] = {row: [] for row in documents}
    for unit in units:
        by_row[unit.row].append(unit)
    rechecked: dict[int, list[FloatArray]] = {}
    descend(units, documents, judge)
    while options.recheck and documents:
        failed, rechecked = recheck(by_row, documents, judge, segmenting)
        if not failed:
            break
        count("accept.recheck_failed", len(failed))
        for unit in failed:
            unit.outcome = None
        descend(units, documents, judge)
    count("accept.units", len(units))
    for action, n in Counter(u.outcome.action for u in units if u.outcome is not None).items():
        count(f"accept.{action}", n)
    return write_outcomes(batch, text_column, by_row, documents, rechecked, judge, stage=stage)


def collect_units(
    batch: pa.RecordBatch, text_column: str, judge: Judge
) -> tuple[dict[int, Document], list[Unit]]:
    """The documents with something flagged, by row, and their units: whole texts where those were rewritten."""
    column, toxicity = batch.column(text_column), flight.attribute(batch, "toxicity")
    documents: dict[int, Document] = {}
    units: list[Unit] = []
    for row in flagged_rows(toxicity):
        text, segments = column[row].as_py(), toxicity[row]["segments"].values
        starts, ends = (segments.field(k).to_numpy().astype(np.int64) for k in ("start", "end"))
        flagged = np.flatnonzero(segments.field("flagged").to_numpy(zero_copy_only=False)).tolist()
        documents[row] = Document(text, starts, ends, tuple(flagged))
        scored = segments.field("labels").take(pa.array(flagged, pa.int64()))
        spans = [(s["start"], s["end"], s["score"], s["source"]) for s in listed(batch, "attr.spans", row)]
        if any(c["segment"] is None for c in listed(batch, "tmp.candidates", row)):
            start, end = core(text, 0, len(text))
            labels = label_matrix(scored.drop_null())
            units.append(_unit(row, None, text, start, end, labels, judge.columns, spans))
            continue
        for position, i in enumerate(flagged):
            start, end = core(text, int(starts[i]), int(ends[i]))
            if end > start:  # what is flagged without a look (gate "none") may be blank
                labels = label_matrix(scored.slice(position, 1).drop_null())
                units.append(_unit(row, i, text, start, end, labels, judge.columns, spans))
    return documents, units


def rank_candidates(batch: pa.RecordBatch, units: Sequence[Unit], judge: Judge) -> None:
    """Give every unit its distinct candidates, measured, best fusion score first; two calls over the batch."""
    trials: list[tuple[Unit, str, tuple[float | None, int | None]]] = []
    refused: list[tuple[Unit, Scored]] = []
    answers: dict[int, dict[int | None, list[dict[str, Any]]]] = {}
    for unit in units:
        if unit.row not in answers:
            answers[unit.row] = defaultdict(list)
            for candidate in listed(batch, "tmp.candidates", unit.row):
                answers[unit.row][candidate["segment"]].append(candidate)
        seen: set[tuple[str, bool]] = set()
        for candidate in answers[unit.row][unit.segment]:
            text, origin = candidate["text"], (candidate["temperature"], candidate["seed"])
            form = (
                normal_form(text),
                candidate["parsed"],
            )  # a whole answer is none with one that was cut off
            if form in seen:
                continue
            seen.add(form)
            trial = Trial(text, 1.0, 0.0, candidate["parsed"])
            hopeless = failed_conditions(unit.source, trial, judge.options, only=frozenset())
            if hopeless:  # no whole answer: there is nothing to measure
                nan = float("nan")
                refused.append((unit, Scored(text, *origin, None, nan, nan, nan, tuple(hopeless))))
            else:
                trials.append((unit, text, origin))
    measured = judge.measure(
        [u.source for u, _, _ in trials], [t for _, t, _ in trials], origin=[o for _, _, o in trials]
    )
    for (unit, _, _), scored in zip(trials, measured, strict=True):
        unit.candidates.append(scored)
    for unit in units:
        unit.candidates.sort(key=lambda c: -c.fusion)  # stable: the order of sampling breaks ties
    for unit, scored in refused:
        unit.candidates.append(scored)


def _unit(
    row: int,
    segment: int | None,
    text: str,
    start: int,
    end: int,
    labels: FloatArray,
    columns: Sequence[int],
    spans: Sequence[tuple[int, int, float, str]],
) -> Unit:
    """A unit with its toxic spans (of the document's, which are ascending and disjoint) and its worst score."""
    first = bisect_left(spans, start, key=lambda s: s[1] - 1)
    inside = list(spans[first : bisect_left(spans, end, key=lambda s: s[0])])
    relative = tuple((max(s[0], start) - start, min(s[1], end) - start) for s in inside)
    worst = labels.max(axis=0) if len(labels) else None
    toxicity = float(worst[list(columns)].max()) if worst is not None else 1.0
    return Unit(row, segment, start, end, Source(text[start:end], toxicity, relative), worst, inside)
