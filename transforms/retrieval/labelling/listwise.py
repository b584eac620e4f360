"""Labels from lists: relevance selection, then usefulness for answering, judged with a draft answer beside.

RelSel shows the whole pool and asks what is on topic. From what it selects a draft answer is written (the pseudo-answer),
and with it beside, UtilSel asks which of the selected passages help to answer, UtilRank for their order. All else is
negative. As in Zhang et al., "Utility-Focused LLM Annotation for Retrieval and RAG" (arXiv 2504.05220). ITEM
(arXiv 2406.11290) turns it into a loop: a better selection makes a better draft, which makes a better selection.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from schemas.errors import TamisError
from transforms.retrieval.labelling.lists import (
    NO_ANSWERS,
    Ask,
    ListSettings,
    Outcome,
    Passages,
    ask_list,
    passages_of,
)
from transforms.retrieval.labelling.method import Estimate, QueryLabels
from transforms.retrieval.labelling.permutations import MAJORITY, top_share
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.sheet import Sheet, write_answer
from transforms.retrieval.labelling.talk import Talk, hold

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

REFERENCES = ("pseudo", "gold", "none")
CANDIDATES = ("selected", "pool")


@dataclass(frozen=True)
class Listwise(ABC):
    """What the listwise methods share; see `transforms.retrieval.labelling.lists.ListSettings` for most options.

    Attributes:
        threshold: Share of the readings that must select a passage to make it positive.
    """

    permutations: int = 1
    window: int = 0
    overlap: float = 0.5
    constrained: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    reply_tokens: int = 0
    threshold: float = MAJORITY

    signal_class: ClassVar[str] = "A"
    version: ClassVar[int] = 1
    in_process: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    name: ClassVar[str] = ""
    prompts: ClassVar[Mapping[str, str]] = {}
    variables: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __post_init__(self) -> None:
        if self.permutations < 1:
            raise TamisError("--permutations must be 1 or more")
        if self.window < 0 or not 0 <= self.overlap < 1:
            raise TamisError("window must be 0 (all that fits) or more, overlap at least 0 and below 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.reply_tokens < 0:
            raise TamisError("temperature, top_k and reply_tokens must not be negative, top_p in (0, 1]")
        if not 0 < self.threshold <= 1:
            raise TamisError("threshold must be above 0 and at most 1")

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """See `transforms.retrieval.labelling.method.Method`."""
        judge = judge.reader if self.needs_target else judge
        return [self._own(labels, judge) for labels in hold([self._talk(q, judge) for q in queries], judge)]

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """See `transforms.retrieval.labelling.method.Method`: every stage asked about the whole pool."""
        judge = judge.reader if self.needs_target else judge
        passages = passages_of(query.documents, judge)
        if not passages.texts:
            return Estimate()
        ask = self._ask(judge, query, next(iter(self.prompts)), answer="")
        stages = self._stages()
        prompt = judge.prompt_tokens(ask.request(passages.texts, 0))
        n = len(passages.texts)
        return Estimate(
            stages * self.permutations,
            stages * self.permutations * prompt,
            stages * self.permutations * min(ask.sampling(n).max_new_tokens, 6 * n),
        )

    def _own(self, labels: QueryLabels, judge: Judge) -> QueryLabels:
        """The labels; those for one reader say for which."""
        if not self.needs_target:
            return labels
        own = {"target_model": judge.info.tag, "annotator": judge.info.tag}
        return dataclasses.replace(labels, rows=tuple({**row, **own} for row in labels.rows))

    def _stages(self) -> int:
        return 1

    @abstractmethod
    def _talk(self, query: PooledQuery, judge: Judge) -> Talk[QueryLabels]:
        """What is asked about one query, question by question."""

    def _settings(self) -> ListSettings:
        return ListSettings(
            self.permutations, self.window, self.overlap, self.constrained,
            self.temperature, self.top_p, self.top_k, self.reply_tokens,
        )  # fmt: skip

    def _ask(self, judge: Judge, query: PooledQuery, role: str, **variables: Any) -> Ask:
        wanted = set(self.variables[role])
        own = {k: v for k, v in {"query": query.text, **variables}.items() if k in wanted}
        ranking = role.endswith("rank")
        key = ("list", role, query.query_id)
        return Ask(judge, judge.prompt(role), judge.prompt("repair"), ranking, own, key, self._settings())


@dataclass(frozen=True)
class RelSel(Listwise):
    """Which documents of the pool are on topic (RelSel)."""

    name: ClassVar[str] = "relsel"
    prompts: ClassVar[Mapping[str, str]] = {"select": "relsel-v1", "repair": "list-repair-v1"}
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "select": ("query", "count", "passages"),
        "repair": ("count", "ranking"),
    }

    def _talk(self, query: PooledQuery, judge: Judge) -> Talk[QueryLabels]:
        passages = passages_of(query.documents, judge)
        sheet = Sheet(query, judge.prompt("select").tag, passages)
        if not passages.texts:
            return sheet.close()
        outcome = yield from ask_list(self._ask(judge, query, "select"), passages)
        return sheet.selection(passages, outcome, self.threshold).close()


@dataclass(frozen=True)
class _Useful(Listwise):
    """What UtilSel and UtilRank share.

    Attributes:
        reference: The answer the judge is shown: `pseudo` (it drafts one), `gold` (the queries' own), `none`.
        candidates: Which documents are judged for use: those RelSel `selected` (the rest is negative), or the `pool`.
        answer_tokens: Longest draft.
        draft_from: Most passages the draft is written from, the most often selected first.
    """

    reference: str = "pseudo"
    candidates: str = "selected"
    answer_tokens: int = 96
    draft_from: int = 10

    judge_role: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in REFERENCES:
            raise TamisError(f"reference '{self.reference}' is not one of {', '.join(REFERENCES)}")
        if self.candidates not in CANDIDATES:
            raise TamisError(f"candidates '{self.candidates}' is not one of {', '.join(CANDIDATES)}")
        if self.answer_tokens < 1 or self.draft_from < 1:
            raise TamisError("answer_tokens and draft_from must be 1 or more")

    @property
    def needs_answers(self) -> bool:  # type: ignore[override]
        """With the queries' own answers for reference."""
        return self.reference == "gold"

    def _stages(self) -> int:
        return 2

    def _talk(self, query: PooledQuery, judge: Judge) -> Talk[QueryLabels]:
        passages = passages_of(query.documents, judge)
        sheet = Sheet(query, judge.prompt(self.judge_role).tag, passages)
        if not passages.texts:
            return sheet.close()
        kept: list[int] = list(range(len(passages.texts)))
        votes = [0.0] * len(kept)
        if self.candidates == "selected" or self.reference == "pseudo":
            outcome = yield from ask_list(self._ask(judge, query, "relevance"), passages)
            sheet.pay(outcome)
            if not outcome.votes:
                return sheet.fail(outcome).close()
            votes = [vote.share for vote in outcome.votes]
            chosen = [i for i in kept if votes[i] >= self.threshold]
            sheet.facts["relevant"] = [passages.documents[i].doc_id for i in chosen]
            sheet.mended = outcome.status == "repaired"
            if self.candidates == "selected":
                sheet.negative(passages.pick([i for i in kept if i not in set(chosen)]))
                kept = chosen
        if not kept:
            return sheet.close()
        given = yield from self._reference(query, judge, passages, votes, sheet)
        if given is None:
            return sheet.close()
        shown = passages.pick(kept)
        ask = self._ask(judge, query, self.judge_role, answer=given)
        outcome = yield from ask_list(ask, shown, self._at_least(len(kept)))
        return self._fill(sheet, shown, outcome).close()

    def _reference(
        self, query: PooledQuery, judge: Judge, passages: Passages, votes: Sequence[float], sheet: Sheet
    ) -> Talk[str | None]:
        """The answer the judge is shown; None where one was wanted and could not be had, as the sheet then says."""
        if self.reference == "gold":
            if not query.answers:
                sheet.refuse("error", NO_ANSWERS)
                return None
            return " / ".join(query.answers)
        if self.reference == "none":
            return ""
        best = sorted(
            (i for i in range(len(votes)) if votes[i] >= self.threshold), key=lambda i: (-votes[i], i)
        )
        # Of nothing relevant, the answer is what the judge knows itself.
        draft = yield from write_answer(
            query, judge, passages.pick(best[: self.draft_from]), self.answer_tokens, self._settings()
        )
        return sheet.draft(draft)

    def _at_least(self, n: int) -> int:
        return 1

    def _fill(self, sheet: Sheet, shown: Passages, outcome: Outcome) -> Sheet:
        return sheet.selection(shown, outcome, self.threshold)


_ROLES = {
    "relevance": ("query", "count", "passages"),
    "answer": ("query", "count", "passages"),
    "repair": ("count", "ranking"),
}


@dataclass(frozen=True)
class UtilSel(_Useful):
    """Which documents help to answer (UtilSel)."""

    name: ClassVar[str] = "utilsel"
    judge_role: ClassVar[str] = "select"
    prompts: ClassVar[Mapping[str, str]] = {
        "select": "utilsel-v1", "relevance": "relsel-v1", "answer": "pseudo-answer-v1", "repair": "list-repair-v1",
    }  # fmt: skip
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "select": ("query", "answer", "count", "passages"),
        **_ROLES,
    }


@dataclass(frozen=True)
class UtilSelSpecific(UtilSel):
    """Which documents the reader itself says it needs: useful for the answer, and new to it.

    The cheap stand-in for gains where there is no gold answer; what readers say they need and what helps them differ.
    """

    name: ClassVar[str] = "utilsel_specific"
    needs_target: ClassVar[bool] = True
    prompts: ClassVar[Mapping[str, str]] = {**UtilSel.prompts, "select": "utilsel-specific-v1"}


@dataclass(frozen=True)
class UtilRank(_Useful):
    """The documents in order of their use for answering, the first positive (UtilRank).

    Attributes:
        top_percent: Share of the ranked documents that is positive, rounded down, at least one.
    """

    top_percent: float = 10.0

    name: ClassVar[str] = "utilrank"
    judge_role: ClassVar[str] = "rank"
    prompts: ClassVar[Mapping[str, str]] = {
        "rank": "utilrank-v1", "relevance": "relsel-v1", "answer": "pseudo-answer-v1", "repair": "list-repair-v1",
    }  # fmt: skip
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "rank": ("query", "answer", "count", "passages"),
        **_ROLES,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_percent <= 100:
            raise TamisError("top_percent must be above 0 and at most 100")

    def _at_least(self, n: int) -> int:
        return top_share(n, self.top_percent)

    def _fill(self, sheet: Sheet, shown: Passages, outcome: Outcome) -> Sheet:
        return sheet.ranking(shown, outcome, top_share(len(shown.texts), self.top_percent))
