"""Word-level differences between two texts, for people to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"\s+|[^\W_]+(?:['’][^\W_]+)*|_+|[^\w\s]")
_MAX_TOKENS = 20_000

Piece = tuple[str, str]  # ("equal" | "delete" | "insert", text)


def tokenize(text: str) -> list[str]:
    """Split a text into words, runs of white space and single marks; joined again they are the text."""
    return _TOKEN.findall(text)


def word_diff(before: str, after: str) -> list[Piece]:
    """Compare two texts word by word.

    Runs of change that only blanks or single marks hold apart are merged, so that a reader sees phrases replaced
    rather than a patchwork.

    Args:
        before: The original text.
        after: The new text.

    Returns:
        Pieces in reading order. Those marked `equal` or `delete` join to `before`, `equal` or `insert` to `after`.
    """
    from rapidfuzz.distance import LCSseq

    a, b = tokenize(before), tokenize(after)
    if len(a) + len(b) > _MAX_TOKENS:
        return _coarse(a, b)
    pieces: list[Piece] = []
    for op in LCSseq.opcodes(a, b):
        tag, (a0, a1), (b0, b1) = op.tag, (op.src_start, op.src_end), (op.dest_start, op.dest_end)
        if tag == "equal":
            pieces.append(("equal", "".join(a[a0:a1])))
        else:
            pieces += [("delete", "".join(a[a0:a1])), ("insert", "".join(b[b0:b1]))]
    return _merge(pieces)


def _coarse(a: Sequence[str], b: Sequence[str]) -> list[Piece]:
    """Common head and tail, and one replacement between them (for texts too long to align)."""
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    a_end, b_end = len(a) - tail, len(b) - tail
    return _merge(
        [
            ("equal", "".join(a[:head])),
            ("delete", "".join(a[head:a_end])),
            ("insert", "".join(b[head:b_end])),
            ("equal", "".join(a[a_end:])),
        ]
    )


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Fold slight equal runs between changes into them, put each deletion before its insertion, join neighbours."""
    pieces = [p for p in pieces if p[1]]
    out: list[Piece] = []
    deleted, inserted = "", ""
    for i, (kind, text) in enumerate(pieces):
        if kind == "delete":
            deleted += text
        elif kind == "insert":
            inserted += text
        elif (deleted or inserted) and i + 1 < len(pieces) and _is_slight(text):
            deleted, inserted = deleted + text, inserted + text
        else:
            out += [*_change(deleted, inserted), ("equal", text)]
            deleted, inserted = "", ""
    return _join(out + _change(deleted, inserted))


def _change(deleted: str, inserted: str) -> list[Piece]:
    """One replacement; blanks at the ends of both sides are no part of it."""
    start = 0
    while (
        start < min(len(deleted), len(inserted))
        and deleted[start] == inserted[start]
        and deleted[start].isspace()
    ):
        start += 1
    a, b = len(deleted), len(inserted)
    while min(a, b) > start and deleted[a - 1] == inserted[b - 1] and deleted[a - 1].isspace():
        a, b = a - 1, b - 1
    return [
        ("equal", deleted[:start]),
        ("delete", deleted[start:a]),
        ("insert", inserted[start:b]),
        ("equal", deleted[a:]),
    ]


def _join(pieces: list[Piece]) -> list[Piece]:
    """Drop empty pieces and make one of neighbours of a kind."""
    out: list[Piece] = []
    for kind, text in pieces:
        if text and out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + text)
        elif text:
            out.append((kind, text))
    return out


def _is_slight(text: str) -> bool:
    return not any(c.isalnum() for c in text) and len(text) <= 2
