"""Segments: a text cut into sentences that tile it exactly, in characters.

Sentence rules are sentencex's (Wikimedia; per-language abbreviations and quotes). Web text ends lines without a full
stop, so a line break also ends a segment unless it looks like a hard wrap (the next line goes on in lower case).
Everything is linear in the text's length: a 50 MB text takes seconds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas import flight
from transforms.detox.options import SEGMENT_DEFAULTS, SegmentOptions

SEGMENT_TYPE = pa.struct(
    [pa.field("start", pa.int32(), nullable=False), pa.field("end", pa.int32(), nullable=False)]
)

# sentencex works in chunks of 10,240 bytes and loses blank lines at their seams (seen in 1.0.32): stay below, in
# characters of at most four bytes it only ever sees whole texts of fewer than 2,500 characters.
_BLOCK = 2_500
_SPACES = re.compile(r"\s*")
_LINE_END = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]\s*")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n|\r[^\S\r\n]*\r|\r\n[^\S\r\n]*\r\n|\u2029")
_TERMINAL = frozenset(".!?:;…。！？：；\"'”’»)]")
_CLAUSE = re.compile(r".*(?:[,;:)\]}—–…](?=\s)|[，、；：。！？])", re.DOTALL)
_WORD_BREAK = re.compile(r".*\s", re.DOTALL)
_FALLBACK = re.compile(r"[^.!?]*(?:[.!?]+\s+|$)", re.DOTALL)
_JOINERS = frozenset("\u200d\ufe0e\ufe0f\u20e3")

Ends = npt.NDArray[np.int64]


def segment_text(
    batch: pa.RecordBatch,
    *,
    text_column: str,
    options: SegmentOptions = SEGMENT_DEFAULTS,
    count: Callable[[str, int], None] | None = None,
) -> pa.RecordBatch:
    """Set scratch column `segments` (list<struct<start, end>>): null for null text, empty for empty text.

    Args:
        batch: n rows in flight.
        text_column: Name of the text column.
        options: Unit, language and longest segment.
        count: Counter to add to (`segment.segments`, `segment.chars`).
    """
    texts = batch.column(text_column)
    offsets, starts, ends = [0], [], []
    chars = 0
    for scalar in texts:
        text = scalar.as_py()
        if text:
            stops = segment_ends(text, options)
            ends.append(stops)
            starts.append(np.concatenate([[0], stops[:-1]]))
            offsets.append(offsets[-1] + len(stops))
            chars += len(text)
        else:
            offsets.append(offsets[-1])
    values = pa.StructArray.from_arrays(
        [_int32(starts), _int32(ends)], fields=[SEGMENT_TYPE.field(0), SEGMENT_TYPE.field(1)]
    )
    segments = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values, mask=texts.is_null() if texts.null_count else None
    )
    if count:
        count("segment.segments", offsets[-1])
        count("segment.chars", chars)
    return flight.set_scratch(batch, "segments", segments)


def segment_spans(text: str, options: SegmentOptions = SEGMENT_DEFAULTS) -> list[tuple[int, int]]:
    """The segments of one text as (start, end) pairs that tile it; none for an empty text.

    Example:
        >>> segment_spans("Hello there. You fool!")
        [(0, 13), (13, 22)]
    """
    ends = segment_ends(text, options).tolist() if text else []
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def segment_ends(text: str, options: SegmentOptions = SEGMENT_DEFAULTS) -> Ends:
    """Ends of the segments of a non-empty text, ascending; the last is `len(text)`.

    Whitespace belongs to the segment before it (at the head of the text, to the first segment).
    """
    if options.unit == "document" or not text:
        return np.array([len(text)], np.int64)
    ends = np.union1d(_sentence_ends(text, options.language), _line_ends(text))
    out: list[int] = []
    previous, last = 0, len(text)
    for end in ends.tolist():
        if end <= previous:
            continue  # inside whitespace that already went to the segment before
        end = _after_spaces(text, end)
        if end < last and not text[previous:end].strip():
            continue  # nothing but leading whitespace: it belongs to the first segment
        if end - previous > options.max_chars:
            out.extend(split_long(text, previous, end, options.max_chars))
        out.append(end)
        previous = end
    if (
        previous < last
    ):  # trailing whitespace cannot be left over, but a text of whitespace only is one segment
        out.extend(split_long(text, previous, last, options.max_chars))
        out.append(last)
    return np.array(out, np.int64)


def split_long(text: str, start: int, end: int, max_chars: int) -> list[int]:
    """Inner cuts that bring `text[start:end]` down to pieces of at most `max_chars` characters.

    Cuts after the last clause mark in the second half of a piece's room, else after the last space there, else
    hard (but inside no combined character). Whitespace stays with the piece before it, even beyond the limit.
    """
    cuts: list[int] = []
    visible = start + len_without_tail(text, start, end)  # once: the tail may be as long as the text
    while visible - start > max_chars:
        low, high = start + max_chars // 2, start + max_chars
        match = _CLAUSE.match(text, low, high) or _WORD_BREAK.match(text, low, high)
        cut = match.end() if match else _whole_character(text, low, high)
        cut = _after_spaces(text, cut)
        if cut >= end:
            break
        cuts.append(cut)
        start = cut
    return cuts


def len_without_tail(text: str, start: int, end: int) -> int:
    """Length of `text[start:end]` less its trailing whitespace."""
    while end > start and text[end - 1].isspace():
        end -= 1
    return end - start


def _sentence_ends(text: str, language: str) -> Ends:
    ends: list[int] = []
    position = 0
    while position < len(text):
        block = text[position : position + _BLOCK]
        if block.isspace():  # megabytes of line breaks do occur
            position += len(block)
            continue
        lengths = [len(s) for s in _sentences(block, language)]
        if position + len(block) < len(text):
            if (
                len(lengths) == 1
            ):  # it goes on in the next block: the edge, mostly within a word, ends nothing
                position += len(block)
                continue
            lengths.pop()  # it may go on there
        stops = position + np.cumsum(lengths)
        ends.extend(stops.tolist())
        position = ends[-1]
    return np.array(ends, np.int64)


def _sentences(block: str, language: str) -> list[str]:
    import sentencex

    parts = [p for p in sentencex.segment(language, block) if p]
    if "".join(parts) != block:  # never trust offsets to a splitter that lost a character
        parts = [m.group() for m in _FALLBACK.finditer(block) if m.group()]
    return parts


def _line_ends(text: str) -> Ends:
    ends = []
    for match in _LINE_END.finditer(text):
        end = match.end()
        if end == len(text):
            break
        wrapped = (
            text[end].islower()
            and not _BLANK_LINE.search(text, match.start(), end)
            and _last_visible(text, match.start()) not in _TERMINAL
        )
        if not wrapped:
            ends.append(end)
    return np.array(ends, np.int64)


def _last_visible(text: str, position: int) -> str:
    """The last character before `position` that is no space (looking back a little way only)."""
    return text[max(0, position - 64) : position].rstrip()[-1:]


def _after_spaces(text: str, position: int) -> int:
    match = _SPACES.match(text, position)
    return match.end() if match else position


def _whole_character(text: str, low: int, cut: int) -> int:
    """Move a hard cut left, so that no accent, joined emoji, flag or line break is torn apart."""
    floor = max(low, cut - 32)
    while cut > floor and (
        text[cut] in _JOINERS
        or text[cut - 1] == "\u200d"
        or unicodedata.combining(text[cut])
        or "\U0001f3fb" <= text[cut] <= "\U0001f3ff"  # skin tones
        or ("\U0001f1e6" <= text[cut] <= "\U0001f1ff" and "\U0001f1e6" <= text[cut - 1] <= "\U0001f1ff")
    ):
        cut -= 1
    return cut


def _int32(parts: list[Ends]) -> pa.Array:
    flat = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return pa.array(flat.astype(np.int32))
