"""Likelihood gain: how much likelier a document makes the gold answer to one reader.

log P(a* | q, d) - log P(a* | q), of the likeliest gold answer on either side. No answer is sampled, so the signal is
smooth where the answer's quality is 0 or 1, and it says something of documents that help without deciding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from models.lm.dialects import share_out
from models.protocols import GenerationRequest
from schemas.errors import TamisError
from transforms.retrieval.labelling.gains import (
    CLOSED,
    EMPTY,
    READER_PROMPTS,
    READER_VARIABLES,
    about,
    without_answers,
)
from transforms.retrieval.labelling.judge import UNASKED
from transforms.retrieval.labelling.lists import Passages, passages_of
from transforms.retrieval.labelling.method import Estimate, QueryLabels
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.reading import Context, Read, Reader

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge, Scores


@dataclass(frozen=True)
class LikelihoodGain:
    """Log-likelihood gain of the gold answer.

    Attributes:
        normalise: `sum` (nats of the whole answer) or `mean` (nats a token: long answers weigh no more than short ones).
        positive_above: Gain above which a document is useful; of known queries none is.
        answers_used: Most gold answers tried, the first ones.
        answer_tokens: Longest answer when the reader is asked whether it knows the query.
    """

    normalise: str = "sum"
    positive_above: float = 0.0
    answers_used: int = 5
    answer_tokens: int = 32

    name: ClassVar[str] = "likelihood_gain"
    signal_class: ClassVar[str] = "C"
    version: ClassVar[int] = 1
    prompts: ClassVar[Mapping[str, str]] = READER_PROMPTS
    variables: ClassVar[Mapping[str, Sequence[str]]] = READER_VARIABLES
    in_process: ClassVar[bool] = True
    needs_answers: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.normalise not in ("sum", "mean"):
            raise TamisError(f"normalise '{self.normalise}' is neither sum nor mean")
        if self.answers_used < 1 or self.answer_tokens < 1:
            raise TamisError("answers_used and answer_tokens must be 1 or more")

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `transforms.retrieval.labelling.method.Method`."""
        reader = self._reader(judge)
        shown = [passages_of(q.documents, reader.judge) if q.answers else EMPTY for q in queries]
        closed = reader.read(
            [(q, p, (CLOSED,) if q.answers else ()) for q, p in zip(queries, shown, strict=True)]
        )
        plan: list[tuple[int, Context, str]] = []
        for number, (query, passages) in enumerate(zip(queries, shown, strict=True)):
            contexts: list[Context] = (
                [CLOSED, *((i,) for i in range(len(passages.texts)))] if query.answers else []
            )
            plan += [(number, c, a) for c in contexts for a in self._answers(query)]
        requests = [self._request(reader, queries[n], shown[n], c) for n, c, _ in plan]
        # After `Answer:`, and a space as any word has before it.
        scores = reader.judge.score(requests, [f" {a}" for _, _, a in plan]) if plan else []
        found: list[dict[Context, list[Scores]]] = [{} for _ in queries]
        for (number, context, _), one in zip(plan, scores, strict=True):
            found[number].setdefault(context, []).append(one)
        return [
            self._labels(q, p, c.get(CLOSED), f, reader)
            for q, p, c, f in zip(queries, shown, closed, found, strict=True)
        ]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `transforms.retrieval.labelling.method.Method`."""
        if not query.answers:
            return Estimate()
        reader = self._reader(judge)
        passages = passages_of(query.documents, reader.judge)
        around = reader.judge.prompt_tokens(reader.request(query, passages, CLOSED))
        answers = self._answers(query)
        each = around * (len(passages.texts) + 1) + sum(passages.lengths)
        tokens = sum(reader.judge.count_tokens(a) for a in answers)
        return Estimate(
            1 + len(answers) * (len(passages.texts) + 1),
            around + len(answers) * each,
            self.answer_tokens + tokens * (len(passages.texts) + 1),
        )

    def _reader(self, judge: Judge) -> Reader:
        return Reader(judge.reader, judge.prompt("context"), judge.prompt("closed"), self.answer_tokens)

    def _request(
        self, reader: Reader, query: PooledQuery, passages: Passages, context: Context
    ) -> GenerationRequest:
        """The question; where several answers follow it, it is read once for all of them."""
        request = reader.request(query, passages, context)
        if len(self._answers(query)) == 1:
            return request
        return dataclasses.replace(request, shared=len(request.messages[-1].content))

    def _answers(self, query: PooledQuery) -> list[str]:
        return [" ".join(a.split()) for a in query.answers if a.strip()][: self.answers_used]

    def _labels(
        self,
        query: PooledQuery,
        passages: Passages,
        closed: Read | None,
        scores: Mapping[Context, list[Scores]],
        reader: Reader,
    ) -> QueryLabels:
        tag = reader.judge.info.tag
        if closed is None or not scores:
            return without_answers(query, tag)
        known = closed.right(query.answers) if closed.status == "ok" else None
        index = {d.doc_id: i for i, d in enumerate(passages.documents)}
        n = len(index)
        base = scores[CLOSED]
        shared_in = share_out(closed.prompt_tokens + sum(s.prompt_tokens for s in base), [1] * n) if n else []
        shared_out = (
            share_out(closed.completion_tokens + sum(s.completion_tokens for s in base), [1] * n) if n else []
        )
        rows, unasked = [], []
        for document in query.documents:
            row = about(document, tag, reader.context.tag, known)
            i = index.get(document.doc_id)
            if i is None:
                rows.append(row)
                continue
            own = scores[(i,)]
            row |= {
                "truncated": passages.truncated[i],
                "prompt_tokens": shared_in[i] + sum(s.prompt_tokens for s in own),
                "completion_tokens": shared_out[i] + sum(s.completion_tokens for s in own),
            }
            outcomes = [(closed.status, closed.error), *((s.status, s.error) for s in (*base, *own))]
            problems = [(status, error) for status, error in outcomes if status != "ok"]
            if any(status == UNASKED for status, _ in problems):
                unasked.append(document.doc_id)
                continue
            if problems:
                rows.append(row | {"parse_status": problems[0][0], "error": problems[0][1]})
                continue
            gain = self._likelihood(own) - self._likelihood(base)
            useful = gain > self.positive_above and not known
            rows.append(row | {"parse_status": "ok", "error": None, "value": gain, "binary": useful})
        facts = {"closed_answer": closed.answer} if closed.status == "ok" else {}
        return QueryLabels(tuple(rows), (tag,) if known else (), facts, tuple(unasked))

    def _likelihood(self, scores: Sequence[Scores]) -> float:
        """Log-likelihood of the likeliest answer."""
        return max(sum(s.values) / (len(s.values) if self.normalise == "mean" else 1) for s in scores)
