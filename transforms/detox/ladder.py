"""The fallback ladder: what becomes of a unit, rung by rung, until one rung's product is good enough.

A *unit* is what is replaced as one: a flagged segment without its surrounding whitespace, or a whole text. All units
of a batch go down the ladder together, so each rung costs one call of the scorer and one of the encoder.

    candidate      the best-ranked candidate that meets every hard condition
    span_edit      the toxic spans changed as little as possible (transforms.detox.span_edits)
    redact         the toxic spans replaced by a token
    drop_segment   the segment cut, where readable text remains in the document
    drop_document  the document dropped
    flag           kept as it is, and said so
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from models.protocols import Encoder, ToxicityScorer
from schemas.errors import ModelError
from transforms.detox.checks import Source, Trial, failed_conditions
from transforms.detox.gate import label_columns
from transforms.detox.options import AcceptOptions
from transforms.detox.removal import without_segments
from transforms.detox.span_edits import join_spans, minimal_edits, redact_spans
from transforms.requests import score_cached, similarity_cached
from transforms.shards.cache import RequestCache

FloatArray = npt.NDArray[np.float32]

# A minimal edit changes nothing but the spans: its length and language are the source's.
_EDIT_CONDITIONS = frozenset(
    {"toxicity", "improvement", "similarity", "lexicon", "disguise", "numbers", "names", "urls", "negation"}
)
# Candidates from which nothing is taken over: they are no rewriting of the source.
_UNFIT = frozenset({"unparsed", "empty", "copy", "too_far", "refusal", "meta", "language"})
# Where everything is flagged (gate "none"), some units score as harmless. A candidate may still improve them; but
# nothing is cut out of, or dropped for, a text in which the scorer sees nothing wrong: it is kept, and said so.
_HARMLESS_RUNGS = frozenset({"candidate", "flag"})
_REDACTION_CONDITIONS = frozenset({"toxicity", "improvement", "lexicon"})


@dataclass(frozen=True)
class Scored:
    """A candidate with all that was measured of it.

    Attributes:
        text: The candidate.
        temperature: It was sampled at; None where it was not sampled.
        seed: Its seed; likewise.
        labels: All labels of the scorer; None where it was not scored (not parsed, or empty).
        toxicity: Its score.
        similarity: Cosine to the source.
        fusion: What it is ranked by: (1 - lambda) * similarity - lambda * toxicity, and weight * fluency where that counts.
        reasons: The hard conditions it fails.
        fluency: How much it reads like a whole sentence; NaN where that does not count.
    """

    text: str
    temperature: float | None
    seed: int | None
    labels: FloatArray | None
    toxicity: float
    similarity: float
    fusion: float
    reasons: tuple[str, ...]
    fluency: float = float("nan")


@dataclass(frozen=True)
class Outcome:
    """What becomes of a unit.

    Attributes:
        action: rewrite | span_edit | redact | drop_segment | drop_document | flag.
        after: What stands in the unit's place (of a dropped segment: nothing).
        scored: The measured replacement; None for what is not scored (dropped, flagged).
    """

    action: str
    after: str
    scored: Scored | None = None


@dataclass
class Unit:
    """What is replaced as one, and how far down the ladder it is.

    Attributes:
        row: Row in the batch.
        segment: Index of the segment; None = the whole text.
        start: First character, in the document.
        end: Exclusive.
        source: Text, toxicity and spans.
        labels: The source's score on every label; None where it was never scored.
        spans: Toxic spans as (start, end, score, source name), in the document.
        candidates: Distinct candidates, best fusion first.
        rung: Index of the next rung to try.
        outcome: What the last rung gave; None = still going down.
    """

    row: int
    segment: int | None
    start: int
    end: int
    source: Source
    labels: FloatArray | None
    spans: list[tuple[int, int, float, str]]
    candidates: list[Scored] = field(default_factory=list)
    rung: int = 0
    outcome: Outcome | None = None

    def toxic(self, limit: float) -> bool:
        """Whether the scorer itself finds the source toxic (or was never asked)."""
        return self.labels is None or self.source.toxicity >= limit


@dataclass(frozen=True)
class Document:
    """A row with at least one unit.

    Attributes:
        text: Its original text.
        starts: Where its segments start; they tile it.
        ends: Where they end.
        flagged: Indices of the flagged ones.
    """

    text: str
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    flagged: tuple[int, ...]


@dataclass(frozen=True)
class Judge:
    """Measures replacements: toxicity, similarity to the source, fluency, fusion score, hard conditions.

    Attributes:
        scorer: The ranker.
        encoder: Embeds source and replacement; None only where nothing needs similarity (no candidates).
        options: Thresholds.
        labels: The score is the maximum over these; empty = the first label.
        cache: Where scores are remembered.
        lexicon: Word list whose strong words no replacement may hold; None = none.
        fluency: Scores how much a text reads like a whole sentence; None = that does not count.
    """

    scorer: ToxicityScorer
    encoder: Encoder | None
    options: AcceptOptions
    labels: tuple[str, ...] = ()
    cache: RequestCache | None = None
    lexicon: ToxicityScorer | None = None
    fluency: ToxicityScorer | None = None

    @property
    def columns(self) -> list[int]:
        """Columns of the scorer's output whose maximum is the score."""
        return label_columns(self.scorer, self.labels)

    def toxicity(self, texts: Sequence[str]) -> tuple[FloatArray, FloatArray]:
        """All labels (n, labels) and the score (n,) of n texts, in one call."""
        labels = score_cached(self.scorer, texts, self.cache)
        return labels, labels[:, self.columns].max(axis=1) if len(texts) else np.empty(0, np.float32)

    def listed(self, texts: Sequence[str]) -> FloatArray:
        """Lexicon score (n,) of n texts; zeros without a lexicon."""
        if self.lexicon is None:
            return np.zeros(len(texts), np.float32)
        return score_cached(self.lexicon, texts, None)[:, 0]

    def similarity(self, pairs: Sequence[tuple[str, str]]) -> FloatArray:
        """Cosines of n pairs, in one call.

        Raises:
            ModelError: There is no encoder.
        """
        if not pairs:
            return np.empty(0, np.float32)
        if self.encoder is None:
            raise ModelError("comparing a replacement with its source needs an encoder; pass --encoder")
        return similarity_cached(self.encoder, pairs, self.cache)

    def measure(
        self,
        sources: Sequence[Source],
        texts: Sequence[str],
        *,
        origin: Sequence[tuple[float | None, int | None]] | None = None,
        only: frozenset[str] | None = None,
    ) -> list[Scored]:
        """Measure n replacements of n sources."""
        labels, scores = self.toxicity(texts)
        cosines = self.similarity([(s.text, t) for s, t in zip(sources, texts, strict=True)])
        listed = self.listed(texts)
        fluent = None if self.fluency is None else score_cached(self.fluency, texts, None)[:, 0]
        lam, weight = self.options.fusion_lambda, self.options.fluency_weight
        out = []
        for i, (source, text) in enumerate(zip(sources, texts, strict=True)):
            toxicity, cosine = float(scores[i]), float(cosines[i])
            reasons = failed_conditions(
                source, Trial(text, toxicity, cosine, listed=float(listed[i])), self.options, only=only
            )
            temperature, seed = origin[i] if origin else (None, None)
            fusion = (1 - lam) * cosine - lam * toxicity
            fluency = float("nan")
            if fluent is not None:
                fluency = float(fluent[i])
                fusion += weight * fluency
            out.append(
                Scored(text, temperature, seed, labels[i], toxicity, cosine, fusion, tuple(reasons), fluency)
            )
        return out


def descend(units: Sequence[Unit], documents: dict[int, Document], judge: Judge) -> None:
    """Bring every unit without an outcome down the ladder until it has one (`flag`, where the ladder ends).

    Args:
        units: All units of the batch; those with an outcome are left alone (but count for what remains of a text).
        documents: By row.
        judge: Models and thresholds.
    """
    for index, name in enumerate(judge.options.ladder):
        waiting = [u for u in units if u.outcome is None and u.rung == index]
        able = [u for u in waiting if name in _HARMLESS_RUNGS or u.toxic(judge.options.toxicity_limit)]
        if able:
            _RUNGS[name](able, units, documents, judge)
        for unit in waiting:
            unit.rung = index + 1
    for unit in units:
        if unit.outcome is None:
            unit.outcome = Outcome("flag", unit.source.text)


def _candidate(
    waiting: Sequence[Unit], units: Sequence[Unit], documents: dict[int, Document], judge: Judge
) -> None:
    for unit in waiting:
        best = next((c for c in unit.candidates if not c.reasons), None)
        if best is not None:
            unit.outcome = Outcome("rewrite", best.text, best)


def _span_edit(
    waiting: Sequence[Unit], units: Sequence[Unit], documents: dict[int, Document], judge: Judge
) -> None:
    made: list[tuple[Unit, str]] = []
    for unit in waiting:
        best = [c.text for c in unit.candidates if _UNFIT.isdisjoint(c.reasons)]
        edits = minimal_edits(unit.source.text, unit.source.spans, best[: judge.options.span_edit_candidates])
        made.extend((unit, text) for text in edits)
    scored = judge.measure([u.source for u, _ in made], [t for _, t in made], only=_EDIT_CONDITIONS)
    for (unit, text), result in zip(made, scored, strict=True):
        # In the order they were made, which prefers sound grammar, not in the order of fusion scores.
        if unit.outcome is None and not result.reasons:
            unit.outcome = Outcome("span_edit", text, result)


def _redact(
    waiting: Sequence[Unit], units: Sequence[Unit], documents: dict[int, Document], judge: Judge
) -> None:
    token = judge.options.redaction
    made = []
    for unit in waiting:
        spans = join_spans(unit.source.text, unit.source.spans)
        if spans and any(c.isalnum() for c in redact_spans(unit.source.text, spans, "")):
            made.append((unit, redact_spans(unit.source.text, spans, token)))
    texts = [text for _, text in made]
    (labels, scores), listed = judge.toxicity(texts), judge.listed(texts)
    for i, (unit, text) in enumerate(made):
        trial = Trial(text, float(scores[i]), 1.0, listed=float(listed[i]))
        if not failed_conditions(unit.source, trial, judge.options, only=_REDACTION_CONDITIONS):
            nothing = float("nan")
            scored = Scored(text, None, None, labels[i], trial.toxicity, nothing, nothing, ())
            unit.outcome = Outcome("redact", text, scored)


def _drop_segment(
    waiting: Sequence[Unit], units: Sequence[Unit], documents: dict[int, Document], judge: Judge
) -> None:
    for unit in waiting:
        if unit.segment is not None:
            unit.outcome = Outcome("drop_segment", "")
        else:
            document = documents[unit.row]
            kept = without_segments(document.text, document.starts, document.ends, document.flagged)
            parts = (document.text[max(a, unit.start) : min(b, unit.end)] for a, b in kept)
            unit.outcome = Outcome("drop_segment", "".join(parts))
    rows = {u.row: documents[u.row] for u in waiting}
    mine: dict[int, list[Unit]] = {row: [] for row in rows}
    for unit in units:
        if unit.row in rows:
            mine[unit.row].append(unit)
    empty = {row for row, document in rows.items() if not _readable(mine[row], document)}
    for unit in waiting:
        if unit.row in empty:
            unit.outcome = None


def _drop_document(
    waiting: Sequence[Unit], units: Sequence[Unit], documents: dict[int, Document], judge: Judge
) -> None:
    for unit in waiting:
        unit.outcome = Outcome("drop_document", unit.source.text)


def _flag(
    waiting: Sequence[Unit], units: Sequence[Unit], documents: dict[int, Document], judge: Judge
) -> None:
    for unit in waiting:
        unit.outcome = Outcome("flag", unit.source.text)


_Rung = Callable[[Sequence[Unit], Sequence[Unit], dict[int, Document], Judge], None]
_RUNGS: dict[str, _Rung] = {
    "candidate": _candidate,
    "span_edit": _span_edit,
    "redact": _redact,
    "drop_segment": _drop_segment,
    "drop_document": _drop_document,
    "flag": _flag,
}


def _readable(units: Sequence[Unit], document: Document) -> bool:
    """Whether anything readable remains of a document (read from its start: mostly a few characters say so)."""
    whole = next((u for u in units if u.segment is None), None)
    if whole is not None:
        return whole.outcome is None or any(c.isalnum() for c in whole.outcome.after)
    position = 0
    for unit in sorted(units, key=lambda u: u.start):
        after = unit.outcome.after if unit.outcome is not None else unit.source.text
        if any(c.isalnum() for c in document.text[position : unit.start] + after):
            return True
        position = unit.end
    return any(c.isalnum() for c in document.text[position:])
