"""Localise: which characters of a flagged segment carry its toxicity.

A localiser is anything with a `source` name and a `find` over texts. Two stand here: the lexicon, which knows words,
and occlusion, which asks the classifier what it would say without them. Their spans are united, with the source
recorded. Attribute `spans` holds them in document offsets (list of `schemas.edits.SPAN_TYPE`, null for null text).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.protocols import ToxicityScorer
from schemas import flight
from schemas.edits import SPAN_TYPE
from transforms.detox.gate import label_columns
from transforms.detox.language import function_words
from transforms.requests import score_cached
from transforms.shards.cache import RequestCache

# A word: no space and no punctuation that ends one, but with what disguises one inside it (`st*pid`, `@ss`, `id!ot`).
_WORD = re.compile(r"""[^\s.,;:!?"“”„«»()\[\]{}<>…/\\|]+(?:[!.|](?=\w)[^\s.,;:!?"“”„«»()\[\]{}<>…/\\|]+)*""")
_GAP = re.compile(r"[\s\-–_*]*")


class Span(NamedTuple):
    """Toxic characters of a text: [start, end), how much toxicity they carry in [0, 1], and who says so."""

    start: int
    end: int
    score: float
    source: str


class Localizer(Protocol):
    """Finds the toxic spans of texts that are known to be toxic."""

    @property
    def source(self) -> str:
        """Its name, as spans carry it."""
        ...

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """For each text its spans, ascending and disjoint."""
        ...


class WordFinder(Protocol):
    """What a lexicon offers besides scores (`models.scorers.lexicon.LexiconScorer`)."""

    def find_all(self, texts: Sequence[str]) -> Sequence[Sequence[Sequence[Any]]]:
        """For each text the places of the lexicon's words: (start, end, ...)."""
        ...


def localize_toxic_spans(
    batch: pa.RecordBatch,
    *,
    text_column: str,
    localizers: Sequence[Localizer],
    count: Callable[[str, int], None] | None = None,
) -> pa.RecordBatch:
    """Set attribute `spans` from the flagged segments of attribute `toxicity`.

    Args:
        batch: n rows in flight.
        text_column: Name of the text column.
        localizers: Asked in order; one call each, over all flagged segments of all rows.
        count: Counter to add to (`localize.segments`, `localize.spans`, `localize.none`).
    """
    toxicity = flight.attribute(batch, "toxicity")
    column = batch.column(text_column)
    texts: list[str] = []
    places: list[tuple[int, int]] = []  # row, offset of the segment in its text
    text, current = "", -1
    for row, start, end in flagged_segments(toxicity):
        if row != current:  # a text may be huge: it is decoded once
            text, current = column[row].as_py(), row
        texts.append(text[start:end])
        places.append((row, start))
    found = find_spans(texts, localizers)
    spans: list[list[dict[str, object]] | None] = [[] if v.is_valid else None for v in column]
    for (row, offset), of_segment in zip(places, found, strict=True):
        target = spans[row]
        if target is not None:
            target.extend(
                {**s._asdict(), "start": s.start + offset, "end": s.end + offset} for s in of_segment
            )
    if count:
        count("localize.segments", len(texts))
        count("localize.spans", sum(map(len, found)))
        count("localize.none", sum(not f for f in found))
    return flight.set_attribute(batch, "spans", pa.array(spans, pa.list_(SPAN_TYPE)))


def flagged_segments(toxicity: pa.Array) -> list[tuple[int, int, int]]:
    """(row, start, end) of every flagged segment of attribute `toxicity`."""
    out: list[tuple[int, int, int]] = []
    for row in flagged_rows(toxicity):
        segments = toxicity[row]["segments"].values
        marks = np.flatnonzero(segments.field("flagged").to_numpy(zero_copy_only=False))
        starts, ends = (segments.field(k).to_numpy()[marks].tolist() for k in ("start", "end"))
        out.extend((row, a, b) for a, b in zip(starts, ends, strict=True))
    return out


def flagged_rows(toxicity: pa.Array) -> list[int]:
    """Rows of attribute `toxicity` with a flagged segment (most corpora have few: the rest is not looked at)."""
    marks = pc.fill_null(pc.struct_field(toxicity, "flagged"), False)
    rows: list[int] = np.flatnonzero(marks.to_numpy(zero_copy_only=False)).tolist()
    return rows


def find_spans(texts: Sequence[str], localizers: Sequence[Localizer]) -> list[list[Span]]:
    """The united spans of every localiser, for each text: ascending, disjoint, `source` names joined by `+`."""
    if not texts or not localizers:
        return [[] for _ in texts]
    distinct = list(dict.fromkeys(texts))
    each = [localizer.find(distinct) for localizer in localizers]
    united = [unite([s for spans in of_text for s in spans]) for of_text in zip(*each, strict=True)]
    found = dict(zip(distinct, united, strict=True))
    return [found[t] for t in texts]


def spans_for_text(text: str, localizers: Sequence[Localizer]) -> list[Span]:
    """`find_spans` of one text."""
    return find_spans([text], localizers)[0]


def unite(spans: Sequence[Span]) -> list[Span]:
    """Merge overlapping spans: the highest score stays, sources are joined in alphabetical order."""
    out: list[Span] = []
    for span in sorted(spans):
        if out and span.start < out[-1].end:
            last = out[-1]
            names = "+".join(sorted({*last.source.split("+"), *span.source.split("+")}))
            out[-1] = Span(last.start, max(last.end, span.end), max(last.score, span.score), names)
        elif span.end > span.start:
            out.append(span)
    return out


def word_offsets(text: str) -> list[tuple[int, int]]:
    """The words of a text, (start, end) in characters, without punctuation around them."""
    return [match.span() for match in _WORD.finditer(text)]


def is_gap(text: str, start: int, end: int) -> bool:
    """Whether words on both sides of text[start:end] are neighbours: only spaces and joiners lie between."""
    return _GAP.fullmatch(text, start, end) is not None


_WINDOWS = 64  # most windows a text is searched by at once


@dataclass(frozen=True)
class LexiconLocalizer:
    """Spans are the lexicon's words; each carries score 1."""

    lexicon: WordFinder
    source: str = "lexicon"

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """For each text the lexicon's hits."""
        return [
            unite([Span(hit[0], hit[1], 1.0, self.source) for hit in hits])
            for hits in self.lexicon.find_all(texts)
        ]


@dataclass(frozen=True)
class OcclusionLocalizer:
    """Spans are the words without which the classifier finds the text less toxic (Zeiler & Fergus, 2014, on words).

    A word's score is the relative fall of the toxicity when it is left out, (T - T_without) / T. Where two words
    each suffice alone, leaving out either changes little; so the words found are taken out and the rest is searched
    again, until it scores below `residual` or nothing more moves the score.

    Attributes:
        scorer: The classifier.
        labels: As in the gate.
        min_drop: Least relative fall.
        residual: Toxicity at which the rest counts as harmless.
        window_words: Words left out together in the first pass over a long text.
        long_words: Texts with more words are searched by windows first.
        rounds: At most this many searches of a text.
        cache: Where scores are remembered.
    """

    scorer: ToxicityScorer
    labels: tuple[str, ...] = ()
    min_drop: float = 0.5
    residual: float = 0.5
    window_words: int = 8
    long_words: int = 40
    rounds: int = 4
    cache: RequestCache | None = None
    source: str = "occlusion"

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """For each text its hot words, neighbours merged; four calls of the scorer a round at most."""
        searches = [_Search(text) for text in texts]
        for search, score in zip(searches, self._score([s.text for s in searches]), strict=True):
            search.toxicity = search.base = float(score)
        open_ = [s for s in searches if s.base > 0 and s.words]
        self._narrow([s for s in open_ if len(s.words) > self.long_words])
        for _ in range(self.rounds):
            open_ = [s for s in open_ if s.scope]
            if not open_:
                break
            falls = self._falls(open_, [[{i} for i in s.scope] for s in open_])
            for search, fall in zip(open_, falls, strict=True):
                search.take(fall, self.min_drop)
            for search, score in zip(open_, self._score([s.without(set()) for s in open_]), strict=True):
                search.settle(float(score), self.residual)
        return [search.spans(self.source) for search in searches]

    def _narrow(self, searches: list[_Search]) -> None:
        """Restrict the scope of long texts to their hot windows (to the hottest one where none is).

        Every window costs a copy of the text and a score, so a whole document is first cut into a few wide ones, and
        those that are hot again, until they are as narrow as they should be.
        """
        while searches:
            sizes = [max(self.window_words, -(-len(s.scope) // _WINDOWS)) for s in searches]
            windows = [
                [set(s.scope[i : i + size]) for i in range(0, len(s.scope), size)]
                for s, size in zip(searches, sizes, strict=True)
            ]
            wide: list[_Search] = []
            for search, size, mine, fall in zip(
                searches, sizes, windows, self._falls(searches, windows), strict=True
            ):
                best = max(fall, default=0.0)
                keep = [w for w, f in zip(mine, fall, strict=True) if f >= self.min_drop or f == best]
                if size > self.window_words and best < self.min_drop:
                    keep = keep[:1]  # else many that matter alike, or not at all, would all stay
                before = len(search.scope)
                search.scope = sorted(set().union(*keep)) if keep else []
                if size > self.window_words and len(search.scope) < before:
                    wide.append(search)
            searches = wide

    def _falls(self, searches: list[_Search], groups: list[list[set[int]]]) -> list[list[float]]:
        """Relative fall of each search's score for each of its groups of words left out."""
        flat = [s.without(group) for s, mine in zip(searches, groups, strict=True) for group in mine]
        scores = iter(self._score(flat).tolist())
        return [
            [(s.base - next(scores)) / max(s.toxicity, 1e-9) for _ in mine]
            for s, mine in zip(searches, groups, strict=True)
        ]

    def _score(self, texts: Sequence[str]) -> np.ndarray:
        columns = label_columns(self.scorer, self.labels)
        return score_cached(self.scorer, texts, self.cache)[:, columns].max(axis=1)


@dataclass
class _Search:
    """The search for the hot words of one text."""

    text: str
    toxicity: float = 0.0  # of the whole text
    base: float = 0.0  # of what is left of it
    words: list[tuple[int, int]] = field(default_factory=list)
    scope: list[int] = field(default_factory=list)  # words still to be tried
    hot: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.words = word_offsets(self.text)
        # Function words carry no toxicity of their own; where they seem to, it is a quirk of the classifier.
        dull = function_words("en")
        self.scope = [i for i, (a, b) in enumerate(self.words) if self.text[a:b].casefold() not in dull]

    def without(self, group: set[int]) -> str:
        """The text without a group of words, nor those already found hot."""
        out, position = [], 0
        for i in sorted(group | self.hot.keys()):
            start, end = self.words[i]
            out.append(self.text[position:start])
            position = end
        out.append(self.text[position:])
        return "".join(out)

    def take(self, falls: list[float], min_drop: float) -> None:
        """Make the words hot whose fall is great enough; if there is none, the one with the greatest fall."""
        found = {i: f for i, f in zip(self.scope, falls, strict=True) if f >= min_drop}
        if not found and self.scope:
            fall, i = max(zip(falls, self.scope, strict=True), key=lambda pair: (pair[0], -pair[1]))
            found = {i: fall} if fall > 0 else {}
        self.hot |= found
        self.scope = [i for i in self.scope if i not in self.hot] if found else []

    def settle(self, base: float, residual: float) -> None:
        """Stop where what is left is harmless."""
        self.base = base
        if base < residual:
            self.scope = []

    def spans(self, source: str) -> list[Span]:
        """Hot words as spans; neighbours are one."""
        out: list[Span] = []
        for i in sorted(self.hot):
            start, end = self.words[i]
            score = min(1.0, max(0.0, self.hot[i]))
            if out and is_gap(self.text, out[-1].end, start):
                out[-1] = Span(out[-1].start, end, min(1.0, out[-1].score + score), source)
            else:
                out.append(Span(start, end, score, source))
        return out
