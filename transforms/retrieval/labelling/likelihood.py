"""Judging by likelihood: what a passage does to the probability of the query, or of an answer.

Of the query: the query-likelihood model with a language model for the passage (Ponte and Croft 1998; Sachan et al. 2022,
*Improving Passage Retrieval with Zero-Shot Question Generation*). Of a pseudo-answer, which the judge wrote from the top
of the pool: which passage makes it likely. Both give an order, not a threshold: some queries are likelier than others
whatever the passage. Measured against a passage that says nothing, the values of different queries can be compared, and
labels of people make a yes or no of them (`--calibrate-on`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from models.protocols import GenerationRequest, Sampling
from schemas.errors import TamisError
from schemas.fingerprint import fingerprint
from transforms.retrieval.labelling.judge import UNASKED, Reply, Scores
from transforms.retrieval.labelling.method import Estimate, QueryLabels
from transforms.retrieval.labelling.pointwise import CALIBRATIONS, among, collect
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.question import Asker, Question, asked

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

OF = ("query", "answer")


@dataclass(frozen=True)
class Likelihood:
    """Mean log-probability (nats a token) of the query given the passage, or of a pseudo-answer given query and passage.

    Attributes:
        calibrate: `null` subtracts what the same text gets after a passage that says nothing ("N/A"): what the passage
            adds, in nats a token; `none`.
        threshold: Probability above which a passage is positive, where labels of people say what is probable.
        of: `query`, or `answer`: of a pseudo-answer that the judge writes from the first `passages` of the pool.
        passages: How many passages the pseudo-answer is written from.
        answer_tokens: Longest pseudo-answer.
    """

    of: str = "query"
    calibrate: str = "none"
    threshold: float = 0.5
    passages: int = 5
    answer_tokens: int = 64

    name: ClassVar[str] = "likelihood"
    signal_class: ClassVar[str] = "C"
    version: ClassVar[int] = 1
    prompts: ClassVar[Mapping[str, str]] = {
        "judge": "likelihood-query-v1",
        "answer": "likelihood-answer-v1",
        "pseudo": "pseudo-answer-v1",
    }
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "judge": ("passage",),
        "answer": ("query", "passage"),
        "pseudo": ("query", "passages"),
    }
    in_process: ClassVar[bool] = True
    needs_answers: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        among("of", self.of, OF)
        among("calibrate", self.calibrate, CALIBRATIONS)
        if not 0 < self.threshold < 1:
            raise TamisError(f"threshold must lie between 0 and 1, not {self.threshold}")
        if self.passages < 1 or self.answer_tokens < 1:
            raise TamisError("passages and answer_tokens must be 1 or more")

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `Method.label`."""
        if self.of == "answer":
            pseudo = self._pseudo_answers(queries, judge)
            texts = [r.text.strip() if r.ok else "" for r in pseudo]
        else:
            pseudo = [Reply("ok", q.text) for q in queries]
            texts = [q.text.strip() for q in queries]
        askers = [self._asker(q, t, judge) for q, t in zip(queries, texts, strict=True)]
        questions = [[asker.ask(d) for d in q.documents] for asker, q in zip(askers, queries, strict=True)]
        pairs = [(r, t) for own, t in zip(questions, texts, strict=True) if t for r in asked(own)]
        nulls = {
            i: (asker.null(), text)
            for i, (asker, own, text) in enumerate(zip(askers, questions, texts, strict=True))
            if self.calibrate == "null" and text and asked(own)
        }
        # Null passages first: where the budget ends, what was asked can be calibrated.
        pairs = [*nulls.values(), *pairs]
        scores = judge.score([r for r, _ in pairs], [t for _, t in pairs])
        null = dict(zip(nulls, scores, strict=False))
        found = iter(scores[len(nulls) :])
        return [
            self._of_query(own, text, reply, found, null.get(i), judge)
            for i, (own, text, reply) in enumerate(zip(questions, texts, pseudo, strict=True))
        ]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `Method.estimate`."""
        text = query.text if self.of == "query" else "a" + " a" * (self.answer_tokens - 1)
        asker = self._asker(query, text, judge)
        requests = asked([asker.ask(d) for d in query.documents])
        requests += [asker.null()] if self.calibrate == "null" and requests else []
        own = self.answer_tokens if self.of == "answer" else judge.count_tokens(query.text)
        total = Estimate(len(requests), sum(map(judge.prompt_tokens, requests)), own * len(requests))
        if self.of == "answer" and requests:
            total += Estimate(1, judge.prompt_tokens(self._pseudo(query, judge)), self.answer_tokens)
        return total

    def _of_query(
        self,
        questions: Sequence[Question],
        text: str,
        reply: Reply,
        scores: Iterator[Scores],
        null: Scores | None,
        judge: Judge,
    ) -> QueryLabels:
        if not text:  # no pseudo-answer: nothing could be scored
            if reply.status == UNASKED:
                return QueryLabels((), unasked=tuple(q.document.doc_id for q in questions))
            why = {
                "parse_status": reply.status if not reply.ok else "empty",
                "error": f"no pseudo-answer: {reply.error}",
            }
            return QueryLabels(tuple(q.row(**why) for q in questions))
        tag = judge.prompt("judge" if self.of == "query" else "answer").tag
        answer_id = fingerprint("pseudo-answer", text)[:16] if self.of == "answer" else None

        def row(question: Question, scored: Scores) -> dict[str, Any]:
            columns: dict[str, Any] = {
                "parse_status": scored.status,
                "error": scored.error or None,
                "prompt_tokens": scored.prompt_tokens,
                "completion_tokens": scored.completion_tokens,
                "prompt_hash": tag,
                "pseudo_answer_id": answer_id,
                "signal": f"{self.of}_likelihood",
            }
            if null is not None and not null.ok:  # without it the value would mean something else
                columns |= {"parse_status": "error", "error": f"null passage: {null.error or null.status}"}
            elif scored.ok and scored.values:
                columns["value"] = _mean(scored) - (_mean(null) if null is not None else 0.0)
            elif scored.ok:
                columns |= {"parse_status": "empty", "error": "the text to be scored has no token"}
            return question.row(**columns)

        found = collect(questions, scores, row)
        facts = {"pseudo_answer": text, "pseudo_answer_id": answer_id} if answer_id else {}
        return QueryLabels(found.rows, facts=facts, unasked=found.unasked)

    def _asker(self, query: PooledQuery, text: str, judge: Judge) -> Asker:
        room = judge.count_tokens(text) + 1
        if self.of == "query":
            return Asker(judge, judge.prompt("judge"), room=room)
        return Asker(judge, judge.prompt("answer"), room=room, query=query.text)

    def _pseudo_answers(self, queries: Sequence[PooledQuery], judge: Judge) -> list[Reply]:
        sampling = Sampling((0.0,), 1, 1.0, 0, 1.0, self.answer_tokens)
        return judge.ask([self._pseudo(q, judge) for q in queries], sampling)

    def _pseudo(self, query: PooledQuery, judge: Judge) -> GenerationRequest:
        prompt = judge.prompt("pseudo")
        frame, _, _ = prompt.render_list([], query=query.text)
        left = (
            judge.context_limit - judge.prompt_tokens(GenerationRequest(frame, 0)) - self.answer_tokens - 64
        )
        shown = [d.passage for d in query.documents if not d.missing and d.passage.strip()][: self.passages]
        each = max(0, left // max(1, len(shown)) - 8)
        if judge.passage_tokens is not None:
            each = min(each, judge.passage_tokens)
        messages, prefill, stop = prompt.render_list([judge.fit(p, each)[0] for p in shown], query=query.text)
        return GenerationRequest(messages, 0, prefill, stop)


def _mean(scores: Scores) -> float:
    return sum(scores.values) / len(scores.values)
