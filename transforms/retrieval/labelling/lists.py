"""Asking a judge about a list of passages: shown one a turn, in several orders, in windows where the list is too long.

What comes back is one vote a document. A reply that cannot be read is asked for once more, with what was wrong said; if
that does not help, the reading is lost, and where all are lost the documents have a status and no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from models.prompts import Prompt
from models.protocols import GenerationRequest, Message, NumberList, Sampling
from schemas.fingerprint import derive_seed
from transforms.retrieval.labelling.judge import UNASKED
from transforms.retrieval.labelling.parsing import Reading, parse_ranking, parse_selection
from transforms.retrieval.labelling.permutations import (
    Vote,
    merge_rankings,
    merge_selections,
    orders,
    unpermute,
)
from transforms.retrieval.labelling.queries import PoolDocument
from transforms.retrieval.labelling.talk import Questions, Talk

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge, Reply

# Longest passage of a list, in tokens, where `--passage-tokens` does not say: a dozen of them fit into 8,192.
PASSAGE_TOKENS = 512
NO_TEXT = "the corpus holds no text of this document"
NO_ANSWERS = "the query has no gold answers (column `answers` of the queries)"


@dataclass(frozen=True)
class ListSettings:
    """How lists are asked about.

    Attributes:
        permutations: Orders each list is shown in.
        window: Most passages shown at once; 0 = as many as fit the judge's context.
        overlap: Share of a window that the next one shows again, in [0, 1).
        constrained: Hold a judge in this process to the form of a list (and ask a server for JSON).
        temperature: 0 = greedy.
        top_p: Nucleus mass.
        top_k: Likeliest tokens kept; 0 = all.
        reply_tokens: Longest reply; 0 = as a list of that length needs. Judges that think aloud need thousands.
    """

    permutations: int = 1
    window: int = 0
    overlap: float = 0.5
    constrained: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    reply_tokens: int = 0


@dataclass(frozen=True)
class Passages:
    """What is shown of some documents.

    Attributes:
        documents: Those that have a text.
        texts: What is shown of each.
        truncated: Whether the rest of it was cut.
        lengths: Tokens of each, as far as counted (from above).
    """

    documents: tuple[PoolDocument, ...]
    texts: tuple[str, ...]
    truncated: tuple[bool, ...]
    lengths: tuple[int, ...]

    def pick(self, numbers: Sequence[int]) -> Passages:
        """Some of them, in that order."""
        columns = (self.documents, self.texts, self.truncated, self.lengths)
        return Passages(*(tuple(column[i] for i in numbers) for column in columns))  # type: ignore[arg-type]


def passages_of(documents: Sequence[PoolDocument], judge: Judge) -> Passages:
    """What a judge is shown of documents; those without a text are left out."""
    shown = [d for d in documents if not d.missing and d.passage.strip()]
    room = judge.passage_tokens or min(PASSAGE_TOKENS, judge.context_limit // 4)
    cut = [judge.fit(d.passage, room) for d in shown]
    texts = tuple(text for text, _ in cut)
    return Passages(
        tuple(shown), texts, tuple(c for _, c in cut), tuple(judge.count_tokens(t) for t in texts)
    )


@dataclass
class Outcome:
    """What came of asking about a list.

    Attributes:
        votes: One a document, where a reading could be read; else empty.
        status: Of `PARSE_STATUSES`: `ok` where all readings were read as they stand, `repaired` where some were mended
            or lost; else why there is no label. `unasked`: the budget was spent.
        error: What was wrong with the replies, the first of its kind.
        replies: What the judge said, a line each.
        prompt_tokens: Of all questions.
        completion_tokens: Of all replies.
        windows: Windows the list was shown in, each as many times as there are permutations.
    """

    votes: list[Vote] = field(default_factory=list)
    status: str = "ok"
    error: str = ""
    replies: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    windows: int = 0

    def add(self, reply: Reply) -> None:
        """Count a reply's cost."""
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if reply.text:
            self.replies.append(reply.text.strip())


@dataclass(frozen=True)
class Ask:
    """A question about lists.

    Attributes:
        judge: Who is asked.
        prompt: The list prompt.
        repair: What is said after a reply that could not be read.
        ranking: An order is wanted, not a selection.
        variables: What the prompt asks for.
        key: What tells this question from the same one about other queries, for orders and seeds.
        settings: How.
    """

    judge: Judge
    prompt: Prompt
    repair: Prompt
    ranking: bool
    variables: dict[str, Any]
    key: tuple[str | int, ...]
    settings: ListSettings

    def request(self, texts: Sequence[str], reading: int) -> GenerationRequest:
        """The question about passages in the order given."""
        messages, prefill, stop = self.prompt.render_list(texts, **self.variables)
        seed = derive_seed(self.judge.seed, *self.key, reading) if self.settings.temperature else 0
        n = len(texts)
        form, schema = None, ""
        if self.settings.constrained:
            form = NumberList(n, " > ", n) if self.ranking else NumberList(n, none="none")
            schema = _schema(n, self.ranking)
        return GenerationRequest(messages, seed, prefill, stop, schema=schema, form=form)

    def again(self, request: GenerationRequest, reply: Reply, n: int) -> GenerationRequest:
        """The same question, after a reply to it that could not be read."""
        asked = self.repair.render(count=n, ranking=self.ranking)[0]
        said = Message("assistant", reply.text.strip() or "...")
        turns = (*request.messages, said, *(m for m in asked if m.role == "user"))
        return GenerationRequest(
            turns, request.seed, "", request.stop, schema=request.schema, form=request.form
        )

    def sampling(self, n: int) -> Sampling:
        """How replies about n passages are drawn."""
        settings = self.settings
        return Sampling(
            (settings.temperature,),
            1,
            settings.top_p,
            settings.top_k,
            1.0,
            settings.reply_tokens or reply_room(n),
        )

    def read(self, text: str, n: int, at_least: int) -> Reading:
        """What a reply says."""
        return parse_ranking(text, n, at_least) if self.ranking else parse_selection(text, n)


def reply_room(n: int) -> int:
    """Tokens of the longest list of n numbers, each `[12] > `, and a few words around it; in steps of 32."""
    return 32 * (1 + (6 * n + 16) // 32)


def windows(lengths: Sequence[int], room: int, most: int, overlap: float) -> list[range]:
    """Cut a list into windows that fit, each showing part of the one before again.

    Args:
        lengths: Tokens of each passage.
        room: Tokens there are for passages.
        most: Most passages in a window; 0 = no bound.
        overlap: Share of a window shown again in the next, in [0, 1).

    Returns:
        Windows in order, which together cover the list; one that holds a single passage may be over `room`.
    """
    found: list[range] = []
    start = 0
    while start < len(lengths):
        end, used = start, 0
        while (
            end < len(lengths)
            and (not most or end - start < most)
            and (end == start or used + lengths[end] <= room)
        ):
            used += lengths[end]
            end += 1
        found.append(range(start, end))
        if end == len(lengths):
            break
        start = max(start + 1, end - int((end - start) * overlap))
    return found


def ask_list(ask: Ask, passages: Passages, at_least: int = 1) -> Talk[Outcome]:
    """Ask about a list.

    Selections are asked about all windows at once; a passage shown in two has two votes for each order. Orders are
    asked about from the last window to the first, the best of each carried into the next, as in RankGPT's sliding window
    (Sun et al. 2023): what stands at the top in the end has been compared with everything.

    Args:
        ask: The question.
        passages: The list, best first.
        at_least: Of orders: fewest passages a reply must place.

    Returns:
        What came of it.
    """
    n = len(passages.texts)
    room = _room(ask, passages)
    spans = windows(passages.lengths, room, ask.settings.window, ask.settings.overlap)
    if ask.ranking and len(spans) > 1:
        return (yield from _sliding(ask, passages, max(len(s) for s in spans), at_least))
    plan = [
        (span, tuple(span[i] for i in order))
        for span in spans
        for order in orders(len(span), ask.settings.permutations, ask.judge.seed, *ask.key, span.start)
    ]
    outcome = Outcome(windows=len(spans))
    readings = yield from _read_all(ask, passages, [order for _, order in plan], outcome, min(at_least, n))
    if outcome.status == UNASKED:
        return outcome
    if ask.ranking:
        outcome.votes = merge_rankings([r for r in readings if r is not None], n)
        return outcome
    for i in range(n):
        about = [r for (span, _), r in zip(plan, readings, strict=True) if i in span and r is not None]
        merged = merge_selections([[0] if i in r else [] for r in about], 1)
        if not merged:  # every window that shows it was lost
            outcome.votes = []
            outcome.status = outcome.status if outcome.status not in ("ok", "repaired") else "unparseable"
            return outcome
        outcome.votes += merged
    return outcome


def _sliding(ask: Ask, passages: Passages, size: int, at_least: int) -> Talk[Outcome]:
    """An order of a long list: see `ask_list`."""
    n = len(passages.texts)
    current = list(range(n))
    outcome = Outcome()
    step = max(1, size - max(1, int(size * ask.settings.overlap)))
    end, readings = n, 0
    while True:
        begin = max(0, end - size)
        part = current[begin:end]
        shown = [
            tuple(part[i] for i in order)
            for order in orders(len(part), ask.settings.permutations, ask.judge.seed, *ask.key, begin)
        ]
        found = yield from _read_all(ask, passages, shown, outcome, min(at_least, len(part)))
        outcome.windows += 1
        read = [[part.index(i) for i in r] for r in found if r is not None]
        if not read or outcome.status == UNASKED:
            return outcome
        votes = merge_rankings(read, len(part))
        best = sorted(range(len(part)), key=lambda i: (votes[i].rank or len(part) + 1, i))
        current[begin:end] = [part[i] for i in best]
        readings = max(readings, len(read))
        if begin == 0:
            break
        end -= step
    outcome.votes = [
        Vote(1 - place / n, readings, place + 1) for place in (current.index(i) for i in range(n))
    ]
    return outcome


def _read_all(
    ask: Ask, passages: Passages, shown: Sequence[Sequence[int]], outcome: Outcome, at_least: int
) -> Talk[list[tuple[int, ...] | None]]:
    """Ask about lists in the orders given; documents each reply names, or None where it cannot be read, even asked again."""
    requests = [ask.request([passages.texts[i] for i in order], k) for k, order in enumerate(shown)]
    sampling = ask.sampling(max(map(len, shown)))
    replies = yield Questions(tuple(requests), sampling)
    read = [
        _reading(ask, request, reply, len(order), at_least, outcome)
        for request, reply, order in zip(requests, replies, shown, strict=True)
    ]
    lost = [
        k for k, (reading, reply) in enumerate(zip(read, replies, strict=True))
        if reading.status in ("unparseable", "empty", "refused") and reply.status in ("ok", "empty")
    ]  # fmt: skip
    if lost:
        again = tuple(ask.again(requests[k], replies[k], len(shown[k])) for k in lost)
        second = yield Questions(again, sampling)
        for k, request, reply in zip(lost, again, second, strict=True):
            reading = _reading(ask, request, reply, len(shown[k]), at_least, outcome)
            if reading.status == UNASKED:
                read[k] = reading
            elif reading.readable:
                read[k] = Reading(
                    reading.numbers, "repaired", reading.problem or f"asked again: {read[k].problem}"
                )
    _sum_up(read, outcome)
    return [
        unpermute(reading.numbers, order) if reading.readable else None
        for reading, order in zip(read, shown, strict=True)
    ]


def _reading(
    ask: Ask, request: GenerationRequest, reply: Reply, n: int, at_least: int, outcome: Outcome
) -> Reading:
    outcome.add(reply)
    if not reply.ok:
        return Reading((), reply.status, reply.error or "nothing was said")
    # A small model may go on receipting passages instead of answering; a number in that is no choice.
    said = {m.content.strip() for m in request.messages if m.role == "assistant"}
    lines = [line.strip() for line in reply.text.strip().split("\n") if line.strip()]
    if lines and said.issuperset(lines):
        return Reading((), "unparseable", "repeats what was said before")
    return ask.read(reply.text, n, at_least)


def _sum_up(read: Sequence[Reading], outcome: Outcome) -> None:
    """The status of all readings together, with what was found before."""
    if any(r.status == UNASKED for r in read):  # a label of some of the orders would be another one
        outcome.status = UNASKED
    if outcome.status == UNASKED:
        return
    good = [r for r in read if r.readable]
    problem = next((r.problem for r in read if r.problem), "")
    outcome.error = outcome.error or problem
    if not good:
        outcome.status = read[0].status
    elif outcome.status in ("ok", "repaired") and (
        len(good) < len(read) or any(r.status != "ok" for r in good)
    ):
        outcome.status = "repaired"


def _room(ask: Ask, passages: Passages) -> int:
    """Tokens a window has for passages: of the context, what the prompt around them and the reply leave."""
    n = len(passages.texts)
    empty = ask.judge.prompt_tokens(ask.request([""] * n, 0))
    repair = (
        64 if ask.settings.constrained else 256
    )  # asked again, the first reply and a few words come on top
    room = ask.judge.context_limit - empty - ask.sampling(n).max_new_tokens - repair - 2 * n
    # Where turns alone fill the context, half of it is for passages: their windows then have fewer turns.
    return max(room, ask.judge.context_limit // 2 - ask.sampling(n).max_new_tokens)


def _schema(n: int, ranking: bool) -> str:
    name = "ranking" if ranking else "passages"
    one = {"type": "integer", "minimum": 1, "maximum": n}
    numbers = {"type": "array", "items": one, "minItems": n if ranking else 0, "maxItems": n}
    return orjson.dumps(
        {"type": "object", "properties": {name: numbers}, "required": [name], "additionalProperties": False}
    ).decode()
