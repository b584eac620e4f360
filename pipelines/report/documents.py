"""Statistics of documents and their segments, from the row-aligned attributes of a job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.edits import REWRITTEN
from pipelines.report.output import Output, read_schema
from pipelines.report.stats import Agreement, Floats, Histogram, Smallest, field_of, numbers, row_hashes

_SAMPLE = 20_000
_TOXICITY, _AFTER = "attributes/toxicity", "attributes/toxicity_after"
_STRUCTURED = {"toxicity", "toxicity_after", "spans"}
SCORERS = ("lexicon", "linear", "classifier")


@dataclass
class DocumentStats:
    """What the toxicity attribute says of a corpus.

    Attributes:
        before: Document scores as they came.
        after: Document scores of the rows that were kept, as they are now.
        kept_before: The same rows' scores before, to compare with `after`.
        flagged_before: Documents with a flagged segment (or score), as they came.
        flagged_after: Of the kept ones, those in which one remains.
        segments: Segments, and of these the ones each stage of the gate scored or flagged.
        characters: Characters of the kept texts, as they came, where they were segmented.
        agreement: Scorers against each other, on segments.
        has_after: Whether anything is known of the state after.
        knows_flags: Whether the attribute says which documents are flagged.
    """

    before: Histogram = field(default_factory=Histogram)
    after: Histogram = field(default_factory=Histogram)
    kept_before: Histogram = field(default_factory=Histogram)
    flagged_before: int = 0
    flagged_after: int = 0
    segments: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    agreement: Agreement = field(default_factory=lambda: Agreement(SCORERS))
    has_after: bool = False
    knows_flags: bool = False


def document_stats(output: Output, tau: float | None = None) -> DocumentStats | None:
    """Read the `toxicity` attribute once; None where the job wrote none.

    Attributes stand beside the rows that were kept; those of dropped and dead rows stand in their own tables, and
    count as before only. Document scores after the job come from the attribute `toxicity_after` if it was written,
    else they are derived: the largest of the segments' scores, with each edited segment's replaced by its edit's.

    Args:
        output: The folder.
        tau: The gate's threshold: a measured score from which on a document counts as flagged after the job.
    """
    leaves = [leaf for leaf in output.leaves(_TOXICITY) if leaf.startswith(("row", "value"))]
    if not leaves:
        return None
    measured = bool(output.files(_AFTER))
    stats = DocumentStats(has_after=measured or bool(output.files("edits")))
    derive = stats.has_after and not measured
    for name in output.files(_TOXICITY):
        changes = _Changes.of(output, name) if derive else None
        for batch in output.read(name, leaves):
            _add_batch(stats, batch.column("value"), _integers(batch.column("row")), changes)
    for table in ("dropped", "dead"):
        for name in output.files(table):
            _add_removed(stats, output, name)
    if measured:
        _add_measured(stats, output, tau)
    return stats


def _add_removed(stats: DocumentStats, output: Output, name: str) -> None:
    column = "attribute.toxicity"
    if column not in read_schema(output.folder, name).names:
        return
    for batch in output.read(
        name
    ):  # a dotted name cannot be asked for alone: Parquet takes the dot for a path
        value = batch.column(batch.schema.get_field_index(column))
        if not pa.types.is_null(value.type):
            _add_batch(stats, value, np.full(len(value), -1), None, kept=False)


def other_attributes(output: Output, shown: frozenset[str] = frozenset()) -> dict[str, Floats]:
    """For every numeric leaf of the attributes not drawn elsewhere, a sample of up to 20,000 values.

    Args:
        output: The folder.
        shown: Attributes that have a place of their own.

    Returns:
        `name` or `name.field` -> values in hash order; attributes without numbers are left out.
    """
    out: dict[str, Floats] = {}
    for name in output.attributes:
        if name in _STRUCTURED or name in shown:
            continue
        kept: dict[str, Smallest] = {}
        for file, batch in output.batches(f"attributes/{name}"):
            hashes = row_hashes(file, numbers(batch.column("row")))
            for label, values in _numeric_leaves(name, batch.column("value")):
                flat = numbers(values)
                kept.setdefault(label, Smallest(_SAMPLE)).offer(
                    np.where(np.isnan(flat), np.nan, hashes), flat.tolist()
                )
        out.update({label: np.array(s.items) for label, s in kept.items() if s.items})
    return out


def _numeric_leaves(name: str, values: pa.Array) -> list[tuple[str, pa.Array]]:
    type_ = values.type
    if pa.types.is_floating(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_):
        return [(name, values)]
    if pa.types.is_struct(type_):
        leaves = []
        for f in type_:
            leaves += _numeric_leaves(f"{name}.{f.name}", pc.struct_field(values, f.name))
        return leaves
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return [(f"{name} (count)", pc.list_value_length(values))]
    return []


@dataclass
class _Changes:
    """The edits of one shard, as numbers: row, segment (NaN: the whole text), score after, whether that settles it."""

    row: npt.NDArray[np.int64]
    segment: Floats
    score: Floats
    settled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, output: Output, file: str) -> _Changes:
        rows, segments, scores, settled = (
            [np.zeros(0, np.int64)],
            [np.zeros(0)],
            [np.zeros(0)],
            [np.zeros(0, bool)],
        )
        name = output.sidecar("edits", file)
        for batch in output.read(name, ["row", "segment", "toxicity_after", "action"]) if name else ():
            gone = np.array([a == "drop_segment" for a in batch.column("action").to_pylist()], bool)
            replaced = np.array([a in REWRITTEN for a in batch.column("action").to_pylist()], bool)
            rows.append(_integers(batch.column("row")))
            segments.append(numbers(batch.column("segment")))
            scores.append(np.where(gone, 0.0, numbers(batch.column("toxicity_after"))))
            settled.append(gone | replaced)
        return cls(
            np.concatenate(rows), np.concatenate(segments), np.concatenate(scores), np.concatenate(settled)
        )


def _integers(values: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(values.to_numpy(zero_copy_only=False), np.int64)


def _add_batch(
    stats: DocumentStats,
    value: pa.Array,
    rows: npt.NDArray[np.int64],
    changes: _Changes | None,
    *,
    kept: bool = True,
) -> None:
    score = numbers(field_of(value, "score") if pa.types.is_struct(value.type) else value, len(value))
    stats.before.add(score)
    if kept:
        stats.kept_before.add(score)
    flagged = field_of(value, "flagged") if pa.types.is_struct(value.type) else None
    stats.flagged_before += int((numbers(flagged, len(value)) == 1).sum())
    stats.knows_flags |= flagged is not None
    segments = field_of(value, "segments") if pa.types.is_struct(value.type) else None
    if segments is None:
        return
    lengths = np.nan_to_num(numbers(pc.list_value_length(segments))).astype(np.int64)
    owner = np.repeat(np.arange(len(value)), lengths)
    seg_score, seg_flagged = _add_segments(stats, pc.list_flatten(segments), owner)
    if kept and len(value):
        stats.characters += int(_lengths(pc.list_flatten(segments), owner, len(value)).sum())
    if changes is not None:
        whole = np.where(lengths == 0, score, 0.0)  # a text that was not segmented has only its own score
        _derive_after(stats, rows, whole, owner, lengths, seg_score, seg_flagged, changes)


def _add_segments(
    stats: DocumentStats, flat: pa.Array, owner: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    n = len(flat)
    score = numbers(field_of(flat, "score"), n)
    flagged = numbers(field_of(flat, "flagged"), n) == 1
    lexicon, linear = numbers(field_of(flat, "lexicon"), n), numbers(field_of(flat, "linear"), n)
    labels = field_of(flat, "labels")
    reached = np.zeros(n, bool) if labels is None else labels.is_valid().to_numpy(zero_copy_only=False)
    counts = {"all": n, "lexicon": (lexicon > 0).sum(), "classifier": reached.sum(), "flagged": flagged.sum()}
    stats.segments.update({k: int(v) for k, v in counts.items()})
    stats.agreement.add([lexicon, linear, np.where(reached, score, np.nan)])
    return score, flagged


def _lengths(flat: pa.Array, owner: npt.NDArray[np.int64], n_rows: int) -> Floats:
    """Characters of each text: where its last segment ends (segments tile the text)."""
    last = np.zeros(n_rows)
    if (ends := field_of(flat, "end")) is not None:
        np.maximum.at(last, owner, np.nan_to_num(numbers(ends)))
    return last


def _derive_after(
    stats: DocumentStats,
    rows: npt.NDArray[np.int64],
    whole: Floats,
    owner: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    score: Floats,
    flagged: npt.NDArray[np.bool_],
    changes: _Changes,
) -> None:
    """Replace edited segments' scores and take each document's maximum again."""
    score, flagged, after = np.nan_to_num(score), flagged.copy(), np.nan_to_num(whole)
    first = np.cumsum(lengths) - lengths
    position = {int(r): i for i, r in enumerate(rows.tolist())}
    for e in np.flatnonzero(np.isin(changes.row, rows) & changes.settled).tolist():
        i, segment = position[int(changes.row[e])], changes.segment[e]
        new = np.nan_to_num(changes.score[e])
        if np.isnan(segment):
            where = slice(first[i], first[i] + lengths[i])
            after[i] = new
        elif segment < lengths[i]:
            where = slice(first[i] + int(segment), first[i] + int(segment) + 1)
        else:
            continue
        score[where], flagged[where] = new, False
    np.maximum.at(after, owner, score)
    still = np.zeros(len(rows), bool)
    np.logical_or.at(still, owner, flagged)
    stats.after.add(after)
    stats.flagged_after += int(still.sum())


def _add_measured(stats: DocumentStats, output: Output, tau: float | None) -> None:
    leaves = [leaf for leaf in output.leaves(_AFTER) if leaf in ("value", "value.score", "value.flagged")]
    for _, batch in output.batches(_AFTER, leaves):
        value = batch.column("value")
        struct = pa.types.is_struct(value.type)
        score = numbers(field_of(value, "score") if struct else value, len(value))
        stats.after.add(score)
        flagged = field_of(value, "flagged") if struct else None
        if flagged is not None:
            stats.flagged_after += int((numbers(flagged) == 1).sum())
        elif tau is not None:
            stats.flagged_after += int((score >= np.float32(tau)).sum())
        else:
            stats.knows_flags = False
