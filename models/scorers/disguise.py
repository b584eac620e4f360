"""Words in disguise: normalisation that keeps character offsets, for matching against a word list.

People who insult write `1d10t`, `stuuupid`, `i d i o t`, `st*pid`, and in full-width or Cyrillic look-alikes.
The first and the last kind are undone here one character for one character, over a whole batch of texts at
once in numpy, so that positions in the normalised text are positions in the text. What cannot be undone so
(stretched, spaced-out and starred words) is only *found* here, cheaply; `Lexicon` looks closer at the few
places there are.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CodeArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

SPACE = 32
_DIGITS = {"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g"}
# Signs are letters only inside a word: the last one of `damn!` is not.
_SIGNS = {"@": "a", "$": "s", "!": "i", "|": "i", "€": "e", "£": "l"}
_MASKS = "*#"
# Letters of other scripts that look like Latin ones.
_LOOK_ALIKES = dict(zip("асеорхуіѕјԁһкмтвнαεικνορτυχ", "aceopxyisjdhkmtbhaeiknoptux", strict=True))
# Zero-width characters and the soft hyphen: invisible, so they are skipped.
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff"
# Scripts that write no blanks between words, or glue particles to them; emoji and further ideographs.
_GLUED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0xD7FF),
    (0xF900, 0xFAFF),
    (0x1F000, 0x10FFFF),
)

# Bits of `Tables.kind`.
SWAPPED, SIGN, MASK, HIDDEN, GLUED = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Tables:
    """What is known of every code point.

    Attributes:
        plain: Lower case, full-width forms folded; white space and punctuation are a blank.
        folded: As `plain`, with digits and look-alikes read as Latin letters.
        kind: Bits: SWAPPED (folded differs from plain, or a sign), SIGN, MASK (`*`, `#`), HIDDEN (to be
            skipped), GLUED (of a script without blanks).
        sign: What a sign is read as inside a word; 0 elsewhere.
        ascii_folded: `folded` of the first 128, for `bytes.translate`.
        ascii_kind: `kind` of the first 128, for `bytes.translate`.
    """

    plain: npt.NDArray[np.uint32]
    folded: npt.NDArray[np.uint32]
    kind: npt.NDArray[np.uint8]
    sign: npt.NDArray[np.uint32]
    ascii_folded: bytes
    ascii_kind: bytes


@functools.cache
def tables() -> Tables:
    """Build the tables, once a process (0.15 s, 15 MB)."""
    size = sys.maxunicode + 1
    plain = np.full(size, SPACE, np.uint32)
    plain[0x20000:] = np.arange(0x20000, size, dtype=np.uint32)  # only ideographs, which are what they are
    for code in range(0x20000):
        char = chr(code)
        category = unicodedata.category(char)
        if char.isalnum() or category in ("Mn", "Mc"):
            form = unicodedata.normalize("NFKC", char).lower()
            plain[code] = ord(form) if len(form) == 1 else ord(char.lower()[0])
        elif category in ("So", "Sk"):  # emoji are on some lists
            plain[code] = code
    folded = plain.copy()
    for source, letter in {**_DIGITS, **_LOOK_ALIKES}.items():
        folded[plain == ord(source)] = ord(letter)
    sign = np.zeros(size, np.uint32)
    for source, letter in _SIGNS.items():
        sign[ord(source)] = ord(letter)
    kind = np.where((folded != plain) | (sign > 0), SWAPPED, 0).astype(np.uint8)
    kind[sign > 0] |= SIGN
    kind[[ord(c) for c in _MASKS]] |= MASK
    kind[[ord(c) for c in _INVISIBLE]] |= HIDDEN
    for first, last in _GLUED:
        kind[first : last + 1] |= GLUED
    rest = bytes(128)
    ascii_folded = folded[:128].astype(np.uint8).tobytes() + rest
    return Tables(plain, folded, kind, sign, ascii_folded, kind[:128].tobytes() + rest)


@dataclass(frozen=True)
class Normalised:
    """A batch of texts, normalised and joined by two blanks (so that no phrase reaches into the next).

    Attributes:
        codes: Code points of the joined texts, invisible ones removed.
        folded: Their normalised code points.
        text: `folded` as a string.
        swapped: Positions, ascending, where a digit, sign or look-alike was read as a letter.
        stretched: Positions, ascending, of a letter that repeats the two before it.
        spaced: Positions, ascending, of the first of three letters that stand alone, one after another.
        masked: Positions, ascending, of `*` and `#` inside or behind a word.
        starts: Where each text begins.
        kept: Position of each code before invisible characters were removed; None where there were none.
        origin: Where each text began before that.
    """

    codes: CodeArray
    folded: CodeArray
    text: str
    swapped: IntArray
    stretched: IntArray
    spaced: IntArray
    masked: IntArray
    starts: IntArray
    kept: IntArray | None
    origin: IntArray

    def offsets(self, doc: IntArray, start: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
        """Positions in the batch as character offsets in the texts they lie in.

        Args:
            doc: (matches,) index of the text of each match.
            start: (matches,) first position.
            end: (matches,) position behind the last.
        """
        if self.kept is not None:
            start, end = self.kept[start], self.kept[end - 1] + 1
        return start - self.origin[doc], end - self.origin[doc]


def normalise(texts: Sequence[str]) -> Normalised:
    """Normalise a batch of texts: about 4 ns a character where all are ASCII, 20 where one is not.

    Args:
        texts: n texts; bound their total length (up to 40 bytes a character are used for a moment).
    """
    t = tables()
    joined = "  " + "  ".join(texts) + "  "
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    origin = 2 + np.cumsum(lengths + 2) - (lengths + 2)
    kept, starts = None, origin
    codes: CodeArray
    folded: CodeArray
    if joined.isascii():
        raw = joined.encode("ascii")
        codes = np.frombuffer(raw, np.uint8)
        folded = np.frombuffer(bytearray(raw.translate(t.ascii_folded)), np.uint8)  # bytearray: writable
        kind = np.frombuffer(raw.translate(t.ascii_kind), np.uint8)
    else:
        # surrogatepass: a lone surrogate from a JSON escape is a character too.
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        kind = t.kind[codes]
        hidden = (kind & HIDDEN) > 0
        if hidden.any():
            kept = np.flatnonzero(~hidden)
            codes, kind = codes[kept], kind[kept]
            starts = np.searchsorted(kept, origin)
        folded = t.folded[codes]
    swapped = np.flatnonzero((kind & SWAPPED) > 0)
    _read_signs(codes, folded, swapped, t)
    blank = folded == SPACE
    stars = np.flatnonzero((kind & MASK) > 0)
    return Normalised(
        codes=codes,
        folded=folded,
        text=_to_string(folded),
        swapped=swapped,
        stretched=_stretched(folded, blank),
        spaced=_spaced(blank),
        masked=stars[~blank[stars - 1] | ((kind[stars - 1] & MASK) > 0)],
        starts=starts,
        kept=kept,
        origin=origin,
    )


def _read_signs(codes: CodeArray, folded: CodeArray, swapped: IntArray, t: Tables) -> None:
    """Read signs inside a word as letters: `$` beside one, `@` behind one or in `@ss`, others between two."""
    where = swapped[t.sign[codes[swapped]] > 0]
    if not len(where):
        return
    code, behind = codes[where], codes[where + 1]
    dollar, at = ord("$"), ord("@")
    before = (folded[where - 1] != SPACE) | np.isin(codes[where - 1], (dollar, at))
    after = (folded[where + 1] != SPACE) | (behind == dollar)
    hissed = (t.plain[behind] == ord("s")) | (behind == dollar)
    # A leading @ is a handle (`@idiot`) unless an s follows (`@ss`); a trailing ! or | is punctuation.
    letter = np.where(code == dollar, before | after, before & after)
    letter |= (code == at) & (before | hissed)
    folded[where[letter]] = t.sign[code[letter]]


def _stretched(folded: CodeArray, blank: BoolArray) -> IntArray:
    same = folded[1:] == folded[:-1]
    return np.flatnonzero(same[1:] & same[:-1] & ~blank[2:]) + 2


def _spaced(blank: BoolArray) -> IntArray:
    """Positions of the first `x` in ` x x x `, the blanks being any non-word characters."""
    if len(blank) < 7:
        return np.zeros(0, np.int64)
    lone = blank[:-2] & ~blank[1:-1] & blank[2:]  # index i: position i + 1 stands alone
    return np.flatnonzero(lone[:-4] & lone[2:-2] & lone[4:]) + 1


def _to_string(folded: CodeArray) -> str:
    if folded.dtype == np.uint8:
        return folded.tobytes().decode("ascii")
    return folded.tobytes().decode("utf-32-le", "surrogatepass")
