"""Texts put together from the outcomes of their units, and looked at once more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.detox.ladder import Document, FloatArray, Judge, Unit
from transforms.detox.options import SegmentOptions
from transforms.detox.removal import removal_ranges
from transforms.detox.rewrite import core
from transforms.detox.segment import segment_ends
from transforms.edits import apply_edits

Edit = Mapping[str, Any]


@dataclass(frozen=True)
class Assembled:
    """A document with the outcomes of its units put in.

    Attributes:
        text: The final text; the original where the document is dropped.
        dropped: Whether the document is dropped.
        edits: Each unit's edit (segment, action, start, end, before, after; offsets of the original), ascending.
    """

    text: str
    dropped: bool
    edits: list[tuple[Unit, dict[str, Any]]]


def assemble(units: Sequence[Unit], document: Document) -> Assembled:
    """Put the outcomes of a document's units into its text."""
    gone = [u.segment for u in units if u.segment is not None and _is(u, "drop_segment")]
    ranges = removal_ranges(
        document.text, document.starts, document.ends, sorted(s for s in gone if s is not None)
    )
    dropped = any(_is(u, "drop_document") for u in units)
    edits = []
    for unit in sorted(units, key=lambda u: u.start):
        outcome = unit.outcome
        if outcome is None:
            continue
        start, end, after, action = unit.start, unit.end, outcome.after, outcome.action
        if action == "drop_segment" and unit.segment is not None and not dropped:
            start, end = ranges[unit.segment]
        before = document.text[start:end]
        if dropped:  # it goes to dropped/ as it was: what else would have been changed in it was not
            after, action = before, "drop_document"
        edits.append(
            (
                unit,
                {
                    "segment": unit.segment,
                    "action": action,
                    "start": start,
                    "end": end,
                    "before": before,
                    "after": after,
                },
            )
        )
    text = document.text if dropped else apply_edits(document.text, [e for _, e in edits])
    return Assembled(text, dropped, edits)


def recheck(
    units: Mapping[int, Sequence[Unit]],
    documents: Mapping[int, Document],
    judge: Judge,
    segmenting: SegmentOptions,
) -> tuple[list[Unit], dict[int, list[FloatArray]]]:
    """Segment the changed texts once more and score what a change has touched, in one call.

    Args:
        units: By row, each with an outcome.
        documents: By row.
        judge: Scorer and threshold.
        segmenting: How the originals were cut.

    Returns:
        The units whose replacement lies in a segment that is toxic after all, and by row the labels of every
        segment that a change has touched.
    """
    texts: list[str] = []
    places: list[tuple[int, list[Unit]]] = []
    for row, document in documents.items():
        final = assemble(units[row], document)
        if final.text == document.text:
            continue
        touched: dict[int, list[Unit]] = defaultdict(list)
        ends = segment_ends(final.text, segmenting)
        starts = np.concatenate([[0], ends[:-1]])
        for unit, (start, end) in zip(
            (u for u, _ in final.edits), edited_ranges([e for _, e in final.edits]), strict=True
        ):
            if not _is(unit, "flag"):
                for i in _touched(starts, ends, start, end):
                    touched[i].append(unit)
        for i, owners in sorted(touched.items()):
            a, b = core(final.text, int(starts[i]), int(ends[i]))
            if b > a:
                texts.append(final.text[a:b])
                places.append((row, owners))
    labels, scores = judge.toxicity(texts)
    failed: dict[int, Unit] = {}
    found: dict[int, list[FloatArray]] = defaultdict(list)
    for i, (row, owners) in enumerate(places):
        found[row].append(labels[i])
        if scores[i] >= judge.options.toxicity_limit:
            failed.update((id(unit), unit) for unit in owners)
    return list(failed.values()), dict(found)


def edited_ranges(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Where the edits, ascending, ended up in the edited text."""
    out = []
    shift = 0
    for edit in edits:
        start = edit["start"] + shift
        out.append((start, start + len(edit["after"])))
        shift += len(edit["after"]) - len(edit["before"])
    return out


def _touched(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], start: int, end: int) -> range:
    """Segments that overlap [start, end); of an empty range (something cut), the one it lies inside of."""
    if end > start:
        return range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left")))
    first = int(np.searchsorted(ends, start, "right"))
    inside = first < len(starts) and starts[first] < start < ends[first]
    return range(first, first + int(inside))


def _is(unit: Unit, action: str) -> bool:
    return unit.outcome is not None and unit.outcome.action == action
