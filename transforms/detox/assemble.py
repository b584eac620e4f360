"""Where edits end up in the edited text, and what to cut so that whole segments vanish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Edit = Mapping[str, Any]


def edited_ranges(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Where the edits, in order of their start, ended up in the edited text."""
    out = []
    shift = 0
    for edit in sorted(edits, key=lambda e: (e["start"], e["end"])):
        start = edit["start"] + shift
        out.append((start, start + len(edit["after"])))
        shift += len(edit["after"]) - len(edit["before"])
    return out


def removal_ranges(
    text: str, segments: Sequence[tuple[int, int]], dropped: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """What to cut so that whole segments vanish and what is left reads on.

    Between two kept segments the stronger of the two gaps stays (a blank line beats a line break beats a space); at
    the end of the text its trailing whitespace stays.

    Args:
        text: The document.
        segments: Its segments (start, end), tiling it; whitespace belongs to the segment before.
        dropped: Indices of the segments to cut, ascending.

    Returns:
        For each dropped segment its [start, end); ranges are disjoint.
    """
    ranges = {i: segments[i] for i in dropped}
    runs: list[list[int]] = []
    for i in dropped:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in runs:
        first, last = run[0], run[-1]
        start, end = segments[first][0], segments[last][1]
        left = _trailing_space(text, start)
        right = _trailing_space(text, end)
        at_end = last == len(segments) - 1
        if first > 0 and (at_end or right.count("\n") > left.count("\n")):
            ranges[first] = (start - len(left), ranges[first][1])
            ranges[last] = (ranges[last][0], max(ranges[last][0], end - len(right)))
    return ranges


def _trailing_space(text: str, end: int) -> str:
    start = end
    while start > 0 and text[start - 1].isspace():
        start -= 1
    return text[start:end]
