"""How good a short answer is: exact match and F1 as SQuAD computes them, and whether a gold answer is in the text.

The three are the usual figures of open-domain question answering. All compare normalised words: lower case, without
punctuation, accents kept apart from none, articles left out (Rajpurkar et al. 2016). `has_answer` looks for a gold
answer as a run of whole words, as DPR does (Karpukhin et al. 2020): "art" is not in "a party".
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = frozenset({"a", "an", "the"})
# Scripts written without spaces: each character stands for a word, or containment would ask for whole sentences.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# Between the letters of one word they are no boundary: don't, U.S., 150,782.
_INNER = re.compile(r"(?<=\w)['’.,](?=\w)")


def words(text: str) -> list[str]:
    """Normalised words of a text, articles left out (unless there is nothing else: the band The The).

    Example:
        >>> words("The U.S. won 1,024 medals!")
        ['us', 'won', '1024', 'medals']
    """
    lowered = _INNER.sub("", unicodedata.normalize("NFKC", text).lower()).replace("_", " ")
    # Composed and decomposed letters are one letter; the marks themselves stay (resumé is not resume).
    found = _WORD.findall(lowered)
    return [w for w in found if w not in _ARTICLES] or found


def has_answer(text: str, answers: Sequence[str]) -> float:
    """1.0 if the words of some gold answer stand in the text, in a row; else 0.0.

    An answer without any word (only punctuation) is in no text.
    """
    here = words(text)
    return float(any(_contains(here, words(answer)) for answer in answers))


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1.0 if the text is some gold answer, after normalisation; else 0.0."""
    here = words(text)
    return float(any(here == words(answer) for answer in answers) and bool(here))


def f1(text: str, answers: Sequence[str]) -> float:
    """Best F1 of the words of the text (as a bag) against those of a gold answer, in [0, 1]."""
    here = Counter(words(text))
    return max((_f1(here, Counter(words(answer))) for answer in answers), default=0.0)


Performance = Callable[[str, Sequence[str]], float]
# By the name `--perf` takes.
PERFORMANCE: dict[str, Performance] = {"has_answer": has_answer, "em": exact_match, "f1": f1}


def _contains(here: list[str], wanted: list[str]) -> bool:
    n = len(wanted)
    return bool(n) and any(here[i : i + n] == wanted for i in range(len(here) - n + 1))


def _f1(here: Counter[str], gold: Counter[str]) -> float:
    common = (here & gold).total()
    return 2 * common / (here.total() + gold.total()) if common else 0.0
