"""BM25 over a corpus: the words texts are made of, and an index of them, built once and memory-mapped after.

Scores are bm25s' (X. H. Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", 2024) in
Lucene's variant. A document's score is a sum over the query's words in their order, and all it takes from the corpus
are counts, so scores do not depend on how the corpus is cut into shards. Equal scores are ordered by document id.
"""

from __future__ import annotations

import importlib
import json
import shutil
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import InputError, ModelError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

NEEDS = "pip install 'tamis[retrieval]'"
TOKENS = "unicode-words-1"  # changes with what `Analyzer.words` does to a text
# Stop words by language, as bm25s calls its lists (English: Lucene's 33; the others are NLTK's).
_LANGUAGES = {
    "en": "EN", "de": "GERMAN", "nl": "DUTCH", "fr": "FRENCH", "es": "SPANISH", "pt": "PORTUGUESE", "it": "ITALIAN",
    "ru": "RUSSIAN", "sv": "SWEDISH", "no": "NORWEGIAN", "da": "DANISH", "tr": "TURKISH", "ko": "KOREAN",
    "zh": "CHINESE",
}  # fmt: skip
# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)


@dataclass(frozen=True)
class Analyzer:
    """Cuts a text into the words BM25 counts: NFKC, case folded, runs of letters, digits and combining marks.

    Runs of a script written without spaces become overlapping pairs of characters, as Lucene's CJK analyser makes them.

    Attributes:
        stopwords: Language whose stop words are left out (en, de, fr ...), or none.
        stemmer: Snowball stemmer by its name (english, german, ...; needs PyStemmer), or none.

    Raises:
        InputError: There are no such stop words, or no such stemmer.
        ModelError: A library is not installed.
    """

    stopwords: str = "en"
    stemmer: str = "none"

    def __post_init__(self) -> None:
        _ = self._stop, self._stem

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its output, for manifests and hashes."""
        found: dict[str, Any] = {"tokens": TOKENS, **asdict(self)}
        if self.stemmer != "none":
            found["stemmer_version"] = f"PyStemmer {_stemmers().version()}"
        return found

    def words(self, text: str) -> list[str]:
        """The words of a text, in order, repeats included."""
        import unicodedata

        found: list[str] = []
        for word in self._pattern.findall(unicodedata.normalize("NFKC", text).casefold()):
            if word.isascii() or not any(map(_is_unspaced, word)):
                found.append(word)
            else:
                found += _pairs(word)
        if self._stop:
            found = [w for w in found if w not in self._stop]
        return self._stem(found)

    @cached_property
    def _pattern(self) -> Any:
        try:
            import regex
        except ImportError as error:
            raise ModelError(f"BM25 needs regex: {NEEDS}") from error
        return regex.compile(r"[\p{L}\p{N}\p{M}]+")

    @cached_property
    def _stop(self) -> frozenset[str]:
        if self.stopwords == "none":
            return frozenset()
        _bm25s()
        from bm25s import stopwords

        if self.stopwords not in _LANGUAGES:
            known = ", ".join(("none", *_LANGUAGES))
            raise InputError(f"no stop words for '{self.stopwords}' (there are: {known})")
        return frozenset(getattr(stopwords, f"STOPWORDS_{_LANGUAGES[self.stopwords]}"))

    @cached_property
    def _stem(self) -> Callable[[list[str]], list[str]]:
        if self.stemmer == "none":
            return lambda words: words
        stemmers = _stemmers()
        try:
            return stemmers.Stemmer(self.stemmer).stemWords  # type: ignore[no-any-return]
        except KeyError as error:
            known = ", ".join(stemmers.algorithms())
            raise InputError(f"no stemmer '{self.stemmer}' (there are: none, {known})") from error


@dataclass(frozen=True)
class BM25Settings:
    """What an index is made with.

    Attributes:
        k1: How soon further occurrences of a word stop to count. 0.9 and 0.4 are the settings BEIR's BM25 was
            measured with; 0.82 and 0.68 were tuned on MS MARCO passages.
        b: How much long documents are held back.
        analyzer: The words.
    """

    k1: float = 0.9
    b: float = 0.4
    analyzer: Analyzer = field(default_factory=Analyzer)

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise InputError(f"--k1 {self.k1} must be 0 or more, and --b {self.b} within 0 and 1")

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides scores, for manifests and hashes."""
        return {
            "method": "lucene",
            "library": f"bm25s {_bm25s().__version__}",
            "k1": self.k1,
            "b": self.b,
            **self.analyzer.settings,
        }


class IndexBuilder:
    """Takes documents one by one; holds four bytes a word of the corpus until the index is built.

    Building takes some thirty bytes more for each (word, document) pair, for a moment.

    Args:
        settings: k1, b, words.
    """

    def __init__(self, settings: BM25Settings) -> None:
        self.settings = settings
        self._vocabulary: dict[str, int] = {}
        self._documents: list[array[int]] = []
        self._numbers: list[int] = []

    def add(self, number: int, text: str) -> bool:
        """Add a document under a number above all earlier ones; False where it has no word and is left out."""
        known = self._vocabulary
        words = array("i", [known.setdefault(w, len(known)) for w in self.settings.analyzer.words(text)])
        if not words:
            return False
        self._documents.append(words)
        self._numbers.append(number)
        return True

    def save(self, folder: Path) -> None:
        """Compute all scores and put the index where no half of one can be found.

        Raises:
            InputError: No document has a word.
        """
        if not self._documents:
            raise InputError("no document has a word that BM25 could find it by")
        index = _bm25s().BM25(k1=self.settings.k1, b=self.settings.b, method="lucene")
        index.index((self._documents, self._vocabulary), create_empty_token=False, show_progress=False)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
        try:
            index.save(temporary, show_progress=False)
            np.save(temporary / "numbers.npy", np.asarray(self._numbers, np.int64))
            (temporary / "settings.json").write_text(json.dumps(self.settings.deciding))
            shutil.rmtree(folder, ignore_errors=True)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class LexicalIndex:
    """An index as `IndexBuilder.save` left it, memory-mapped.

    Args:
        folder: Where it is.
        analyzer: The words it was made with.
    """

    def __init__(self, folder: Path, analyzer: Analyzer) -> None:
        self._index = _bm25s().BM25.load(folder, mmap=True, show_progress=False)
        self._numbers: IntArray = np.load(folder / "numbers.npy", mmap_mode="r")
        self._analyzer = analyzer

    def scores(self, text: str) -> FloatArray | None:
        """The score of every indexed document, in the order they were added; None where no word is known."""
        known = self._index.vocab_dict
        words = [known[w] for w in self._analyzer.words(text) if w in known]
        return self._index.get_scores_from_ids(words) if words else None

    def best(
        self, text: str, k: int, order: IntArray, *, watched: Sequence[int] = (), without: int = -1
    ) -> tuple[IntArray, FloatArray, dict[int, tuple[int, float]]]:
        """The k best documents of a query.

        Args:
            text: The query.
            k: How many at most; documents that share no word with the query are never among them.
            order: By document number: its place among equals (of its id).
            watched: Numbers of documents whose place is wanted wherever it is.
            without: A document that is not looked at (the query itself).

        Returns:
            Numbers and scores, best first; and rank and score of those watched that share a word with the query.
        """
        scores = self.scores(text)
        if scores is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32), {}
        found = np.flatnonzero(scores > 0)
        numbers = self._numbers[found]
        if without >= 0:
            found, numbers = found[numbers != without], numbers[numbers != without]
        points = scores[found]
        seen: dict[int, tuple[int, float]] = {}
        for number in watched:
            at = int(np.searchsorted(numbers, number))  # documents were added in the order of their numbers
            if at < len(numbers) and numbers[at] == number:
                ahead = points > points[at]
                tied = (points == points[at]) & (order[numbers] < order[number])
                seen[number] = (int(ahead.sum() + tied.sum()) + 1, float(points[at]))
        if len(points) > k:
            least = np.partition(points, len(points) - k)[len(points) - k]
            numbers, points = numbers[points >= least], points[points >= least]
        rank = np.lexsort((order[numbers], -points))[:k]
        return numbers[rank], points[rank], seen


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ModelError(f"BM25 needs bm25s: {NEEDS}") from error
    return bm25s


def _stemmers() -> Any:
    try:
        return importlib.import_module("Stemmer")  # only those who stem need it
    except ImportError as error:
        raise ModelError(f"--stemmer needs PyStemmer: {NEEDS}") from error


def _is_unspaced(character: str) -> bool:
    point = ord(character)
    return point >= 0x0E00 and any(low <= point <= high for low, high in _UNSPACED)


def _pairs(word: str) -> list[str]:
    """Runs of an unspaced script as overlapping pairs, other runs as they are."""
    found: list[str] = []
    for unspaced, characters in groupby(word, _is_unspaced):
        run = "".join(characters)
        found += [run[i : i + 2] for i in range(len(run) - 1)] if unspaced and len(run) > 1 else [run]
    return found
