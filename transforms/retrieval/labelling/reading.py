"""A reader answering questions with the passages it is given, or none: what labels by gain are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.metrics.answers import PERFORMANCE, has_answer
from models.prompts import Prompt
from models.protocols import GenerationRequest, Sampling
from transforms.retrieval.labelling.judge import UNASKED
from transforms.retrieval.labelling.lists import Passages
from transforms.retrieval.labelling.queries import PooledQuery

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

# A context: numbers of passages, in the order they are shown in; empty = the reader answers from memory.
Context = tuple[int, ...]


@dataclass(frozen=True)
class Read:
    """What a reader answered in one context.

    Attributes:
        status: `ok`, or why there is no answer; `unasked`: the budget was spent.
        answer: What it said, the first line; may be empty, which is an answer, and a wrong one.
        prompt_tokens: Of the question.
        completion_tokens: Of the answer.
        error: What went wrong.
    """

    status: str
    answer: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    def perf(self, answers: Sequence[str], name: str) -> float:
        """How good the answer is, in [0, 1] (`models.metrics.answers.PERFORMANCE`)."""
        return PERFORMANCE[name](self.answer, answers)

    def right(self, answers: Sequence[str]) -> bool:
        """Whether it holds a gold answer."""
        return has_answer(self.answer, answers) > 0


@dataclass(frozen=True)
class Reader:
    """Asks a reader.

    Attributes:
        judge: The model that reads.
        context: Prompt with passages.
        closed: Prompt without.
        answer_tokens: Longest answer.
    """

    judge: Judge
    context: Prompt
    closed: Prompt
    answer_tokens: int

    def request(self, query: PooledQuery, passages: Passages, context: Context) -> GenerationRequest:
        """The question in one context. Greedy, so it needs no seed, and equal questions are asked once."""
        if not context:
            messages, prefill, stop = self.closed.render(query=query.text)
        else:
            texts = [passages.texts[i] for i in context]
            messages, prefill, stop = self.context.render_list(texts, query=query.text)
        return GenerationRequest(messages, 0, prefill, stop)

    def fitting(self, query: PooledQuery, passages: Passages, most: int = 0) -> int:
        """How many of the first passages can be shown together; at most `most` (0 = all)."""
        n = min(len(passages.texts), most or len(passages.texts))
        while n > 1:
            tokens = self.judge.prompt_tokens(self.request(query, passages, tuple(range(n))))
            over = tokens + self.answer_tokens - self.judge.context_limit
            if over <= 0:
                break
            # At least as many passages less as hold what is too much.
            while over > 0 and n > 1:
                n -= 1
                over -= passages.lengths[n]
        return n

    def read(
        self, asked: Sequence[tuple[PooledQuery, Passages, Sequence[Context]]]
    ) -> list[dict[Context, Read]]:
        """Answers of every query in each of its contexts; all are asked together, each distinct question once."""
        plan = [
            (number, context)
            for number, (_, _, contexts) in enumerate(asked)
            for context in dict.fromkeys(contexts)
        ]
        requests = [self.request(asked[number][0], asked[number][1], context) for number, context in plan]
        sampling = Sampling((0.0,), 1, 1.0, 0, 1.0, self.answer_tokens)
        replies = self.judge.ask(requests, sampling) if requests else []
        found: list[dict[Context, Read]] = [{} for _ in asked]
        for (number, context), reply in zip(plan, replies, strict=True):
            status = "ok" if reply.status == "empty" else reply.status
            found[number][context] = Read(
                status, first_line(reply.text), reply.prompt_tokens, reply.completion_tokens, reply.error
            )
        return found


def first_line(text: str) -> str:
    """The answer in a reply: its first line, without the label that a server may have made the model write itself."""
    stripped = text.strip()
    if stripped.lower().startswith("answer:"):
        stripped = stripped[len("answer:") :].strip()
    return stripped.split("\n", 1)[0].strip()


def failed(*reads: Read) -> Read | None:
    """The first of some answers that is none; what was not asked comes before what went wrong."""
    bad = [r for r in reads if r.status != "ok"]
    return min(bad, key=lambda r: r.status != UNASKED, default=None)
