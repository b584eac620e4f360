"""One query's labels as they come together: stage by stage, with the draft answer, and what all of it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.lm.dialects import share_out
from models.protocols import GenerationRequest, Sampling
from schemas.fingerprint import derive_seed, fingerprint
from transforms.retrieval.labelling.judge import UNASKED
from transforms.retrieval.labelling.lists import NO_TEXT, ListSettings, Outcome, Passages
from transforms.retrieval.labelling.method import QueryLabels
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.talk import Questions, Talk

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge


@dataclass(frozen=True)
class Draft:
    """An answer a judge wrote, or why there is none (`status`)."""

    text: str
    status: str
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def answer_id(self) -> str:
        """Names the text."""
        return fingerprint(self.text)[:16]


def write_answer(
    query: PooledQuery, judge: Judge, passages: Passages, tokens: int, settings: ListSettings
) -> Talk[Draft]:
    """Have a short answer written from passages (as many of the first as fit the context)."""
    prompt = judge.prompt("answer")
    texts = list(passages.texts)
    while True:
        messages, prefill, stop = prompt.render_list(texts, query=query.text)
        seed = derive_seed(judge.seed, "pseudo-answer", query.query_id) if settings.temperature else 0
        request = GenerationRequest(messages, seed, prefill, stop)
        if not texts or judge.prompt_tokens(request) + tokens <= judge.context_limit:
            break
        texts.pop()
    sampling = Sampling((settings.temperature,), 1, settings.top_p, settings.top_k, 1.0, tokens)
    (reply,) = yield Questions((request,), sampling)
    text = " ".join(reply.text.split())
    status = reply.status if text or not reply.ok else "empty"
    return Draft(text, status, reply.error, reply.prompt_tokens, reply.completion_tokens)


@dataclass
class Sheet:
    """The labels of one query as they come together.

    Attributes:
        query: It.
        prompt_hash: Tag of the prompt the labels come from.
        passages: All that could be shown; documents without a text get their status at once.
    """

    query: PooledQuery
    prompt_hash: str
    passages: Passages
    facts: dict[str, Any] = field(default_factory=dict)
    mended: bool = False

    def __post_init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self._unasked: list[str] = []
        self._tokens = [0, 0]
        self._answer_id: str | None = None
        shown = {d.doc_id for d in self.passages.documents}
        for document in self.query.documents:
            if document.doc_id not in shown:
                status = "error" if document.missing else "empty"
                self._rows[document.doc_id] = {"parse_status": status, "error": NO_TEXT}

    def pay(self, cost: Outcome | Draft) -> None:
        """Count what was spent on the whole query."""
        self._tokens[0] += cost.prompt_tokens
        self._tokens[1] += cost.completion_tokens

    def draft(self, draft: Draft) -> str | None:
        """Note the draft answer; without one the documents not labelled yet have its status."""
        self.pay(draft)
        if draft.status == "ok":
            self.facts |= {"pseudo_answer": draft.text, "pseudo_answer_id": draft.answer_id}
            self._answer_id = draft.answer_id
            return draft.text
        self._rest(draft.status, f"no draft answer: {draft.error or draft.status}")
        return None

    def refuse(self, status: str, error: str) -> None:
        """No label for the documents that have none yet."""
        self._rest(status, error)

    def negative(self, passages: Passages) -> None:
        """Documents an earlier stage found off topic."""
        for document in passages.documents:
            self._rows[document.doc_id] = {"binary": False, "value": 0.0, "parse_status": self._ok("ok")}

    def selection(self, shown: Passages, outcome: Outcome, threshold: float) -> Sheet:
        """Labels of a selection: the share of readings that chose a document, and whether that is enough."""
        self.pay(outcome)
        if not outcome.votes:
            return self.fail(outcome)
        for document, vote in zip(shown.documents, outcome.votes, strict=True):
            label = {"binary": vote.share >= threshold, "value": vote.share}
            self._rows[document.doc_id] = self._judged(label, vote.readings, shown, outcome)
        return self

    def ranking(self, shown: Passages, outcome: Outcome, positives: int) -> Sheet:
        """Labels of an order: ranks, and whether among the first."""
        self.pay(outcome)
        if not outcome.votes:
            return self.fail(outcome)
        by_rank = {v.rank: i for i, v in enumerate(outcome.votes) if v.rank is not None}
        first = {by_rank[rank] for rank in sorted(by_rank)[:positives]}
        for i, (document, vote) in enumerate(zip(shown.documents, outcome.votes, strict=True)):
            label = {"binary": i in first, "value": vote.share, "rank": vote.rank}
            self._rows[document.doc_id] = self._judged(label, vote.readings, shown, outcome)
        return self

    def fail(self, outcome: Outcome) -> Sheet:
        """No label for the documents that have none yet, and why."""
        self._rest(outcome.status, outcome.error, outcome.replies)
        return self

    def close(self) -> QueryLabels:
        """The labels, in the order of the pool, with the cost shared out among them."""
        order = [d.doc_id for d in self.query.documents if d.doc_id in self._rows]
        shown = {
            d.doc_id: cut for d, cut in zip(self.passages.documents, self.passages.truncated, strict=True)
        }
        paid = [d for d in order if d in shown]
        costs = {
            name: dict(zip(paid, share_out(total, [1] * len(paid)), strict=True))
            for name, total in zip(("prompt_tokens", "completion_tokens"), self._tokens, strict=True)
        }
        rows = []
        for doc_id in order:
            row = {"doc_id": doc_id, "prompt_hash": self.prompt_hash, **self._rows[doc_id]}
            if doc_id in shown:
                row |= {"truncated": shown[doc_id], "pseudo_answer_id": self._answer_id}
                row |= {name: cost[doc_id] for name, cost in costs.items()}
            rows.append(row)
        return QueryLabels(tuple(rows), facts=self.facts, unasked=tuple(self._unasked))

    def _judged(
        self, label: dict[str, Any], readings: int, shown: Passages, outcome: Outcome
    ) -> dict[str, Any]:
        beside = [d.doc_id for d in shown.documents]
        if outcome.windows > 1:
            self.facts["windows"] = max(outcome.windows, self.facts.get("windows", 1))
        return {
            **label,
            "votes": readings,
            "parse_status": self._ok(outcome.status),
            # Judged beside these, in the pool's order: the same list, and hash, for all documents of it.
            "context_ids": beside if len(beside) > 1 else [],
            "error": outcome.error or None,
            "reply": "\n".join(outcome.replies),
        }

    def _ok(self, status: str) -> str:
        return "repaired" if self.mended else status

    def _rest(self, status: str, error: str, replies: Sequence[str] = ()) -> None:
        shown = [d.doc_id for d in self.passages.documents]
        if status == UNASKED:
            # With labels of an earlier stage for some, the query would look half done, and they might change.
            self._unasked = shown
            for doc_id in shown:
                self._rows.pop(doc_id, None)
            return
        row = {"parse_status": status, "error": error or None, "reply": "\n".join(replies) or None}
        for doc_id in shown:
            self._rows.setdefault(doc_id, row)
