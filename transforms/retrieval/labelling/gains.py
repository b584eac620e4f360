"""Utility as gain: what a document does to one reader's answer.

These labels hold for the reader that was asked (`target_model`) and no other. A query the reader answers from memory is
*known*: no document can be useful for it, its gold set is empty, and both are recorded, because whether a retriever or a
judge knows when nothing is needed is measured on just these queries. A document may also do harm: a negative gain is
a finding, and stored as it is. As in Zhang et al., "LLM-Specific Utility" (arXiv 2510.11358); `erag` is the label of
Salemi and Zamani's eRAG (SIGIR 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from models.lm.dialects import share_out
from models.metrics.answers import PERFORMANCE
from schemas.errors import TamisError
from transforms.retrieval.labelling.judge import UNASKED
from transforms.retrieval.labelling.lists import NO_ANSWERS, NO_TEXT, Passages, passages_of
from transforms.retrieval.labelling.method import Estimate, QueryLabels
from transforms.retrieval.labelling.permutations import orders
from transforms.retrieval.labelling.queries import PoolDocument, PooledQuery
from transforms.retrieval.labelling.reading import Context, Read, Reader, failed

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

READER_PROMPTS = {"context": "answer-with-context-v1", "closed": "answer-closed-v1"}
READER_VARIABLES = {"context": ("query", "count", "passages"), "closed": ("query",)}
CLOSED: Context = ()


@dataclass(frozen=True)
class Label:
    """A label of one document.

    Attributes:
        value: The gain, as it is.
        useful: Whether the document makes the difference between a wrong and a right answer.
        beside: Documents the gain is relative to, in order.
        used: Contexts whose answers it comes from; the first is the one shown in the row.
        votes: Orders it is the mean of.
    """

    value: float
    useful: bool
    beside: tuple[int, ...] = ()
    used: tuple[Context, ...] = ()
    votes: int | None = None


@dataclass(frozen=True)
class _Gain(ABC):
    """What the labels by an answer's quality share.

    Attributes:
        perf: How an answer is measured: has_answer, em or f1. `binary` is always about has_answer.
        answer_tokens: Longest answer.
    """

    perf: str = "has_answer"
    answer_tokens: int = 32

    name: ClassVar[str] = ""
    signal_class: ClassVar[str] = "D"
    version: ClassVar[int] = 1
    prompts: ClassVar[Mapping[str, str]] = READER_PROMPTS
    variables: ClassVar[Mapping[str, Sequence[str]]] = READER_VARIABLES
    in_process: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.perf not in PERFORMANCE:
            raise TamisError(f"perf '{self.perf}' is not one of {', '.join(PERFORMANCE)}")
        if self.answer_tokens < 1:
            raise TamisError("answer_tokens must be 1 or more")

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `transforms.retrieval.labelling.method.Method`."""
        reader = self._reader(judge)
        shown = [passages_of(q.documents, reader.judge) if q.answers else EMPTY for q in queries]
        plans = [self._plan(q, p, judge.seed, reader) for q, p in zip(queries, shown, strict=True)]
        asked = [
            (q, p, self._contexts(plan) if q.answers else ())
            for q, p, plan in zip(queries, shown, plans, strict=True)
        ]
        read = reader.read(asked)
        return [
            self._labels(q, p, plan, r, reader)
            for q, p, plan, r in zip(queries, shown, plans, read, strict=True)
        ]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `transforms.retrieval.labelling.method.Method`."""
        if not query.answers:
            return Estimate()
        reader = self._reader(judge)
        passages = passages_of(query.documents, reader.judge)
        contexts = dict.fromkeys(self._contexts(self._plan(query, passages, judge.seed, reader)))
        around = reader.judge.prompt_tokens(reader.request(query, passages, CLOSED))
        tokens = sum(around + sum(passages.lengths[i] + 2 for i in context) for context in contexts)
        return Estimate(len(contexts), tokens, len(contexts) * self.answer_tokens)

    def _reader(self, judge: Judge) -> Reader:
        return Reader(judge.reader, judge.prompt("context"), judge.prompt("closed"), self.answer_tokens)

    def _plan(self, query: PooledQuery, passages: Passages, seed: int, reader: Reader) -> list[Context]:
        """Orders the documents are added in (or, of methods that look at each by itself, one)."""
        return [tuple(range(len(passages.texts)))]

    @abstractmethod
    def _contexts(self, plan: list[Context]) -> list[Context]:
        """Contexts to be answered in; the closed one first."""

    @abstractmethod
    def _label(
        self, i: int, plan: list[Context], read: Mapping[Context, Read], answers: Sequence[str]
    ) -> Label:
        """The label of passage i; asked only where all answers are there."""

    @abstractmethod
    def _needs(self, i: int, plan: list[Context]) -> tuple[Context, ...]:
        """Contexts whose answers the label of passage i needs; the first is the one its row shows."""

    def _labels(
        self,
        query: PooledQuery,
        passages: Passages,
        plan: list[Context],
        read: Mapping[Context, Read],
        reader: Reader,
    ) -> QueryLabels:
        tag = reader.judge.info.tag
        if not query.answers:
            return without_answers(query, tag)
        closed = read[CLOSED]
        known = closed.right(query.answers) if closed.status == "ok" else None
        index = {d.doc_id: i for i, d in enumerate(passages.documents)}
        planned = set(plan[0]) if plan else set()
        costs = _costs(read, [self._needs(i, plan) for i in sorted(planned)])
        rows, unasked = [], []
        for document in query.documents:
            i = index.get(document.doc_id)
            row = about(document, tag, reader.context.tag, known)
            if i is None:
                rows.append(row)
                continue
            row["truncated"] = passages.truncated[i]
            if i not in planned:
                rows.append(
                    row
                    | {"parse_status": "too_long", "error": f"only {len(planned)} documents fit the context"}
                )
                continue
            prompt_tokens, completion_tokens = costs[i]
            row |= {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
            needs = self._needs(i, plan)
            problem = failed(closed, *(read[context] for context in needs))
            if problem is not None and problem.status == UNASKED:
                unasked.append(document.doc_id)
                continue
            if problem is not None:
                rows.append(row | {"parse_status": problem.status, "error": problem.error})
                continue
            label = self._label(i, plan, read, query.answers)
            rows.append(
                row
                | {
                    "parse_status": "ok",
                    "error": None,
                    "value": label.value,
                    "binary": label.useful,
                    "context_ids": [passages.documents[j].doc_id for j in label.beside],
                    "votes": label.votes,
                    "reply": read[needs[0]].answer,
                }
            )
        facts = {"closed_answer": closed.answer} if closed.status == "ok" else {}
        return QueryLabels(tuple(rows), (tag,) if known else (), facts, tuple(unasked))


EMPTY = Passages((), (), (), ())


@dataclass(frozen=True)
class AnswerGain(_Gain):
    """What a document by itself adds: perf(M(q, {d})) - perf(M(q, {})); useful where the answer turns from wrong to right."""

    name: ClassVar[str] = "answer_gain"

    def _contexts(self, plan: list[Context]) -> list[Context]:
        return [CLOSED, *((i,) for i in plan[0])]

    def _needs(self, i: int, plan: list[Context]) -> tuple[Context, ...]:
        return ((i,), CLOSED)

    def _label(
        self, i: int, plan: list[Context], read: Mapping[Context, Read], answers: Sequence[str]
    ) -> Label:
        alone, closed = read[(i,)], read[CLOSED]
        gain = alone.perf(answers, self.perf) - closed.perf(answers, self.perf)
        return Label(gain, alone.right(answers) and not closed.right(answers))


@dataclass(frozen=True)
class Erag(_Gain):
    """How well the reader answers with a document by itself, whatever it knows without: perf(M(q, {d}))."""

    name: ClassVar[str] = "erag"

    def _contexts(self, plan: list[Context]) -> list[Context]:
        return [CLOSED, *((i,) for i in plan[0])]

    def _needs(self, i: int, plan: list[Context]) -> tuple[Context, ...]:
        return ((i,),)

    def _label(
        self, i: int, plan: list[Context], read: Mapping[Context, Read], answers: Sequence[str]
    ) -> Label:
        alone = read[(i,)]
        return Label(alone.perf(answers, self.perf), alone.right(answers))


@dataclass(frozen=True)
class LeaveOneOut(_Gain):
    """What is lost without a document: perf(M(q, S)) - perf(M(q, S - d)), S the first documents of the pool.

    Attributes:
        context_size: Documents in S; 0 = as many as fit the reader's context.
    """

    context_size: int = 0

    name: ClassVar[str] = "leave_one_out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_size < 0:
            raise TamisError("context_size must be 0 (all that fit) or more")

    def _plan(self, query: PooledQuery, passages: Passages, seed: int, reader: Reader) -> list[Context]:
        return [tuple(range(reader.fitting(query, passages, self.context_size)))]

    def _contexts(self, plan: list[Context]) -> list[Context]:
        return [CLOSED, plan[0], *(_without(plan[0], i) for i in plan[0])]

    def _needs(self, i: int, plan: list[Context]) -> tuple[Context, ...]:
        return (_without(plan[0], i), plan[0])

    def _label(
        self, i: int, plan: list[Context], read: Mapping[Context, Read], answers: Sequence[str]
    ) -> Label:
        rest = _without(plan[0], i)
        whole, less = read[plan[0]], read[rest]
        loss = whole.perf(answers, self.perf) - less.perf(answers, self.perf)
        return Label(loss, whole.right(answers) and not less.right(answers), rest)


@dataclass(frozen=True)
class Marginal(_Gain):
    """What a document adds to those before it: perf(M(q, S + d)) - perf(M(q, S)), S growing along an order.

    What comes out depends on the order. One order is the pool's, and `context_ids` holds what stood before. The mean over
    several (`permutations`) estimates the Shapley value; `context_ids` then holds all other documents.

    Attributes:
        permutations: Orders.
        context_size: Documents in the order; 0 = as many as fit the reader's context.
    """

    permutations: int = 1
    context_size: int = 0

    name: ClassVar[str] = "marginal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.permutations < 1 or self.context_size < 0:
            raise TamisError("permutations must be 1 or more, context_size 0 (all that fit) or more")

    def _plan(self, query: PooledQuery, passages: Passages, seed: int, reader: Reader) -> list[Context]:
        n = reader.fitting(query, passages, self.context_size)
        return orders(n, self.permutations, seed, "marginal", query.query_id)

    def _contexts(self, plan: list[Context]) -> list[Context]:
        return [CLOSED, *(order[:end] for order in plan for end in range(1, len(order) + 1))]

    def _needs(self, i: int, plan: list[Context]) -> tuple[Context, ...]:
        ends = [(order, order.index(i)) for order in plan]
        return tuple(c for order, at in ends for c in (order[: at + 1], order[:at]))

    def _label(
        self, i: int, plan: list[Context], read: Mapping[Context, Read], answers: Sequence[str]
    ) -> Label:
        gains, useful = [], 0
        for order in plan:
            at = order.index(i)
            with_it, before = read[order[: at + 1]], read[order[:at]]
            gains.append(with_it.perf(answers, self.perf) - before.perf(answers, self.perf))
            useful += with_it.right(answers) and not before.right(answers)
        one = len(plan) == 1
        beside = plan[0][: plan[0].index(i)] if one else _without(tuple(sorted(plan[0])), i)
        mean = sum(gains) / len(gains)
        return Label(mean, useful * 2 >= len(plan) and useful > 0, beside, votes=None if one else len(plan))


def about(document: PoolDocument, reader: str, prompt: str, known: bool | None) -> dict[str, Any]:
    """What a row says of a document before it has a label: that it has no text to read."""
    return {
        "doc_id": document.doc_id,
        "annotator": reader,
        "target_model": reader,
        "prompt_hash": prompt,
        "known_query": known,
        "parse_status": "error" if document.missing else "empty",
        "error": NO_TEXT,
    }


def without_answers(query: PooledQuery, reader: str) -> QueryLabels:
    """A status and no label for all documents of a query without gold answers."""
    row = {"annotator": reader, "target_model": reader, "parse_status": "error", "error": NO_ANSWERS}
    return QueryLabels(tuple({"doc_id": d.doc_id, **row} for d in query.documents))


def _without(context: Context, i: int) -> Context:
    return tuple(j for j in context if j != i)


def _costs(read: Mapping[Context, Read], needs: Sequence[Sequence[Context]]) -> list[tuple[int, int]]:
    """Tokens of each document: those of its own context, and its part of what all share."""
    own = [read[n[0]] if n and n[0] in read else None for n in needs]
    firsts = {n[0] for n in needs if n}
    rest = [r for context, r in read.items() if context not in firsts]
    weights = [1] * len(needs)
    shared_in = share_out(sum(r.prompt_tokens for r in rest), weights)
    shared_out = share_out(sum(r.completion_tokens for r in rest), weights)
    return [
        ((r.prompt_tokens if r else 0) + i, (r.completion_tokens if r else 0) + o)
        for r, i, o in zip(own, shared_in, shared_out, strict=True)
    ]
