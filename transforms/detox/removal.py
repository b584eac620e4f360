"""What to cut so that whole segments vanish and what is left reads on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.int64]


def removal_ranges(
    text: str, starts: Offsets, ends: Offsets, dropped: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Ranges to cut for segments to be dropped.

    Between two kept segments the stronger of the two gaps stays (a blank line beats a line break beats a space); at
    the end of the text its trailing whitespace stays.

    Args:
        text: The document.
        starts: Where its segments start; they tile it, whitespace belongs to the segment before.
        ends: Where they end.
        dropped: Indices of the segments to cut, ascending.

    Returns:
        For each dropped segment its [start, end); ranges are disjoint.
    """
    ranges = {i: (int(starts[i]), int(ends[i])) for i in dropped}
    runs: list[list[int]] = []
    for i in dropped:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in runs:
        first, last = run[0], run[-1]
        start, end = int(starts[first]), int(ends[last])
        left = _trailing_space(text, start)
        right = _trailing_space(text, end)
        at_end = last == len(starts) - 1
        if first > 0 and (at_end or right.count("\n") > left.count("\n")):
            ranges[first] = (start - len(left), ranges[first][1])
            ranges[last] = (ranges[last][0], max(ranges[last][0], end - len(right)))
    return ranges


def without_segments(
    text: str, starts: Offsets, ends: Offsets, dropped: Sequence[int]
) -> list[tuple[int, int]]:
    """The stretches of a text that stay when segments are dropped, ascending."""
    out, position = [], 0
    for a, b in sorted(removal_ranges(text, starts, ends, dropped).values()):
        if a > position:
            out.append((position, a))
        position = max(position, b)
    if position < len(text):
        out.append((position, len(text)))
    return out


def _trailing_space(text: str, end: int) -> str:
    start = end
    while start > 0 and text[start - 1].isspace():
        start -= 1
    return text[start:end]
