"""Judging each passage by itself, off the next token: yes or no, and grades 0 to 3.

In this process nothing is generated: the log-probabilities of the possible answers as the next token are the judge's
opinion, exactly and with its doubts. A chat server that gives log-probabilities is asked the same; one that does not says
its answer in words (a yes or no) or in JSON (a grade), which is read, and asked for once more where nobody can read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from models.protocols import Sampling
from schemas.errors import TamisError
from transforms.retrieval.labelling.grades import (
    GRADE_SCHEMA,
    ask_grades,
    parse_grade,
    parse_yes_no,
    reply_row,
)
from transforms.retrieval.labelling.judge import UNASKED, Scores
from transforms.retrieval.labelling.method import Estimate, QueryLabels
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.question import Asker, Question, asked

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

READS = ("auto", "logits", "text")
CALIBRATIONS = ("none", "null")
_WORD = Sampling((0.0,), 1, 1.0, 0, 1.0, 8)
_JSON = Sampling((0.0,), 1, 1.0, 0, 1.0, 48)


@dataclass(frozen=True)
class YesNo:
    """Is the passage relevant: the log-odds of Yes against No as the next token.

    `value` is the log-odds (natural logarithm; 0 = undecided) after calibration, `probability` its logistic, `binary`
    whether that lies above the threshold.

    Attributes:
        threshold: Probability from which on (not included) a passage is positive.
        calibrate: `null` subtracts the log-odds of the same question about a passage that says nothing ("N/A"), which
            takes the judge's leaning to one word out (T. Zhao et al., *Calibrate Before Use*, ICML 2021); `none`.
        read: `logits` reads log-probabilities, `text` what the judge says; `auto`: logits where the model gives them.
    """

    threshold: float = 0.5
    calibrate: str = "none"
    read: str = "auto"

    name: ClassVar[str] = "yes_no"
    signal_class: ClassVar[str] = "A"
    version: ClassVar[int] = 1
    prompts: ClassVar[Mapping[str, str]] = {"judge": "relevance-yes-no-v1"}
    variables: ClassVar[Mapping[str, Sequence[str]]] = {"judge": ("query", "passage")}
    in_process: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        among("read", self.read, READS)
        among("calibrate", self.calibrate, CALIBRATIONS)
        if not 0 < self.threshold < 1:
            raise TamisError(f"threshold must lie between 0 and 1, not {self.threshold}")
        if self.calibrate == "null" and self.read == "text":
            raise TamisError("calibrate=null needs log-probabilities; leave read=text out")

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `Method.label`."""
        askers = [
            Asker(judge, judge.prompt("judge"), query=q.text, room=_WORD.max_new_tokens) for q in queries
        ]
        questions = [[asker.ask(d) for d in q.documents] for asker, q in zip(askers, queries, strict=True)]
        if not _reads_logits(self.read, judge):
            return self._in_words(queries, questions, judge)
        nulls = {
            i: asker.null()
            for i, (asker, own) in enumerate(zip(askers, questions, strict=True))
            if self.calibrate == "null" and asked(own)
        }
        flat = asked([q for own in questions for q in own])
        # Null passages first: where the budget ends, what was asked can be calibrated.
        scores = judge.choose([*nulls.values(), *flat], ("Yes", "No"))
        null = dict(zip(nulls, scores, strict=False))
        found = iter(scores[len(nulls) :])

        def rows(number: int) -> Callable[[Question, Scores], dict[str, Any]]:
            return lambda question, scored: self._row(question, scored, null.get(number), judge)

        return [collect(own, found, rows(i)) for i, own in enumerate(questions)]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `Method.estimate`."""
        asker = Asker(judge, judge.prompt("judge"), query=query.text, room=_WORD.max_new_tokens)
        requests = asked([asker.ask(d) for d in query.documents])
        requests += [asker.null()] if self.calibrate == "null" and requests else []
        out = 1 if _reads_logits(self.read, judge) else _WORD.max_new_tokens
        return Estimate(len(requests), sum(map(judge.prompt_tokens, requests)), out * len(requests))

    def _row(self, question: Question, scores: Scores, null: Scores | None, judge: Judge) -> dict[str, Any]:
        tag = judge.prompt("judge").tag
        scored = _score_columns(scores, tag)
        if not scores.ok:
            return question.row(**scored)
        odds = scores.values[0] - scores.values[1]
        if null is not None:
            if not null.ok:  # without it the value would mean something else than in the other rows
                return question.row(
                    **{
                        **scored,
                        "parse_status": "error",
                        "error": f"null passage: {null.error or null.status}",
                    }
                )
            odds -= null.values[0] - null.values[1]
        probability = logistic(odds)
        return question.row(
            **scored, value=odds, probability=probability, binary=probability > self.threshold
        )

    def _in_words(
        self, queries: Sequence[PooledQuery], questions: list[list[Question]], judge: Judge
    ) -> list[QueryLabels]:
        requests = asked([q for own in questions for q in own])
        replies = iter(
            ask_grades(
                judge, requests, _WORD, parse_yes_no, "Answer with one word, Yes or No, and nothing else."
            )
        )
        tag = judge.prompt("judge").tag

        def row(question: Question, answer: Any) -> dict[str, Any]:
            grade, reply = answer
            binary = None if grade.value is None else bool(grade.value)
            return question.row(**reply_row(grade, reply), binary=binary, prompt_hash=tag)

        return [collect(own, replies, row, lambda answer: answer[0].status) for own in questions]


@dataclass(frozen=True)
class Graded:
    """How relevant is the passage, 0 to 3: the likeliest digit, and the expected grade as `value`.

    Attributes:
        read: `logits` reads the log-probabilities of the four digits, `text` the grade a server says in JSON; `auto`:
            logits in this process, text on a server.
    """

    read: str = "auto"

    name: ClassVar[str] = "graded"
    signal_class: ClassVar[str] = "A"
    version: ClassVar[int] = 1
    prompts: ClassVar[Mapping[str, str]] = {"judge": "graded-relevance-v1", "repair": "graded-repair-v1"}
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "judge": ("query", "passage", "answer", "json"),
        "repair": ("json",),
    }
    in_process: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        among("read", self.read, READS)

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `Method.label`."""
        logits = self._reads_logits(judge)
        questions = [self._questions(q, judge, logits) for q in queries]
        requests = asked([q for own in questions for q in own])
        tag = judge.prompt("judge").tag
        if logits:
            scores = iter(judge.choose(requests, ("0", "1", "2", "3")))
            return [collect(own, scores, lambda q, s: q.row(**digit_columns(s, tag))) for own in questions]
        repair = judge.prompt("repair").render(json=True)[0][-1].content
        replies = iter(ask_grades(judge, requests, _JSON, lambda text: parse_grade(text, json=True), repair))

        def row(question: Question, answer: Any) -> dict[str, Any]:
            grade, reply = answer
            return question.row(**reply_row(grade, reply), grade=grade.value, prompt_hash=tag)

        return [collect(own, replies, row, lambda answer: answer[0].status) for own in questions]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `Method.estimate`."""
        logits = self._reads_logits(judge)
        requests = asked(self._questions(query, judge, logits))
        out = 1 if logits else 8  # {"grade": 2} and what ends it
        return Estimate(len(requests), sum(map(judge.prompt_tokens, requests)), out * len(requests))

    def _questions(self, query: PooledQuery, judge: Judge, logits: bool) -> list[Question]:
        asker = Asker(
            judge,
            judge.prompt("judge"),
            room=1 if logits else _JSON.max_new_tokens,
            schema="" if logits else GRADE_SCHEMA,
            query=query.text,
            answer="",
            json=not logits,
        )
        return [asker.ask(d) for d in query.documents]

    def _reads_logits(self, judge: Judge) -> bool:
        in_process = hasattr(judge.model, "chat_logprobs")
        return self.read == "logits" or (self.read == "auto" and in_process)


def digit_columns(scores: Scores, tag: str) -> dict[str, Any]:
    """Columns of a grade read off the scores of the four digits: the likeliest, and the expected grade."""
    columns = _score_columns(scores, tag)
    if not scores.ok:
        return columns
    top = max(scores.values)
    weights = [math.exp(v - top) for v in scores.values]
    total = sum(weights)
    grade = max(range(4), key=lambda g: scores.values[g])
    expected = sum(g * w for g, w in enumerate(weights)) / total
    return {**columns, "grade": grade, "value": expected, "probability": weights[grade] / total}


def collect(
    questions: Sequence[Question], answers: Any, row: Any, status: Any = lambda answer: answer.status
) -> QueryLabels:
    """Rows of one query from the answers to those of its questions that were asked, taken in turn."""
    rows, unasked = [], []
    for question in questions:
        if question.request is None:
            rows.append(question.row())
            continue
        answer = next(answers)
        if status(answer) == UNASKED:
            unasked.append(question.document.doc_id)
        else:
            rows.append(row(question, answer))
    return QueryLabels(tuple(rows), unasked=tuple(unasked))


def _score_columns(scores: Scores, tag: str) -> dict[str, Any]:
    return {
        "parse_status": scores.status,
        "error": scores.error or None,
        "prompt_tokens": scores.prompt_tokens,
        "completion_tokens": scores.completion_tokens,
        "prompt_hash": tag,
    }


def _reads_logits(read: str, judge: Judge) -> bool:
    if read != "auto":
        return read == "logits"
    return judge.gives_logprobs


def among(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a setting that is none of those allowed."""
    if value not in allowed:
        raise TamisError(f"{name} '{value}' is not one of {', '.join(allowed)}")


def logistic(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
