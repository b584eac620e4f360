"""Sentences broken the way bad rewrites are: what an acceptability model learns to tell from whole ones."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from schemas.fingerprint import derive_seed

_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
_FEWEST_WORDS = 4  # what is shorter is as often whole as broken
MASKS = ("***", "[redacted]", "____", "[MASK]", "...")
_FUNCTION = [
    "a",
    "an",
    "the",
    "of",
    "to",
    "in",
    "on",
    "at",
    "for",
    "with",
    "by",
    "from",
    "and",
    "or",
    "but",
    "that",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "has",
    "have",
    "had",
    "do",
    "does",
    "did",
    "not",
    "it",
    "he",
    "she",
    "they",
    "we",
    "you",
    "i",
    "this",
    "these",
    "those",
    "his",
    "her",
    "their",
    "my",
    "your",
    "our",
    "as",
    "if",
]


def corrupt(text: str, seed: int, pool: Sequence[str] = ()) -> tuple[str, str] | None:
    """Break a sentence in one way (sometimes two), drawn from the seed and the text.

    Args:
        text: A whole sentence.
        seed: Of the run.
        pool: Words to draw wrong ones from; by default function words.

    Returns:
        The broken sentence and the way's name, or None where it is too short to be broken for sure.

    Example:
        >>> corrupt("The bus leaves at noon.", 0) is None or corrupt("The bus leaves at noon.", 0)[0] != "The bus leaves at noon."
        True
    """
    if len(_WORD.findall(text)) < _FEWEST_WORDS:
        return None
    rng = random.Random(derive_seed(seed, "corrupt", text))
    names = list(WAYS)
    rng.shuffle(names)
    for name in names:
        broken = WAYS[name](text, rng, pool or _FUNCTION)
        if broken is not None and rng.random() < 0.2:
            other = rng.choice([n for n in WAYS if n != name])
            broken = WAYS[other](broken, rng, pool or _FUNCTION) or broken
        if broken is not None and _plain(broken) != _plain(text):
            return broken, name
    return None


def _leave_out(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    """A function word gone, or the noun or verb behind one: the hole a deleted word leaves."""
    words = list(_WORD.finditer(text))
    inner = [i for i in range(1, len(words)) if words[i].group().lower() in _FUNCTION or _holds(words, i)]
    if not inner:
        return None
    i = rng.choice(inner)
    return _without(text, words[i].start(), words[i].end())


def _holds(words: Sequence[re.Match[str]], i: int) -> bool:
    """Whether a word stands behind an article or preposition and before another function word: it cannot be missed."""
    before = words[i - 1].group().lower() in {
        "a",
        "an",
        "the",
        "to",
        "of",
        "at",
        "my",
        "your",
        "his",
        "their",
        "is",
        "are",
    }
    after = i + 1 == len(words) or words[i + 1].group().lower() in _FUNCTION
    return before and after


def _mask(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    words = list(_WORD.finditer(text))
    word = rng.choice(words)
    return text[: word.start()] + rng.choice(MASKS) + text[word.end() :]


def _swap(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    words = list(_WORD.finditer(text))
    i = rng.randrange(len(words) - 1)
    a, b = words[i], words[i + 1]
    return text[: a.start()] + b.group() + text[a.end() : b.start()] + a.group() + text[b.end() :]


def _repeat(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    """A word, or a run of words, said twice."""
    words = list(_WORD.finditer(text))
    size = rng.randint(1, min(4, len(words)))
    i = rng.randrange(len(words) - size + 1)
    start, end = words[i].start(), words[i + size - 1].end()
    return f"{text[:end]} {text[start:end]}{text[end:]}"


def _cut_short(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    """The end missing, right behind a function word, so that something has to follow."""
    words = list(_WORD.finditer(text))
    places = [
        w
        for w in words[2:-1]
        if w.group().lower() in _FUNCTION
        and w.group().lower()
        not in {"it", "you", "not", "him", "do", "did", "have", "this", "these", "those", "that"}
    ]
    return text[: rng.choice(places).end()] if places else None


def _behead(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    """The beginning missing."""
    words = list(_WORD.finditer(text))
    places = [
        i
        for i in range(1, len(words) - 2)
        if words[i - 1].group().lower() in {"the", "a", "an", "i", "you", "he", "she", "they", "we", "to"}
    ]
    return text[words[rng.choice(places)].start() :] if places else None


def _wrong_word(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    words = list(_WORD.finditer(text))
    word = rng.choice(words)
    other = rng.choice(pool)
    if other.lower() == word.group().lower():
        return None
    return text[: word.start()] + other + text[word.end() :]


def _extra_word(text: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    words = list(_WORD.finditer(text))
    word = rng.choice(words[1:])
    return f"{text[: word.start()]}{rng.choice(pool)} {text[word.start() :]}"


def _without(text: str, start: int, end: int) -> str:
    return (text[:start].rstrip() + " " + text[end:].lstrip()).strip()


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.lower())) + str(text.count("*"))


WAYS: dict[str, Callable[[str, random.Random, Sequence[str]], str | None]] = {
    "word left out": _leave_out,
    "word masked": _mask,
    "words swapped": _swap,
    "words repeated": _repeat,
    "end missing": _cut_short,
    "beginning missing": _behead,
    "wrong word": _wrong_word,
    "extra word": _extra_word,
}
