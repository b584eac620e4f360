"""The ends of a sentence: a rewrite keeps the closing mark and the capital letter its source had.

Small models drop them (parallel data often lack them), and a corpus whose sentences run together is not the same
corpus back.
"""

from __future__ import annotations

import re

_CLOSING = re.compile(r"[.!?…。！？]+[\"'”’)\]]*$")
_LOOSE_END = re.compile(r"[\s,;:]+$")
_LONGEST_MARK = 3  # "?!" and "..." are kept as they are; of "!!!!!!" the first three


def match_ends(source: str, answer: str) -> str:
    """Give an answer its source's closing mark and opening capital, where it lost them.

    Args:
        source: What was to be rewritten.
        answer: The rewrite; empty stays empty.

    Returns:
        The answer, with the mark appended if the source closes with one and the answer with none, and its first
        letter capitalised if the source's is.

    Example:
        >>> match_ends("Only a fool would buy it.", "only some would buy it")
        'Only some would buy it.'
    """
    if not answer.strip():
        return answer
    mark = _CLOSING.search(source)
    if mark and not _CLOSING.search(answer):
        answer = _LOOSE_END.sub("", answer) + mark.group()[:_LONGEST_MARK]
    if source[:1].isupper() and answer[:1].islower():
        answer = answer[0].upper() + answer[1:]
    return answer
