"""Talks with a judge that take several turns, held side by side.

What is asked next depends on what was answered before, but talks about different queries need not wait for one another.
A talk is a generator: it yields what it wants to ask and is sent the replies; all talks' questions of one turn go to the
judge together.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from models.protocols import GenerationRequest, Sampling

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge, Reply

T = TypeVar("T")


@dataclass(frozen=True)
class Questions:
    """What a talk asks in one turn."""

    requests: tuple[GenerationRequest, ...]
    sampling: Sampling


Talk = Generator[Questions, "list[Reply]", T]


def hold(talks: Sequence[Talk[T]], judge: Judge) -> list[T]:
    """Hold talks to their ends.

    Args:
        talks: Generators that have not begun.
        judge: Who is asked.

    Returns:
        What each returned, in order.
    """
    results: dict[int, T] = {}
    replies: dict[int, list[Reply] | None] = dict.fromkeys(range(len(talks)))
    while replies:
        waiting: dict[int, Questions] = {}
        for number, answers in replies.items():
            try:
                # The first `send` of a generator must be None: nothing was asked yet.
                waiting[number] = talks[number].send(answers)  # type: ignore[arg-type]
            except StopIteration as end:
                results[number] = end.value
        replies = {number: [] for number in waiting}
        for sampling in dict.fromkeys(questions.sampling for questions in waiting.values()):
            numbers = [n for n, questions in waiting.items() if questions.sampling == sampling]
            requests = [request for n in numbers for request in waiting[n].requests]
            found = iter(judge.ask(requests, sampling))
            for n in numbers:
                replies[n] = [next(found) for _ in waiting[n].requests]
    return [results[number] for number in range(len(talks))]
