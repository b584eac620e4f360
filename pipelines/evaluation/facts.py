"""Facts of a finished detox output: what each rung of the ladder kept of numbers, names, addresses and negations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.metrics.bootstrap import Interval, ratio_interval, share_interval
from pipelines.report.output import TEXT_ROWS, Output
from schemas.errors import InputError
from transforms.evaluation.facts import FACTS, FactCount, count_facts

ALL = "all edits"
_COLUMNS = ["id", "start", "before", "after", "action", "spans"]
_ORDER = ("rewrite", "span_edit", "redact", "drop_segment", "drop_document")


@dataclass(frozen=True)
class FactRow:
    """One rung (or all).

    Attributes:
        action: The rung.
        edits: Edits it made.
        there: Facts of each kind in what it replaced.
        kept: Share of these still there, drawn by edit; None where there were none.
        whole: Share of its edits that lost and invented nothing.
        invented: Numbers and addresses that are new.
    """

    action: str
    edits: int
    there: dict[str, int]
    kept: dict[str, Interval | None]
    whole: Interval
    invented: int


@dataclass(frozen=True)
class FactTable:
    """All of an output.

    Attributes:
        rows: All edits first, then by rung.
        edits: Edits counted.
        documents_dropped: Documents that are gone as a whole.
        items: Columns of one row an edit.
        kinds: The kinds of facts.
    """

    rows: list[FactRow]
    edits: int
    documents_dropped: int
    items: dict[str, list[Any]] = field(repr=False)
    kinds: tuple[str, ...] = FACTS

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "edits": self.edits,
            "documents_dropped": self.documents_dropped,
            "rungs": {
                r.action: {
                    "edits": r.edits,
                    "there": r.there,
                    "kept": {k: None if v is None else v.as_dict() for k, v in r.kept.items()},
                    "nothing_lost_or_made_up": r.whole.as_dict(),
                    "invented": r.invented,
                }
                for r in self.rows
            },
        }


def count_output(
    url: str, options: Mapping[str, Any] | None = None, *, seed: int = 0, draws: int = 2000
) -> FactTable:
    """Count the facts of every edit of a finished detox output.

    A flagged passage was not changed, and is left out. Of a dropped document everything is lost.

    Raises:
        InputError: The output holds no edits.
        OutputError: It is no output, or not finished.
    """
    output = Output(url, options)
    output.require_manifest()
    if not output.files("edits"):
        raise InputError(f"{url} holds no edits (tamis detox writes them); there are no facts to compare")
    items: dict[str, list[Any]] = {"id": [], "start": [], "action": []}
    counts: list[FactCount] = []
    for _, batch in output.batches("edits", _leaves(output), batch_rows=TEXT_ROWS):
        for edit in batch.to_pylist():
            if edit["action"] == "flag":
                continue
            counts.append(_count(edit))
            for name in items:
                items[name].append(edit[name])
    if not counts:
        raise InputError(f"{url}: no passage was changed, so there are no facts to compare")
    there = np.array([c.there for c in counts])
    kept = np.array([c.kept for c in counts])
    whole = np.array([c.whole for c in counts], np.float64)
    invented = np.array([c.invented for c in counts])
    for i, kind in enumerate(FACTS):
        items[kind], items[f"{kind}_kept"] = there[:, i].tolist(), kept[:, i].tolist()
    items["invented"] = invented.tolist()
    actions = np.array(items["action"])
    known = [a for a in _ORDER if a in actions] + sorted(set(actions.tolist()) - set(_ORDER))
    rows = []
    for action in [ALL, *known]:
        mine = np.ones(len(counts), bool) if action == ALL else actions == action
        shares = {
            kind: ratio_interval(kept[mine, i], there[mine, i], seed, draws) if there[mine, i].sum() else None
            for i, kind in enumerate(FACTS)
        }
        rows.append(
            FactRow(
                action,
                int(mine.sum()),
                {kind: int(there[mine, i].sum()) for i, kind in enumerate(FACTS)},
                shares,
                share_interval(whole[mine], seed, draws),
                int(invented[mine].sum()),
            )
        )
    return FactTable(rows, len(counts), int((actions == "drop_document").sum()), items)


def _leaves(output: Output) -> list[str]:
    return [leaf for leaf in output.leaves("edits") if leaf.split(".")[0] in _COLUMNS]


def _count(edit: Mapping[str, Any]) -> FactCount:
    spans = [(s["start"] - edit["start"], s["end"] - edit["start"]) for s in edit["spans"] or []]
    after = "" if edit["action"] == "drop_document" else edit["after"]
    return count_facts(edit["before"], after, spans)
