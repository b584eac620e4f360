"""Reading lists of passage numbers out of what a model said.

Three outcomes, kept apart because they mean different things: the reply is what was asked for (`ok`); it is not quite,
but says one thing only (`repaired`); or nobody can tell what it says, and then there is no label (`unparseable`,
`empty`, `refused`), whatever numbers may stand in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.judgments import READABLE


@dataclass(frozen=True)
class Reading:
    """What a reply says.

    Attributes:
        numbers: Passage numbers (1 = the first shown), in the order given; may be empty where a selection may be.
        status: One of `schemas.judgments.PARSE_STATUSES`.
        problem: What had to be mended, or why it cannot be read; empty for `ok`.
    """

    numbers: tuple[int, ...]
    status: str
    problem: str = ""

    @property
    def readable(self) -> bool:
        """Whether it carries a label."""
        return self.status in READABLE


_NUMBER = r"\d{1,4}"
_RANGE = rf"{_NUMBER}(?:\s*(?:-|–|—|\.\.|to)\s*{_NUMBER})?"
# [3]   [2-4]   [1, 3]   [1], [3] and [5]   [2] > [1]
_INSIDE = rf"\s*(?:passages?\s+)?{_RANGE}(?:\s*[,;>&]\s*{_RANGE})*\s*,?\s*"
_BRACKET = rf"\[{_INSIDE}\]"
_BETWEEN = r"(?:\s*(?:[,;>=&|]|\band\b|-|–|—|to)?\s*(?:[-*•]\s+)?)"
_RUN = re.compile(rf"{_BRACKET}(?:{_BETWEEN}{_BRACKET})*", re.IGNORECASE)
_ITEM = re.compile(_RANGE, re.IGNORECASE)
_BRACKET_RANGE = re.compile(rf"\[\s*({_NUMBER})\s*\]\s*(?:-|–|—|\bto\b)\s*\[\s*({_NUMBER})\s*\]")
# A whole reply of bare numbers: 1, 3 and 5   2 > 1 > 3   1\n3
_BARE = re.compile(
    rf"(?:#?\s*{_RANGE})(?:\s*(?:[,;>&\n]|\band\b)\s*(?:[-*•]\s+)?#?\s*{_RANGE})*\s*\.?", re.IGNORECASE
)
_LABEL = re.compile(
    r"^\s*(?:the\s+)?(?:answer|selection|selected|ranking|order|relevant|useful|passages?|numbers?|output|result)"
    r"[\w\s()'\"*]{0,60}?(?::|\bis\b|\bare\b)\s*",
    re.IGNORECASE,
)
_NONE = re.compile(
    r"[\[({\"'*\s]*(?:none|\[\s*\]|no\s+passages?|nothing|n/?a|\s*)"
    r"(?:\s+(?:of\s+(?:the|these)\s+)?(?:(?:\w+\s+)?passages?|them)?\s*"
    r"(?:(?:is|are|were)\s+)?(?:relevant|useful|on\s+topic|helpful)?(?:\s+to\s+the\s+query)?)?[\])}\"'*\s.!]*",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'|’)?m\s+(?:sorry|unable|not\s+able)|i\s+(?:am\s+(?:sorry|unable|not\s+able)|can(?:no|')t|will\s+not|"
    r"won(?:'|’)t)|sorry|as\s+an\s+ai|unfortunately)",
    re.IGNORECASE,
)
# A structured reply of a server that was given the schema.
_JSON = re.compile(rf'\{{\s*"\w+"\s*:\s*\[(?:\s*{_NUMBER}\s*(?:,\s*{_NUMBER}\s*)*)?\]\s*\}}')
# More words than this around a list are an essay, a copied passage, an answer: not a list with a remark.
MOST_PROSE = 400
MOST_REMARK = 160
_NEGATION = re.compile(
    r"\b(?:not|no|none|neither|nor|irrelevant|unrelated|except|without|unlike)\b|n['’]t\b", re.IGNORECASE
)


def parse_selection(text: str, n: int) -> Reading:
    """Read which of n passages a reply selects.

    Args:
        text: `[1], [3]` as asked; also bare numbers, ranges, JSON, prose around one list. `none` or `[]` selects none.
        n: Passages that were shown, numbered from 1.

    Returns:
        Distinct numbers in the order given. Numbers nobody showed are left out (`repaired`); where no other is left,
        the reply cannot be read: it is not an empty selection.

    Example:
        >>> parse_selection("[2], [5]", 5)
        Reading(numbers=(2, 5), status='ok', problem='')
        >>> parse_selection("The useful ones are [1-3] and [9].", 5).numbers
        (1, 2, 3)
    """
    return _parse(text, n, ranking=False)


def parse_ranking(text: str, n: int, at_least: int = 1) -> Reading:
    """Read an order of n passages, best first.

    Args:
        text: `[2] > [1] > [3]` as asked.
        n: Passages that were shown, numbered from 1.
        at_least: Fewest passages it must place: with fewer, nobody can say which are at the top.

    Returns:
        Distinct numbers, best first; `repaired` where some passages are not placed.
    """
    reading = _parse(text, n, ranking=True)
    if not reading.readable:
        return reading
    placed = len(reading.numbers)
    if placed < at_least:
        return Reading((), "unparseable", f"places {placed} of {n} passages; {at_least} are needed")
    if placed < n and reading.status == "ok":
        return Reading(reading.numbers, "repaired", f"places {placed} of {n} passages")
    return reading


def _parse(text: str, n: int, *, ranking: bool) -> Reading:
    stripped = text.strip()
    if not stripped:
        return Reading((), "empty", "nothing was said")
    structured = _JSON.fullmatch(stripped) is not None
    if not ranking and re.fullmatch(r"none|\[\]|\{[^{}]*\[\s*\]\s*\}", stripped, re.IGNORECASE):
        return Reading((), "ok")
    bare = _LABEL.sub("", stripped, count=1).strip("\"'`* \n")
    if not ranking and _NONE.fullmatch(bare):
        return Reading((), "repaired", "says in words that it selects none")
    found = _find(stripped, bare, ranking)
    if isinstance(found, Reading):
        return found
    separator = ">" if ranking else ","
    exact = rf"\[{_NUMBER}\](?:\s*{separator}\s*\[{_NUMBER}\])*"
    return _checked(found, n, clean=structured or re.fullmatch(exact, stripped) is not None)


def _find(stripped: str, bare: str, ranking: bool) -> list[int] | Reading:
    """The numbers of the one list in a reply, unchecked; or why there is no such list."""
    runs = list(_RUN.finditer(stripped))
    if not runs:
        if _BARE.fullmatch(bare):
            return _numbers(bare)
        if _REFUSAL.match(stripped):
            return Reading((), "refused", "declines to answer")
        return Reading((), "unparseable", "no list of passage numbers")
    lists = [_numbers(run.group()) for run in runs]
    if all(same == lists[0] for same in lists):
        if _negated(stripped, runs[0].start()):
            return Reading((), "unparseable", "the list is said in the negative")
        if len(stripped) - len(runs[0].group()) <= MOST_PROSE or _stands_alone(stripped, runs[-1]):
            return lists[0]
        return Reading((), "unparseable", "a number of a passage in long prose")
    # A list that closes the reply, or stands on a line of its own, is the answer to which the rest leads up.
    alone = [numbers for run, numbers in zip(runs, lists, strict=True) if _stands_alone(stripped, run)]
    if alone and all(same == alone[0] for same in alone):
        return alone[0]
    # An item a line, each with a remark: fine, unless a remark may say the contrary.
    short = max(map(len, stripped.split("\n"))) <= MOST_REMARK
    if short and all(_opens_line(stripped, run.start()) for run in runs) and not _NEGATION.search(stripped):
        return [number for numbers in lists for number in numbers]
    what = "orders" if ranking else "lists"
    return Reading((), "unparseable", f"{len(runs)} different {what} of passages in prose")


def _negated(text: str, start: int) -> bool:
    """Whether the sentence that leads up to a list, or a sentence it is the subject of, denies it."""
    sentence = re.split(r"[.!?]\s|\n", text)
    position = 0
    for part in sentence:
        at = text.find(part, position)
        position = at + len(part)
        if at <= start < position:
            return bool(_NEGATION.search(part))
    return False


def _stands_alone(text: str, run: re.Match[str]) -> bool:
    before, after = text[: run.start()], text[run.end() :]
    line = before.rpartition("\n")[2]
    closes = not re.search(r"\w", after.partition("\n")[0])
    return closes and (not re.search(r"\w", line) or line.rstrip(" *").endswith(":"))


def _opens_line(text: str, start: int) -> bool:
    return not re.search(r"\w", text[:start].rpartition("\n")[2])


def _numbers(text: str) -> list[int]:
    """All numbers, ranges spelled out."""
    text = _BRACKET_RANGE.sub(r"[\1-\2]", text)
    found: list[int] = []
    for item in _ITEM.findall(text):
        ends = [int(number) for number in re.findall(_NUMBER, item)]
        # A falling range is no range: 5-2 lists two numbers.
        found += range(ends[0], ends[1] + 1) if len(ends) == 2 and ends[0] <= ends[1] else ends
    return found


def _checked(numbers: Sequence[int], n: int, *, clean: bool) -> Reading:
    distinct = tuple(dict.fromkeys(numbers))
    kept = tuple(number for number in distinct if 1 <= number <= n)
    if not kept:
        return Reading((), "unparseable", f"no number between 1 and {n}")
    problems = []
    if len(kept) < len(distinct):
        problems.append(f"{len(distinct) - len(kept)} numbers of no passage left out")
    if len(distinct) < len(numbers):
        problems.append(f"{len(numbers) - len(distinct)} repetitions left out")
    if not clean and not problems:
        problems.append("not in the form asked for")
    return Reading(kept, "repaired" if problems else "ok", "; ".join(problems))
