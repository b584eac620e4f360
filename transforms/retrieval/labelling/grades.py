"""Reading a grade, or a yes or no, out of what a judge said; and asking once more where nobody can.

A grade is taken only where the reply says one and no other: a reply that names two is unparseable, not the first of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from models.protocols import GenerationRequest, Message, Sampling
from transforms.retrieval.labelling.judge import UNASKED, Reply

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

LEAST, MOST = 0, 3
GRADE_SCHEMA = orjson.dumps(
    {
        "type": "object",
        "properties": {"grade": {"type": "integer", "enum": [0, 1, 2, 3]}},
        "required": ["grade"],
        "additionalProperties": False,
    }
).decode()
_JSON = re.compile(r"\{[^{}]*\}", re.DOTALL)
_FENCE = re.compile(r"^\s*```(?:json)?\s*|\s*```\s*$", re.IGNORECASE)
# "Grade: 2", "final grade is **2**", "score = 3 out of 3"
_SAID = re.compile(
    r"(?:final\s+)?(?:grade|score|rating|label)\b[\s\"'*`:=]*(?:is|of|:|=)?[\s\"'*`(\[]*([0-9]+)(?![\d.]*\d)",
    re.IGNORECASE,
)
_BARE = re.compile(r"[\s\"'*`(\[]*([0-9]+)(?:\s*(?:/|out of)\s*3)?[\s\"'*`)\].]*", re.IGNORECASE)
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'|’)?m\s+(?:sorry|unable|not\s+able)|i\s+(?:am\s+(?:sorry|unable|not\s+able)|can(?:no|')t|cannot|will\s+not|"
    r"won(?:'|’)t)|sorry|as\s+an\s+ai|unfortunately)",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"[\s\"'*`(\[]*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Grade:
    """What a reply says.

    Attributes:
        value: The grade (yes = 1, no = 0); None where there is none to read.
        status: One of `schemas.judgments.PARSE_STATUSES`.
        problem: What had to be mended, or why it cannot be read.
    """

    value: int | None
    status: str
    problem: str = ""


def parse_grade(text: str, *, json: bool) -> Grade:
    """Read a grade of 0 to 3.

    Args:
        text: `{"grade": 2}` or a digit as asked; also JSON in a fence or in prose, or a sentence that names one grade.
        json: JSON was asked for: a bare digit is then a repair.

    Example:
        >>> parse_grade('{"grade": 2}', json=True)
        Grade(value=2, status='ok', problem='')
        >>> parse_grade("It is a 2, or perhaps grade 3.", json=False).status
        'unparseable'
    """
    stripped = text.strip()
    if not stripped:
        return Grade(None, "empty", "nothing was said")
    if (found := _json_grade(stripped)) is not None:
        return Grade(found, "ok") if json else Grade(found, "repaired", "JSON")
    bare = _BARE.fullmatch(stripped)
    if bare and LEAST <= int(bare[1]) <= MOST:
        clean = not json and stripped.rstrip(".") == bare[1]
        return Grade(int(bare[1]), "ok") if clean else Grade(int(bare[1]), "repaired", "a bare grade")
    inside = [g for g in (_json_grade(m) for m in _JSON.findall(_FENCE.sub("", stripped))) if g is not None]
    said = [int(m) for m in _SAID.findall(stripped)]
    values = set(inside) or set(said)
    if len(values) == 1 and LEAST <= (value := values.pop()) <= MOST:
        return Grade(value, "repaired", "a grade among other words")
    if _REFUSAL.match(stripped):
        return Grade(None, "refused", "declines to answer")
    return Grade(
        None,
        "unparseable",
        "no grade, or several" if not values else f"names grades that are not 0 to {MOST}",
    )


def parse_yes_no(text: str) -> Grade:
    """Read a yes or no at the start of a reply: 1 or 0."""
    stripped = text.strip()
    if not stripped:
        return Grade(None, "empty", "nothing was said")
    found = _YES_NO.match(stripped)
    if found is None:
        refused = _REFUSAL.match(stripped) is not None
        return Grade(None, "refused" if refused else "unparseable", "neither yes nor no")
    value = int(found[1].lower() == "yes")
    return Grade(value, "ok" if stripped.lower().strip(" .") in ("yes", "no") else "repaired")


def _json_grade(text: str) -> int | None:
    try:
        body = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    value = body.get("grade") if isinstance(body, dict) else None
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if LEAST <= value <= MOST else None


def ask_grades(
    judge: Judge,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    parse: Callable[[str], Grade],
    repair: str,
) -> list[tuple[Grade, Reply]]:
    """Ask, read, and ask once more what could not be read.

    Args:
        judge: Who is asked.
        requests: n questions.
        sampling: Of both asks.
        parse: Reads a reply.
        repair: What is said to a reply that could not be read; empty asks no second time.

    Returns:
        n pairs: what was read, and the reply it was read from, with the tokens of both asks. A question the budget had
        no room for has the status `unasked`.
    """
    replies = judge.ask(requests, sampling)
    found = [_read(reply, parse) for reply in replies]
    again = [
        i
        for i, (g, r) in enumerate(found)
        if repair and g.status in ("unparseable", "empty") and r.status != UNASKED
    ]
    if again:
        second = judge.ask([_once_more(requests[i], replies[i].text, repair) for i in again], sampling)
        for i, reply in zip(again, second, strict=True):
            first = found[i][1]
            if reply.status == UNASKED:
                continue  # what was read of the first reply stands: it was paid for
            grade, reply = _read(reply, parse)
            if grade.status == "ok":
                grade = Grade(grade.value, "repaired", "asked once more")
            elif grade.value is None:
                grade, reply = found[i][0], dataclasses.replace(reply, text=first.text)
            found[i] = grade, _together(first, reply)
    return found


def _read(reply: Reply, parse: Callable[[str], Grade]) -> tuple[Grade, Reply]:
    if reply.ok:
        return parse(reply.text), reply
    return Grade(None, reply.status, reply.error or "nothing was said"), reply


def _together(first: Reply, second: Reply) -> Reply:
    return dataclasses.replace(
        second,
        prompt_tokens=first.prompt_tokens + second.prompt_tokens,
        completion_tokens=first.completion_tokens + second.completion_tokens,
    )


def _once_more(request: GenerationRequest, said: str, repair: str) -> GenerationRequest:
    turns = (*request.messages, Message("assistant", request.prefill + said or "."), Message("user", repair))
    return dataclasses.replace(request, messages=turns, prefill="", stop=(), shared=0)


def reply_row(grade: Grade, reply: Reply) -> dict[str, Any]:
    """The columns of a row that say what was said, and at what cost."""
    return {
        "parse_status": grade.status,
        "error": grade.problem if grade.value is None else None,
        "reply": reply.text or None,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
