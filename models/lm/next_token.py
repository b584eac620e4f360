"""Judging without generating: log-probabilities of short answers, or of given texts, after prompts that begin alike.

A judge asks the same question of many passages: instructions, query and perhaps an answer for reference stand first and
are the same for all of them. That beginning is read once, and its keys and values serve every passage; the passages are
batched by length, and only the positions that are asked for go through the output layer.

Where a beginning ends is a property of the request (`GenerationRequest.shared`), not of the requests beside it, and a row
is padded to a length that depends on its own length alone. So a result does not depend on its company, and on a CPU whose
matrix kernels treat every row alike (`models.lm.prepare` checks that) it is the same bit for bit; elsewhere up to
floating point.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.batching import padded_lengths
from models.lm.decoder import accepts_logits_to_keep
from models.lm.sharp import SharpLogits
from models.protocols import GenerationRequest, Message, TokenScores
from schemas.errors import ModelError

if TYPE_CHECKING:
    from models.lm.local import LocalLanguageModel

OnDone = Callable[[int, TokenScores], None]

# Padded tokens read together. On one core a passage of some hundred tokens fills the kernels by itself; on an accelerator
# it takes thousands.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 32_768
# Rows of the output layer computed at once (each is as wide as the vocabulary).
_OUTPUT_ROWS = 256


@dataclass(frozen=True)
class _Row:
    """One prompt: its tokens, how many of them are its shared beginning, and how many at the end are asked about."""

    index: int
    ids: tuple[int, ...]
    shared: int
    scored: int  # 0: the token after the last one is asked about
    tokens: tuple[int, ...] = ()  # asked about there; of scored tokens, each is asked about at its own place

    @property
    def own(self) -> int:
        return len(self.ids) - self.shared


def answer_logprobs(
    model: LocalLanguageModel,
    requests: Sequence[GenerationRequest],
    answers: Sequence[str],
    on_done: OnDone | None = None,
) -> list[TokenScores]:
    """Log-probabilities of a few answers as the next token after each prompt.

    Args:
        model: A model in this process.
        requests: n prompts.
        answers: m answers. Each stands for its spellings: with and without a space before it, as given, in lower and in
            upper case; their probabilities are added (see `answer_tokens`).
        on_done: Called with (index, scores) as soon as each is known.

    Returns:
        n scores of m natural log-probabilities each, in order; a prompt beyond the context is an error of its own.

    Raises:
        ModelError: Two answers may begin with the same token, or a score is not a number.
    """
    tokens = answer_tokens(model.tokenizer, answers)
    results: list[TokenScores | None] = [None] * len(requests)
    flat = torch.tensor([t for group in tokens for t in group])
    edges = np.cumsum([0, *map(len, tokens)])

    def finish(index: int, scores: TokenScores) -> None:
        results[index] = scores
        if on_done is not None:
            on_done(index, scores)

    rows = []
    for index, request in enumerate(requests):
        ids, shared = _encode(model, request)
        if problem := _problem(model, len(ids) + 1):
            finish(index, TokenScores((), len(ids), 0, problem))
        else:
            rows.append(_Row(index, tuple(ids), shared, 0, tuple(flat.tolist())))
    for row, logits in _run(model, rows):
        logprobs = torch.log_softmax(logits[-1].double(), -1)[flat]
        values = [float(torch.logsumexp(logprobs[a:b], 0)) for a, b in itertools.pairwise(edges)]
        _check(values)
        finish(row.index, TokenScores(tuple(values), len(row.ids), 1))
    return [r for r in results if r is not None]


def chat_logprobs(
    model: LocalLanguageModel,
    requests: Sequence[GenerationRequest],
    continuations: Sequence[str],
    on_done: OnDone | None = None,
) -> list[TokenScores]:
    """Log-probability of each token of a given text, as the model's turn after each prompt.

    Args:
        model: A model in this process.
        requests: n prompts.
        continuations: n texts; each is tokenised together with the prefill before it.
        on_done: As in `answer_logprobs`.

    Returns:
        n scores, one natural log-probability a token of the text; none for an empty text.

    Raises:
        ModelError: A score is not a number.
    """
    results: list[TokenScores | None] = [None] * len(requests)

    def finish(index: int, scores: TokenScores) -> None:
        results[index] = scores
        if on_done is not None:
            on_done(index, scores)

    rows = []
    for index, (request, text) in enumerate(zip(requests, continuations, strict=True)):
        prompt, shared = _encode(model, request)
        whole = model.encode(dataclasses.replace(request, prefill=request.prefill + text))
        begins = min(_common(prompt, whole), len(whole) - 1)
        scored = len(whole) - begins if text else 0
        if not text or begins < 1:
            problem = None if not text else "the prompt has no tokens"
            finish(index, TokenScores((), len(prompt), 0, problem))
        elif problem := _problem(model, len(whole)):
            finish(index, TokenScores((), len(prompt), 0, problem))
        else:
            rows.append(_Row(index, tuple(whole), min(shared, begins - 1), scored))
    for row, logits in _run(model, rows):
        targets = torch.tensor(row.ids[-row.scored :], device=logits.device)[:, None]
        values = torch.log_softmax(logits.double(), -1).gather(1, targets)[:, 0].tolist()
        _check(values)
        finish(row.index, TokenScores(tuple(values), len(row.ids) - row.scored, row.scored))
    return [r for r in results if r is not None]


def answer_tokens(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """The tokens that stand for each answer, ascending: those of its spellings that are one token.

    Where no spelling is one token, the first tokens stand for it. A space that is a token of its own tells nothing and is
    passed over.

    Raises:
        ModelError: Two answers share one, so that the token does not tell them apart; an answer has none.
    """
    space = tokenizer.encode(" ", add_special_tokens=False)
    found: list[set[int]] = []
    for answer in answers:
        spellings = {s for word in (answer, answer.lower(), answer.upper()) for s in (word, f" {word}")}
        encoded = [tokenizer.encode(s, add_special_tokens=False) for s in spellings]
        encoded = [ids[len(space) :] if ids[: len(space)] == space else ids for ids in encoded]
        whole = {ids[0] for ids in encoded if len(ids) == 1}
        tokens = whole or {ids[0] for ids in encoded if ids}
        if not tokens:
            raise ModelError(f"the answer {answer!r} has no token")
        found.append(tokens)
    for i, left in enumerate(found):
        for j in range(i):
            if left & found[j]:
                raise ModelError(
                    f"the answers {answers[j]!r} and {answers[i]!r} begin with the same token for this model; "
                    "choose others"
                )
    return [sorted(tokens) for tokens in found]


def _run(model: LocalLanguageModel, rows: Sequence[_Row]) -> Iterator[tuple[_Row, torch.Tensor]]:
    """Each row with its logits, float32 of shape (scored tokens or 1, vocabulary); as soon as its batch is done."""
    groups: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.ids[: row.shared], []).append(row)
    head = SharpLogits(model.model)
    for prefix, members in groups.items():
        with model.exclusive():
            cache = _read_prefix(model, prefix) if prefix else None
        for part in _batches(members, model):
            with model.exclusive():
                logits = _read_rows(model, part, cache, len(prefix), head)
            yield from zip(part, logits, strict=True)


def _batches(rows: Sequence[_Row], model: LocalLanguageModel) -> Iterator[list[_Row]]:
    """Rows of one padded length, within the budget; longest first, so that lack of memory shows at once."""
    budget = CPU_TOKENS if model.model.device.type == "cpu" else ACCELERATOR_TOKENS
    lengths = _padded([row.own for row in rows])
    by_length: dict[int, list[_Row]] = {}
    for row, length in zip(rows, lengths, strict=True):
        by_length.setdefault(int(length), []).append(row)
    for length in sorted(by_length, reverse=True):
        size = max(1, budget // length)
        alike = by_length[length]
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _padded(lengths: Sequence[int]) -> Any:
    return padded_lengths(np.asarray(lengths) - 1, 1 << 30)  # padding on the right needs no spare place


def _read_prefix(model: LocalLanguageModel, prefix: Sequence[int]) -> Any:
    """Keys and values of a beginning."""
    ids = torch.tensor([list(prefix)], device=model.model.device)
    options = {"logits_to_keep": 1} if accepts_logits_to_keep(model.model) else {}
    return model.model(input_ids=ids, use_cache=True, **options).past_key_values


def _read_rows(
    model: LocalLanguageModel, rows: Sequence[_Row], cache: Any, shared: int, head: SharpLogits
) -> list[torch.Tensor]:
    """Logits asked for by each row, given the cache of their beginning."""
    device = model.model.device
    width = int(_padded([rows[0].own])[0])
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        own = torch.tensor(row.ids[shared:])
        ids[number, : len(own)] = own
        ids[number, len(own) :] = own[-1]  # padding stands on the right, where a causal model does not see it
    options: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        mine = copy.deepcopy(cache)  # reading rows appends to it
        if len(rows) > 1:
            mine.batch_repeat_interleave(len(rows))
        options = {"past_key_values": mine, "use_cache": True}
    # Row by row, the positions whose next token is asked about.
    wanted = [
        list(range(row.own - 1 - row.scored, row.own - 1)) if row.scored else [row.own - 1] for row in rows
    ]
    union = sorted({place for places in wanted for place in places})
    keep = accepts_logits_to_keep(model.model)
    if len(rows) > 1 and (len(union) if keep else width) * len(rows) > _OUTPUT_ROWS:
        half = len(rows) // 2  # too many positions for one output
        return [
            *_read_rows(model, rows[:half], cache, shared, head),
            *_read_rows(model, rows[half:], cache, shared, head),
        ]
    if keep:
        options["logits_to_keep"] = torch.tensor(union, device=device)
    with head.watching():
        out = model.model(input_ids=ids.to(device), **options)
    found = []
    for number, (row, places) in enumerate(zip(rows, wanted, strict=True)):
        where = [union.index(place) for place in places] if keep else places
        logits = out.logits[number, where, : model.vocabulary].float().cpu()
        tokens = [[t] for t in row.ids[-row.scored :]] if row.scored else [row.tokens]
        found.append(head.sharpen(logits, number, where, tokens))
    return found


def _encode(model: LocalLanguageModel, request: GenerationRequest) -> tuple[list[int], int]:
    """Token ids of a prompt, and how many of them are its shared beginning; at least one token is its own."""
    ids = model.encode(request)
    if not request.shared or not request.messages:
        return ids, 0
    last = request.messages[-1]
    # What follows the beginning decides how its last characters are tokenised: two different ends show where that starts.
    ends = [
        model.encode(
            dataclasses.replace(
                request,
                messages=(*request.messages[:-1], Message(last.role, last.content[: request.shared] + end)),
                prefill="",
            )
        )
        for end in ("a", "1")
    ]
    shared = min(_common(ends[0], ends[1]), _common(ids, ends[0]))
    return ids, max(0, min(shared, len(ids) - 1))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _problem(model: LocalLanguageModel, tokens: int) -> str:
    if tokens > model.context_limit:
        return f"prompt and answer of {tokens} tokens exceed the context of {model.context_limit} tokens"
    return ""


def _check(values: Sequence[float]) -> None:
    if not np.isfinite(values).all():
        raise ModelError("the model's scores are not numbers (NaN or infinite); try dtype=float32")
