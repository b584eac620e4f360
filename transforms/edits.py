"""Edits as a reversible record: laid over the original text they give the output, taken back they give the original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def apply_edits(text: str, edits: Iterable[Mapping[str, Any]]) -> str:
    """Lay edits over a text.

    Args:
        text: The original.
        edits: Records with `start`, `end` (characters of the original), `before` and `after`, in any order;
            records whose `after` equals their `before` (flags) change nothing.

    Returns:
        The edited text.

    Raises:
        ValueError: Edits overlap, or `before` is not what the text holds there.
    """
    pieces: list[str] = []
    at = 0
    for edit in sorted(edits, key=lambda e: (e["start"], e["end"])):
        start, end = edit["start"], edit["end"]
        if edit["after"] == edit["before"]:
            continue
        if start < at:
            raise ValueError(f"edit {start}..{end} overlaps the one before it, which ends at {at}")
        if text[start:end] != edit["before"]:
            raise ValueError(f"edit {start}..{end}: the text there is not what the edit says it was")
        pieces += (text[at:start], edit["after"])
        at = end
    pieces.append(text[at:])
    return "".join(pieces)


def revert_edits(text: str, edits: Iterable[Mapping[str, Any]]) -> str:
    """Take edits back: from the output to the original.

    Raises:
        ValueError: `after` is not what the text holds at an edit's place.
    """
    pieces: list[str] = []
    at = shift = 0  # place in the output; output offset minus original offset
    for edit in sorted(edits, key=lambda e: (e["start"], e["end"])):
        if edit["after"] == edit["before"]:
            continue
        start = edit["start"] + shift
        end = start + len(edit["after"])
        if text[start:end] != edit["after"]:
            raise ValueError(
                f"edit {edit['start']}..{edit['end']}: the output there is not what the edit says"
            )
        pieces += (text[at:start], edit["before"])
        at = end
        shift += len(edit["after"]) - len(edit["before"])
    pieces.append(text[at:])
    return "".join(pieces)
