"""Grading a passage after saying why: reasons first, the grade last.

The order of thought is that of UMBRELA (Upadhyay et al. 2024, arXiv 2406.06519): what the query is after, how far the
passage meets it, how far it can be trusted, then one grade of 0 to 3. The wording is our own. In this process the reasons
are generated and the grade is read off the next token behind them, so there always is one; a server is given a JSON schema.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from models.protocols import GenerationRequest, Sampling
from schemas.errors import TamisError
from transforms.retrieval.labelling.grades import Grade, ask_grades, parse_grade, reply_row
from transforms.retrieval.labelling.judge import Reply, Scores
from transforms.retrieval.labelling.method import Estimate, QueryLabels
from transforms.retrieval.labelling.pointwise import collect, digit_columns
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.question import Asker, Question, asked

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

_GRADE = {"type": "integer", "enum": [0, 1, 2, 3]}
VERBAL_SCHEMA = orjson.dumps(
    {
        "type": "object",
        "properties": {"reasons": {"type": "string"}, "match": _GRADE, "trust": _GRADE, "grade": _GRADE},
        "required": ["reasons", "match", "trust", "grade"],
        "additionalProperties": False,
    }
).decode()
_BEFORE_GRADE = "\nFinal grade:"


@dataclass(frozen=True)
class GradedVerbal:
    """How relevant is the passage, 0 to 3, after a few sentences of reasons; they go to the column `reply`.

    Attributes:
        reason_tokens: Longest reasons; where they end in the middle, the grade is asked for all the same.
    """

    reason_tokens: int = 96

    name: ClassVar[str] = "graded_verbal"
    signal_class: ClassVar[str] = "A"
    version: ClassVar[int] = 1
    prompts: ClassVar[Mapping[str, str]] = {"judge": "graded-verbal-v1", "repair": "graded-repair-v1"}
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "judge": ("query", "passage", "answer", "json"),
        "repair": ("json",),
    }
    in_process: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.reason_tokens < 1:
            raise TamisError("reason_tokens must be 1 or more")

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `Method.label`."""
        inside = _in_process(judge)
        questions = [self._questions(q, judge, inside) for q in queries]
        requests = asked([q for own in questions for q in own])
        tag = judge.prompt("judge").tag
        if not inside:
            repair = judge.prompt("repair").render(json=True)[0][-1].content
            read = ask_grades(
                judge, requests, self._sampling(inside), lambda text: parse_grade(text, json=True), repair
            )
            replies = iter(read)

            def said(question: Question, answer: tuple[Grade, Reply]) -> dict[str, Any]:
                return question.row(**reply_row(*answer), grade=answer[0].value, prompt_hash=tag)

            return [collect(own, replies, said, lambda answer: answer[0].status) for own in questions]
        graded = iter(self._reasoned(requests, judge))

        def row(question: Question, answer: tuple[Reply, Scores]) -> dict[str, Any]:
            reply, scores = answer
            columns = digit_columns(scores, tag)
            columns["prompt_tokens"] = reply.prompt_tokens + scores.prompt_tokens
            columns["completion_tokens"] = reply.completion_tokens + scores.completion_tokens
            return question.row(**columns, reply=reply.text.strip() or None)

        return [collect(own, graded, row, lambda answer: answer[1].status) for own in questions]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `Method.estimate`."""
        inside = _in_process(judge)
        requests = asked(self._questions(query, judge, inside))
        tokens = sum(map(judge.prompt_tokens, requests))
        out = self._sampling(inside).max_new_tokens * len(requests)
        if inside:  # the reasons are read again with the grade's prompt
            return Estimate(2 * len(requests), 2 * tokens + out, out + len(requests))
        return Estimate(len(requests), tokens, out)

    def _reasoned(self, requests: Sequence[GenerationRequest], judge: Judge) -> list[tuple[Reply, Scores]]:
        """Reasons, and the digits' scores behind them."""
        replies = judge.ask(requests, self._sampling(True))
        # A judge that says nothing at all still has an opinion: the grade is asked for without reasons.
        readable = [i for i, r in enumerate(replies) if r.status in ("ok", "empty")]
        second = [
            dataclasses.replace(
                requests[i],
                prefill=f"{requests[i].prefill}{replies[i].text.rstrip()}{_BEFORE_GRADE}",
                stop=(),
            )
            for i in readable
        ]
        scores = dict(zip(readable, judge.choose(second, ("0", "1", "2", "3")), strict=True))
        return [
            (reply, scores.get(i, Scores(reply.status, error=reply.error))) for i, reply in enumerate(replies)
        ]

    def _sampling(self, inside: bool) -> Sampling:
        # JSON takes some tokens of its own.
        return Sampling((0.0,), 1, 1.0, 0, 1.0, self.reason_tokens + (0 if inside else 64))

    def _questions(self, query: PooledQuery, judge: Judge, inside: bool) -> list[Question]:
        room = self._sampling(inside).max_new_tokens + (16 if inside else 0)
        schema = "" if inside else VERBAL_SCHEMA
        asker = Asker(
            judge,
            judge.prompt("judge"),
            room=room,
            schema=schema,
            query=query.text,
            answer="",
            json=not inside,
        )
        return [asker.ask(d) for d in query.documents]


def _in_process(judge: Judge) -> bool:
    return hasattr(judge.model, "chat_logprobs")
