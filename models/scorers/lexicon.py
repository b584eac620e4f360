"""`lexicon`: a word list, matched by Aho-Corasick on whole words, disguises undone.

The fastest scorer, and the one that says where: `find` gives character offsets. A whole batch of texts is
normalised and searched at once; Python touches only what was found.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.batching import FloatArray, slices
from models.protocols import ModelInfo
from models.scorers.disguise import GLUED, SPACE, IntArray, Normalised, normalise, tables
from schemas.errors import ModelError

DEFAULT_LIST = Path(__file__).with_name("lexicon_en.txt")
DEFAULT_WEIGHT = 0.8  # of a line that gives none
_BATCH_CHARACTERS = 200_000  # arrays of this size stay in the second-level cache
_PIECE_CHARACTERS = 1_000_000  # longer texts are searched in pieces
_LONGEST_TERM = 100
_LONGEST_WORD = 200  # a stretched or starred word beyond is not looked at
_SPACED_LETTERS = 64  # letters of a run like `i d i o t` looked at together
_SHORTEST_DISGUISED = (
    4  # letters a term needs to be recognised in digits, stars or spaced out (`455` is a number)
)
_HEAVIEST = 0.99  # so that a sum of logarithms stays finite
_RUN = re.compile(r"(.)\1+")


class Match(NamedTuple):
    """A term found in a text: character offsets, end exclusive, and the term as its list has it."""

    start: int
    end: int
    term: str


class _Found(NamedTuple):
    """Matches in a batch: three int64 arrays of positions in the normalised batch, and term numbers."""

    start: IntArray
    end: IntArray
    term: IntArray


class LexiconScorer:
    """Scores texts by the listed words in them; one label, `toxicity`.

    A text's score is `1 - prod(1 - weight)` over the different terms found (the noisy-or of independent
    evidence): 0 where there is none, the term's weight where there is one, towards 1 with each further one. A
    term that repeats counts once, so a long text is not condemned for one mild word.

    Args:
        terms: Term -> weight in (0, 1].
        info: What manifests record of the list.

    Raises:
        ModelError: The list holds no usable term, or a weight outside (0, 1].
    """

    labels = ("toxicity",)

    def __init__(self, terms: dict[str, float], info: ModelInfo) -> None:
        self.info = info
        self.terms: tuple[str, ...] = tuple(terms)
        bad = [term for term, weight in terms.items() if not 0 < weight <= 1]
        if bad:
            raise ModelError(f"{info.name}: the weight of '{bad[0]}' is {terms[bad[0]]}, not in (0, 1]")
        weights = np.minimum(np.fromiter(terms.values(), np.float64, len(terms)), _HEAVIEST)
        self._evidence = np.log1p(-weights)
        self._folded = [_fold_term(term) for term in self.terms]
        self._automaton = self._build()
        self._disguises = _Disguises(self._folded, weights.tolist())

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score n texts of any length: float32 of shape (n, 1)."""
        keys = [doc * len(self.terms) + term for doc, _, _, term in self._search(texts)]
        # In ascending order: a sum of floats depends on its order, a text's score must not depend on its
        # neighbours.
        distinct = np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
        doc, term = distinct // len(self.terms), distinct % len(self.terms)
        total = np.bincount(doc, self._evidence[term], minlength=len(texts))
        return np.abs(np.expm1(total)).astype(np.float32)[:, None]  # abs: -0.0 looks odd in a report

    def find(self, text: str) -> list[Match]:
        """Where the list's terms stand in a text, in order, none overlapping another."""
        return self.find_all([text])[0]

    def find_all(self, texts: Sequence[str]) -> list[list[Match]]:
        """As `find`, for many texts at once (a batch costs little more than one)."""
        found: list[list[Match]] = [[] for _ in texts]
        for doc, start, end, term in self._search(texts):
            for d, s, e, t in zip(doc.tolist(), start.tolist(), end.tolist(), term.tolist(), strict=True):
                found[d].append(Match(s, e, self.terms[t]))
        return found

    def _search(self, texts: Sequence[str]) -> Iterator[tuple[IntArray, IntArray, IntArray, IntArray]]:
        """Yield (text, start, end, term) arrays of character offsets, ordered by text and start."""
        batch: list[str] = []
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            batch = list(texts[part])
            if len(batch) == 1 and len(batch[0]) > _PIECE_CHARACTERS:
                yield from self._search_pieces(batch[0], part.start)
                continue
            # One character beyond ASCII makes the whole batch five times slower: such texts go by themselves.
            plain = [i for i, t in enumerate(batch) if t.isascii()]
            if len(plain) in (0, len(batch)):
                groups = [list(range(len(batch)))]
            else:
                groups = [plain, [i for i, t in enumerate(batch) if not t.isascii()]]
            for group in groups:
                doc, start, end, term = self._search_batch([batch[i] for i in group])
                if len(doc):
                    yield np.asarray(group, np.int64)[doc] + part.start, start, end, term

    def _search_pieces(
        self, text: str, index: int
    ) -> Iterator[tuple[IntArray, IntArray, IntArray, IntArray]]:
        """Search a very long text piece by piece; each reaches beyond its end, and drops what starts there."""
        begin = reach = 0
        while begin < len(text):
            end = begin + _PIECE_CHARACTERS
            if end < len(text):
                blank = max(text.rfind(c, begin + _PIECE_CHARACTERS // 2, end) for c in " \n")
                end = blank + 1 if blank >= 0 else end
            doc, start, stop, term = self._search_batch([text[begin : end + 2 * _LONGEST_TERM]])
            # What starts behind this piece is the next one's; what the last one found is not found again.
            mine = (start < end - begin) & (start >= reach - begin)
            if mine.any():
                reach = begin + int(stop[mine].max())
                yield doc[mine] + index, start[mine] + begin, stop[mine] + begin, term[mine]
            begin = end

    def _search_batch(self, texts: Sequence[str]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        batch = normalise(texts)
        found = self._direct(batch)
        if len(batch.stretched) or len(batch.spaced) or len(batch.masked):
            extra = self._disguises.find(batch)
            if extra:
                more = np.asarray(extra, np.int64)
                found = _Found(*(np.concatenate([a, b]) for a, b in zip(found, more.T, strict=True)))
        found = _leftmost_longest(found)
        doc = np.searchsorted(batch.starts, found.start, side="right") - 1
        start, end = batch.offsets(doc, found.start, found.end)
        return doc, start, end, found.term

    def _direct(self, batch: Normalised) -> _Found:
        """What the automaton finds: whole words of the normalised text."""
        hits = list(self._automaton.iter(batch.text))
        if not hits:
            empty = np.zeros(0, np.int64)
            return _Found(empty, empty, empty)
        last, packed = zip(*hits, strict=True)
        term, length, tail = (np.asarray(a, np.int64) for a in zip(*packed, strict=True))
        end = np.asarray(last, np.int64) + 1 - tail
        start = end - length
        first, behind = np.searchsorted(batch.swapped, np.stack([start, end]))
        doubtful = np.flatnonzero(behind > first)
        if len(doubtful):
            keep = np.ones(len(term), bool)
            for i in doubtful:
                keep[i] = self._is_word(batch, int(start[i]), int(end[i]), int(term[i]))
            term, start, end = term[keep], start[keep], end[keep]
        return _Found(start, end, term)

    def _is_word(self, batch: Normalised, start: int, end: int, term: int) -> bool:
        """Whether a match that leans on swapped characters is a word in disguise, not a number or a price."""
        codes = batch.codes[start:end]
        plain = tables().plain[codes]
        if "".join(map(chr, plain)) == _fold_term(self.terms[term], swap=False):
            return True  # the term itself has these characters
        letters = sum(chr(c).isalpha() for c in plain)
        digits = sum(chr(c).isdigit() for c in plain)
        if digits:
            return letters >= 2 and end - start >= _SHORTEST_DISGUISED
        return letters >= 1

    def _build(self) -> Any:
        import ahocorasick

        automaton = ahocorasick.Automaton()
        glued = tables().kind
        longest: dict[str, tuple[int, int, int]] = {}
        for number, folded in enumerate(self._folded):
            if not folded or len(folded) > _LONGEST_TERM:
                continue
            # A blank on either side makes it match whole words only, except where a script writes no blanks.
            before = "" if glued[ord(folded[0])] & GLUED else " "
            behind = "" if glued[ord(folded[-1])] & GLUED else " "
            longest.setdefault(before + folded + behind, (number, len(folded), len(behind)))
        if not longest:
            raise ModelError(f"{self.info.name} holds no usable term; one term a line is expected")
        for key, value in longest.items():
            automaton.add_word(key, value)
        automaton.make_automaton()
        return automaton


class _Disguises:
    """Looks closer at stretched (`stuuupid`), spaced-out (`i d i o t`) and starred (`st*pid`) words."""

    def __init__(self, folded: Sequence[str], weights: Sequence[float]) -> None:
        single = {f: i for i, f in reversed(list(enumerate(folded))) if f and " " not in f and f.isalpha()}
        self._squeezed = {_squeeze(f): i for f, i in reversed(single.items())}
        self._long = {f: i for f, i in single.items() if len(f) >= _SHORTEST_DISGUISED}
        self._by_shape: dict[tuple[int, str], list[str]] = defaultdict(list)
        for term in sorted(
            self._long, key=lambda term: -weights[self._long[term]]
        ):  # `f***` is the worst it can be
            self._by_shape[len(term), term[0]].append(term)
        self._longest = max(map(len, self._long), default=0)

    def find(self, batch: Normalised) -> list[tuple[int, int, int]]:
        """(start, end, term) of each disguised word; positions in the normalised batch."""
        return [*self._stretched(batch), *self._spaced(batch), *self._starred(batch)]

    def _stretched(self, batch: Normalised) -> Iterator[tuple[int, int, int]]:
        done = 0
        for place in batch.stretched.tolist():
            if place < done:
                continue
            start = batch.text.rfind(" ", 0, place) + 1
            done = batch.text.find(" ", place)
            if done - start > _LONGEST_WORD:
                continue
            term = self._squeezed.get(_squeeze(batch.text[start:done]))
            if term is not None:
                yield start, done, term

    def _spaced(self, batch: Normalised) -> Iterator[tuple[int, int, int]]:
        done = 0
        for place in batch.spaced.tolist():
            if place < done:
                continue
            text, end = batch.text, place
            while (
                end + 2 < len(text) and text[end + 1] == " " and text[end + 2] != " " and text[end + 3] == " "
            ):
                end += 2
                if end - place > 2 * _SPACED_LETTERS:
                    break
            done = end + 1
            letters = text[place : end + 1 : 2]
            at = 0
            while at < len(letters):
                sizes = range(min(self._longest, len(letters) - at), _SHORTEST_DISGUISED - 1, -1)
                size = next((n for n in sizes if letters[at : at + n] in self._long), 0)
                if size:
                    yield place + 2 * at, place + 2 * (at + size) - 1, self._long[letters[at : at + size]]
                at += size or 1

    def _starred(self, batch: Normalised) -> Iterator[tuple[int, int, int]]:
        done = 0
        for place in batch.masked.tolist():
            if place < done:
                continue
            # Stars are blanks in the normalised text, so the word's bounds are sought in the codes.
            low, high = place, place + 1
            while place - low < _LONGEST_WORD and _is_starry(batch, low - 1):
                low -= 1
            while high - place < _LONGEST_WORD and _is_starry(batch, high):
                high += 1
            done = high
            word = "".join(
                "*" if chr(c) in "*#" else chr(f)
                for c, f in zip(batch.codes[low:high].tolist(), batch.folded[low:high].tolist(), strict=True)
            )
            inner = word.lstrip("*")
            if len(inner) < len(word):
                inner = inner.rstrip("*")  # **emphasis**
            start = low + len(word) - len(word.lstrip("*"))
            term = self._unmask(inner)
            if term is not None:
                yield start, start + len(inner), term

    def _unmask(self, word: str) -> int | None:
        """The term a starred word stands for; a lone star behind a word is a footnote's."""
        stars = word.count("*")
        if not stars or (stars == 1 and word.endswith("*")):
            return None
        for term in self._by_shape.get((len(word), word[0]), ()):
            if all(w in ("*", t) for w, t in zip(word, term, strict=True)):
                return self._long[term]
        return None


def read_list(path: Path) -> dict[str, float]:
    """Read a word list: one term a line, optionally a tab and a weight; `#` begins a comment line.

    Raises:
        ModelError: The file is missing, not UTF-8, or a weight is not a number.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    terms: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        term, _, weight = line.partition("\t")
        term = term.strip()
        if not term or term.startswith("#"):
            continue
        try:
            terms[term] = float(weight) if weight.strip() else DEFAULT_WEIGHT
        except ValueError as error:
            raise ModelError(
                f"{path}, line {number}: '{weight.strip()}' is not a weight in (0, 1]"
            ) from error
    return terms


def describe(path: Path | None) -> ModelInfo:
    """What a manifest records of a word list.

    Args:
        path: The list; None is tamis's own.

    Raises:
        ModelError: The file cannot be read.
    """
    file = path or DEFAULT_LIST
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    return ModelInfo(
        name=f"lexicon:{path}" if path else "lexicon",
        kind="scorer",
        revision=hashlib.sha256(content).hexdigest()[:16],
        source=str(path) if path else "tamis",
        licence="" if path else "Apache-2.0",
        training_data="" if path else "none (a word list)",
        extra={"labels": ["toxicity"], "terms": len(read_list(file))},
    )


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> ModelError:
    why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    return ModelError(f"the word list {path} cannot be read ({why}); pass lexicon:/path/to/words.txt")


def _fold_term(term: str, *, swap: bool = True) -> str:
    """A term as it stands in normalised text."""
    if swap:
        return " ".join(normalise([term]).text.split())
    plain = tables().plain[[ord(c) for c in term]]
    return " ".join("".join(map(chr, plain)).split())


def _squeeze(word: str) -> str:
    return _RUN.sub(r"\1", word)


def _is_starry(batch: Normalised, place: int) -> bool:
    return bool(batch.folded[place] != SPACE or batch.codes[place] in (42, 35))


def _leftmost_longest(found: _Found) -> _Found:
    """Drop what begins inside an earlier or longer match."""
    if len(found.start) < 2:
        return found
    order = np.lexsort((-found.end, found.start))
    start, end, term = (a[order] for a in found)
    reach = np.concatenate([[-1], np.maximum.accumulate(end)[:-1]])
    keep = start >= reach
    return _Found(start[keep], end[keep], term[keep])
