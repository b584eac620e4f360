"""Statistics of the edits of a job, and the few of them a person will look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.output import TEXT_ROWS, Output
from pipelines.report.stats import Floats, Histogram, Smallest, field_of, numbers, row_hashes

POINTS = 1_200
_NUMERIC = (
    "row", "segment", "start", "end", "action", "toxicity_before", "toxicity_after", "similarity", "labels.",
    "scores_before.", "scores_after.", "temperature", "scorer", "model", "prompt", "candidates.",
)  # fmt: skip
# In the order of the ladder (transforms.detox): the less of the text survives, the further down.
ACTIONS = ("rewrite", "span_edit", "redact", "drop_segment", "drop_document", "flag")
REWRITTEN = ("rewrite", "span_edit", "redact")
_IN_TEXT = (*REWRITTEN, "drop_segment")  # actions that leave their mark on a text in data/


@dataclass
class LabelScores:
    """Histograms of one label over the edited segments."""

    before: Histogram = field(default_factory=lambda: Histogram(bins=10))
    after: Histogram = field(default_factory=lambda: Histogram(bins=10))


@dataclass
class EditStats:
    """What a job changed.

    Attributes:
        actions: Edits by action.
        reasons: Candidates by the condition they failed (one candidate may fail several).
        candidates: Candidates by `passed`, `chosen` or `rejected`, and `all`.
        temperatures: Chosen candidates by temperature.
        all_temperatures: All candidates by temperature.
        labels: Scores of the edited segments by label, before and after.
        toxicity_before: Of edits that changed text, by the scorer that ranked them.
        toxicity_after: The same edits' replacements.
        similarity: Of the replacements to what they replaced.
        characters: Characters of the originals that were replaced or removed.
        documents: Number of documents with a change.
        points: Sampled candidates: toxicity, similarity, whether chosen.
        samples: Groups of edits to read, by heading.
    """

    n: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)
    temperatures: Counter[float] = field(default_factory=Counter)
    all_temperatures: Counter[float] = field(default_factory=Counter)
    labels: dict[str, LabelScores] = field(default_factory=dict)
    toxicity_before: Histogram = field(default_factory=Histogram)
    toxicity_after: Histogram = field(default_factory=Histogram)
    similarity: Histogram = field(default_factory=lambda: Histogram(bins=25))
    characters: int = 0
    points: list[tuple[float, float, str]] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    scorers: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)


def edit_stats(output: Output, *, per_group: int = 5) -> EditStats | None:
    """Read the edits once by their numbers, then fetch a few whole ones; None where the job made none.

    Args:
        output: The folder.
        per_group: Edits shown under each heading.
    """
    if not output.files("edits"):
        return None
    leaves = [p for p in output.leaves("edits") if p.startswith(_NUMERIC) and not p.endswith("element.text")]
    stats = EditStats()
    groups = _groups(per_group)
    chosen, others = Smallest(POINTS // 3), Smallest(POINTS)
    offsets: Counter[str] = Counter()
    for name, batch in output.batches("edits", leaves, batch_rows=8_192):
        first = offsets[name]
        offsets[name] += batch.num_rows
        stats.n += batch.num_rows
        refs = [(name, first + i) for i in range(batch.num_rows)]
        positions = np.arange(first, first + batch.num_rows)
        _add_numbers(stats, batch)
        _add_labels(stats, batch)
        _add_candidates(stats, batch, name, positions, chosen, others)
        _offer(groups, batch, refs, row_hashes(name, positions))
    if not stats.n:
        return None
    stats.points = [(t, s, "chosen") for t, s in chosen.items]
    stats.points += [(t, s, "not chosen") for t, s in others.items[: POINTS - len(stats.points)]]
    stats.samples = _fetch(output, _distinct(groups, per_group))
    return stats


def _groups(k: int) -> dict[str, Smallest]:
    titles = (
        "At random",
        "Most improved",
        "Least similar",
        "Redacted or removed",
        "Kept and flagged",
        "Dropped with the document",
    )
    return {
        title: Smallest(k * len(titles)) for title in titles
    }  # some of each will stand in an earlier group


def _add_numbers(stats: EditStats, batch: pa.RecordBatch) -> None:
    actions = batch.column("action").to_pylist()
    stats.actions.update(actions)
    changed = np.isin(actions, _IN_TEXT)
    replaced = np.array([a in REWRITTEN for a in actions], bool)
    stats.toxicity_before.add(numbers(batch.column("toxicity_before"))[replaced])
    stats.toxicity_after.add(numbers(batch.column("toxicity_after"))[replaced])
    stats.similarity.add(numbers(batch.column("similarity"))[replaced])
    length = numbers(batch.column("end")) - numbers(batch.column("start"))
    stats.characters += int(length[changed].sum())
    for counter, column in ((stats.scorers, "scorer"), (stats.models, "model"), (stats.prompts, "prompt")):
        counter.update(v for v in batch.column(column).to_pylist() if v)
    chosen = [a == "rewrite" for a in actions]
    for temperature, won in zip(batch.column("temperature").to_pylist(), chosen, strict=True):
        if won and temperature is not None:
            stats.temperatures[round(temperature, 3)] += 1


def _add_labels(stats: EditStats, batch: pa.RecordBatch) -> None:
    labels, before, after = (batch.column(c) for c in ("labels", "scores_before", "scores_after"))
    actions = batch.column("action").to_pylist()
    keys: dict[tuple[str, ...], list[int]] = {}
    for i, names in enumerate(labels.to_pylist()):
        if names and actions[i] in REWRITTEN:
            keys.setdefault(tuple(names), []).append(i)
    for names, rows in keys.items():
        index = pa.array(rows)
        for scores, side in ((before, "before"), (after, "after")):
            picked = scores.take(index)
            full = pc.fill_null(pc.equal(pc.list_value_length(picked), len(names)), False)
            flat = numbers(pc.list_flatten(picked.filter(full))).reshape(-1, len(names))
            for j, name in enumerate(names):
                getattr(stats.labels.setdefault(name, LabelScores()), side).add(flat[:, j])


def _add_candidates(
    stats: EditStats,
    batch: pa.RecordBatch,
    name: str,
    positions: np.ndarray,
    chosen: Smallest,
    others: Smallest,
) -> None:
    lists = batch.column("candidates")
    flat = pc.list_flatten(lists)
    if not len(flat):
        return
    lengths = np.nan_to_num(numbers(pc.list_value_length(lists))).astype(np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    reasons = field_of(flat, "reasons")
    if reasons is not None:
        counts = pc.value_counts(pc.list_flatten(reasons)).to_pylist()
        stats.reasons.update({c["values"]: c["counts"] for c in counts})
    passed = (
        np.nan_to_num(numbers(None if reasons is None else pc.list_value_length(reasons), len(flat))) == 0
    )
    toxicity, similarity = (
        numbers(field_of(flat, "toxicity"), len(flat)),
        numbers(field_of(flat, "similarity"), len(flat)),
    )
    won = _is_chosen(batch, owner, toxicity, similarity, passed)
    stats.candidates["all"] += len(flat)
    stats.candidates["passed"] += int(passed.sum())
    stats.candidates["rejected"] += int((~passed).sum())
    temperature = field_of(flat, "temperature")
    if temperature is not None:
        values = np.round(numbers(temperature), 3)
        kinds, n = np.unique(values[~np.isnan(values)], return_counts=True)
        stats.all_temperatures.update(dict(zip(kinds.tolist(), n.tolist(), strict=True)))
    known = ~(np.isnan(toxicity) | np.isnan(similarity))
    keys = row_hashes(name, positions[owner] * 64 + _within(lengths), salt=1)
    pairs = list(zip(toxicity.tolist(), similarity.tolist(), strict=True))
    chosen.offer(np.where(known & won, keys, np.nan), pairs)
    others.offer(np.where(known & ~won, keys, np.nan), pairs)


def _within(lengths: np.ndarray) -> np.ndarray:
    first = np.cumsum(lengths) - lengths
    within: np.ndarray = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    return within


def _is_chosen(
    batch: pa.RecordBatch, owner: np.ndarray, toxicity: Floats, similarity: Floats, passed: np.ndarray
) -> np.ndarray:
    """The candidate an edit took: the one that passed and has the edit's own scores (the first of equals)."""
    rewrite = np.array([a == "rewrite" for a in batch.column("action").to_pylist()], bool)
    same = (
        rewrite[owner]
        & passed
        & np.isclose(toxicity, numbers(batch.column("toxicity_after"))[owner], atol=1e-6)
        & np.isclose(similarity, numbers(batch.column("similarity"))[owner], atol=1e-6)
    )
    hits = np.flatnonzero(same)
    _, first = np.unique(owner[hits], return_index=True)
    out = np.zeros(len(owner), bool)
    out[hits[first]] = True
    return out


def _offer(
    groups: Mapping[str, Smallest], batch: pa.RecordBatch, refs: Sequence[tuple[str, int]], hashes: Floats
) -> None:
    action = np.array(batch.column("action").to_pylist(), object)
    replaced = np.isin(action, REWRITTEN)
    before, after = numbers(batch.column("toxicity_before")), numbers(batch.column("toxicity_after"))
    similarity = numbers(batch.column("similarity"))
    tie = hashes * 1e-6  # equals are drawn by hash, not by position
    keys = {
        "At random": np.where(replaced, hashes, np.nan),
        "Most improved": np.where(replaced, after - before + tie, np.nan),
        "Least similar": np.where(replaced, similarity + tie, np.nan),
        "Kept and flagged": np.where(action == "flag", hashes, np.nan),
        "Dropped with the document": np.where(action == "drop_document", hashes, np.nan),
        "Redacted or removed": np.where(np.isin(action, ("redact", "drop_segment")), hashes, np.nan),
    }
    for title, kept in groups.items():
        kept.offer(keys[title], refs)


def _fetch(output: Output, wanted: Mapping[str, list[tuple[str, int]]]) -> dict[str, list[dict[str, Any]]]:
    """Read the chosen edits whole, each file once."""
    by_file: dict[str, set[int]] = {}
    for refs in wanted.values():
        for name, position in refs:
            by_file.setdefault(name, set()).add(position)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, positions in by_file.items():
        first = 0
        for batch in output.read(name, batch_rows=TEXT_ROWS):
            here = [p for p in sorted(positions) if first <= p < first + batch.num_rows]
            if here:
                rows = batch.take(pa.array([p - first for p in here])).to_pylist()
                found.update({(name, p): row for p, row in zip(here, rows, strict=True)})
            first += batch.num_rows
            if first > max(positions):
                break
    return {title: [found[r] for r in refs] for title, refs in wanted.items()}


def _distinct(groups: Mapping[str, Smallest], k: int) -> dict[str, list[tuple[str, int]]]:
    """The first k of each group that stand in none before it."""
    seen: set[tuple[str, int]] = set()
    out: dict[str, list[tuple[str, int]]] = {}
    for title, kept in groups.items():
        fresh = [r for r in kept.items if r not in seen][:k]
        seen.update(fresh)
        if fresh:
            out[title] = fresh
    return out
