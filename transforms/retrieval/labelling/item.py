"""ITEM: answer, judge usefulness with that answer beside, answer again from what was found useful, until nothing changes.

A better selection makes a better answer, and a better answer a better selection (Zhang et al., "Iterative Utility
Judgment", arXiv 2406.11290). The variant AR also orders the passages by relevance between the rounds, which costs a
further question a round and helps where lists are long and noisy; A goes without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from schemas.errors import TamisError
from transforms.retrieval.labelling.lists import Outcome, ask_list, passages_of
from transforms.retrieval.labelling.listwise import Listwise
from transforms.retrieval.labelling.method import QueryLabels
from transforms.retrieval.labelling.permutations import top_share
from transforms.retrieval.labelling.queries import PooledQuery
from transforms.retrieval.labelling.sheet import Sheet, write_answer
from transforms.retrieval.labelling.talk import Talk

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge


@dataclass(frozen=True)
class Item(Listwise):
    """The ITEM loop.

    Attributes:
        variant: `a` (answer and usefulness) or `ar` (and relevance order between rounds).
        output: `select` (a subset) or `rank` (an order, whose top is positive).
        rounds: Most rounds; it ends sooner when a round changes nothing.
        top_percent: With `rank`: share that is positive, rounded down, at least one.
        answer_tokens: Longest answer.
        draft_from: Most passages an answer is written from.
    """

    variant: str = "a"
    output: str = "select"
    rounds: int = 3
    top_percent: float = 10.0
    answer_tokens: int = 96
    draft_from: int = 10

    name: ClassVar[str] = "item"
    prompts: ClassVar[Mapping[str, str]] = {
        "select": "utilsel-v1",
        "rank": "utilrank-v1",
        "relrank": "relrank-v1",
        "answer": "pseudo-answer-v1",
        "repair": "list-repair-v1",
    }
    variables: ClassVar[Mapping[str, Sequence[str]]] = {
        "select": ("query", "answer", "count", "passages"),
        "rank": ("query", "answer", "count", "passages"),
        "relrank": ("query", "answer", "count", "passages"),
        "answer": ("query", "count", "passages"),
        "repair": ("count", "ranking"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("a", "ar"):
            raise TamisError(f"variant '{self.variant}' is neither a nor ar")
        if self.output not in ("select", "rank"):
            raise TamisError(f"output '{self.output}' is neither select nor rank")
        if self.rounds < 1 or self.answer_tokens < 1 or self.draft_from < 1:
            raise TamisError("rounds, answer_tokens and draft_from must be 1 or more")
        if not 0 < self.top_percent <= 100:
            raise TamisError("top_percent must be above 0 and at most 100")

    def _stages(self) -> int:
        return self.rounds * (3 if self.variant == "ar" else 2)

    def _talk(self, query: PooledQuery, judge: Judge) -> Talk[QueryLabels]:
        passages = passages_of(query.documents, judge)
        sheet = Sheet(query, judge.prompt(self.output).tag, passages)
        n = len(passages.texts)
        if not n:
            return sheet.close()
        positives = top_share(n, self.top_percent)
        order = list(range(n))  # how the list stands; at first as the pool has it
        sources = order  # what the next answer is written from, best first
        before: object = None
        outcome = Outcome()
        settled = False
        done = 0
        while done < self.rounds and not settled:
            draft = yield from write_answer(
                query, judge, passages.pick(sources[: self.draft_from]), self.answer_tokens, self._settings()
            )
            answer = sheet.draft(draft)
            if answer is None:
                return sheet.close()
            ask = self._ask(judge, query, self.output, answer=answer)
            found = yield from ask_list(ask, passages.pick(order), positives if self.output == "rank" else 1)
            sheet.pay(found)
            if not found.votes:
                return sheet.fail(found).close()
            done += 1
            votes = {i: found.votes[place] for place, i in enumerate(order)}
            # Best first; documents that stand equal keep their places.
            sources = sorted(order, key=lambda i: (-votes[i].share, order.index(i)))
            if self.output == "select":
                sources = [i for i in sources if votes[i].share >= self.threshold]
                now: object = frozenset(sources)
            else:
                order = sources
                now = tuple(order)
            # In the pool's order, and paid already.
            outcome = replace(found, votes=[votes[i] for i in range(n)], prompt_tokens=0, completion_tokens=0)
            settled, before = now == before, now
            if self.variant == "ar" and not settled and done < self.rounds:
                ask = self._ask(judge, query, "relrank", answer=answer)
                ranked = yield from ask_list(ask, passages.pick(order))
                sheet.pay(ranked)
                if not ranked.votes:
                    return sheet.fail(ranked).close()
                place = {i: -ranked.votes[k].share for k, i in enumerate(order)}
                order = sorted(order, key=lambda i: (place[i], order.index(i)))
                sources = [i for i in order if i in set(sources)]
        sheet.facts |= {"rounds": done, "settled": settled}
        if self.output == "rank":
            return sheet.ranking(passages, outcome, positives).close()
        return sheet.selection(passages, outcome, self.threshold).close()
