"""Rewriting systems that need no model to be run beforehand: what every rewriter has to be better than."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from models.protocols import ToxicityScorer
from transforms.detox.options import SegmentOptions
from transforms.detox.removal import without_segments
from transforms.detox.segment import segment_ends
from transforms.requests import score_cached
from transforms.shards.cache import RequestCache

BUILT_IN = ("copy", "delete", "lexicon-mask", "sentence-drop")
MASK = "***"
# Dolma v1 removes sentences its hate and its profanity classifier score above 0.4 (Soldaini et al., ACL 2024).
DROP_FROM = 0.4


class WordFinder(Protocol):
    """A word list that says where its words stand."""

    def find_all(self, texts: Sequence[str]) -> Sequence[Sequence[tuple[int, int, str]]]:
        """For each text its hits as (start, end, term)."""
        ...


def delete_words(texts: Sequence[str], lexicon: WordFinder) -> list[str]:
    """Each text without its listed words and the blanks they leave (the "delete" baseline of Dale et al., 2021).

    Args:
        texts: n texts.
        lexicon: The word list.
    """
    return [_replaced(t, hits, "") for t, hits in zip(texts, lexicon.find_all(texts), strict=True)]


def mask_words(texts: Sequence[str], lexicon: WordFinder, mask: str = MASK) -> list[str]:
    """Each text with every listed word replaced by a mask, as forum software does.

    Args:
        texts: n texts.
        lexicon: The word list.
        mask: What stands in a word's place.
    """
    return [_replaced(t, hits, mask) for t, hits in zip(texts, lexicon.find_all(texts), strict=True)]


def drop_sentences(
    texts: Sequence[str],
    scorer: ToxicityScorer,
    cache: RequestCache | None = None,
    threshold: float = DROP_FROM,
) -> list[str]:
    """Each text without the sentences a classifier scores at least the threshold (Dolma's rule).

    Args:
        texts: n texts.
        scorer: The classifier; its first label counts.
        cache: Where its scores are remembered.
        threshold: From which on a sentence goes.

    Returns:
        n texts; empty where every sentence went.
    """
    options = SegmentOptions()
    cuts = [segment_ends(t, options) if t else np.zeros(0, np.int64) for t in texts]
    starts = [np.concatenate([[0], c[:-1]]).astype(np.int64) if len(c) else c for c in cuts]
    sentences = [
        t[a:b] for t, s, c in zip(texts, starts, cuts, strict=True) for a, b in zip(s, c, strict=True)
    ]
    scores = score_cached(scorer, sentences, cache)[:, 0] if sentences else np.zeros(0, np.float32)
    out, done = [], 0
    for text, begin, end in zip(texts, starts, cuts, strict=True):
        mine = scores[done : done + len(end)]
        done += len(end)
        dropped = np.flatnonzero(mine >= np.float32(threshold)).tolist()
        out.append(
            "".join(text[a:b] for a, b in without_segments(text, begin, end, dropped)) if dropped else text
        )
    return out


def _replaced(text: str, hits: Sequence[tuple[int, int, str]], mask: str) -> str:
    out, position = "", 0
    for start, end, *_ in hits:
        out += text[position:start] + mask
        position = end
        if not mask and text[end : end + 1] == " " and (not out or out[-1].isspace()):
            position += 1  # of the two blanks around a word that is gone one stays
    out += text[position:]
    return out.strip() if hits and not mask else out
