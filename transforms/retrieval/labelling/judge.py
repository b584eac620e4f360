"""A language model as labelling methods use it: every answer cached as it comes, counted, and within a budget.

Three questions can be asked. `ask` generates text. `choose` gives the log-probabilities of a few short answers as the
next token; `score` that of given texts after prompts. The last two are exact and cheap, and need a model in this process
(`choose` also works with servers that give log-probabilities).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from models.prompts import Prompt
from models.protocols import Generation, GenerationRequest, LanguageModel, ModelInfo, Sampling
from schemas.errors import ModelError
from schemas.fingerprint import digest
from transforms.requests import generate_cached, identity
from transforms.retrieval.labelling.budget import Ledger
from transforms.shards.cache import RequestCache

# What came of a question. Statuses of `schemas.judgments.PARSE_STATUSES`, and `unasked`: the budget was spent.
UNASKED = "unasked"
_TOO_LONG = ("exceed the context", "maximum context length", "context length", "context_length_exceeded")


@dataclass(frozen=True)
class Reply:
    """What came of one generation.

    Attributes:
        status: `ok`; `error`, `too_long` or `empty`; `unasked`.
        text: What the judge said (the first candidate); empty unless `ok`.
        texts: All candidates.
        prompt_tokens: Of the question.
        completion_tokens: Of the answers.
        finish: `stop`, `eos` or `length`.
        error: What went wrong.
    """

    status: str
    text: str = ""
    texts: tuple[str, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a text to read."""
        return self.status == "ok"


@dataclass(frozen=True)
class Scores:
    """What came of one `choose` or `score`.

    Attributes:
        status: As of a reply.
        values: `choose`: a natural log-probability for each answer. `score`: one for each token of the continuation.
        prompt_tokens: Of the question.
        completion_tokens: Tokens scored.
        error: What went wrong.
    """

    status: str
    values: tuple[float, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are values."""
        return self.status == "ok"


class Judge:
    """A language model with a cache, a budget and counters.

    Args:
        model: The model; loaded when it is first needed.
        info: What is recorded of it.
        prompts: Role -> prompt.
        cache: Answers already paid for; None remembers nothing.
        ledger: What may be spent, over all workers; None = no bound.
        count: Called with (counter, amount): `label.tokens_in`, ...
        heartbeat: Called while a long question is at work.
        seed: The run's seed; part of sampled requests (use `derive_seed(judge.seed, ...)`).
        passage_tokens: Longest passage shown to the judge; None = what its context leaves room for.
        reader: The target model as a judge of its own; None = this one.

    Attributes:
        info: As given; `info.tag` is the annotator.
        seed: As given.
        passage_tokens: As given.
    """

    def __init__(
        self,
        model: Callable[[], LanguageModel],
        info: ModelInfo,
        *,
        prompts: Mapping[str, Prompt] | None = None,
        cache: RequestCache | None = None,
        ledger: Ledger | None = None,
        count: Callable[[str, int], None] = lambda name, amount: None,
        heartbeat: Callable[[], None] = lambda: None,
        seed: int = 0,
        passage_tokens: int | None = None,
        reader: Judge | None = None,
    ) -> None:
        self._load, self.info, self.seed, self.passage_tokens = model, info, seed, passage_tokens
        self._prompts = dict(prompts or {})
        self._cache, self._ledger, self._count, self._heartbeat = cache, ledger, count, heartbeat
        self._reader = reader

    @property
    def model(self) -> LanguageModel:
        """The model itself; what is asked of it directly is neither cached nor counted."""
        return self._load()

    @property
    def gives_logprobs(self) -> bool:
        """Whether `choose` can be asked: a model in this process, or a server that gives log-probabilities."""
        offers = getattr(self.model, "offers_logprobs", None)
        return bool(offers()) if offers is not None else hasattr(self.model, "answer_logprobs")

    @property
    def reader(self) -> Judge:
        """The target model, which labels for one reader are about."""
        return self._reader or self

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.context_limit

    def prompt(self, role: str) -> Prompt:
        """The prompt of a role; its `tag` goes to `prompt_hash`."""
        return self._prompts[role]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones (of a server: from above)."""
        return self.model.count_tokens(text)

    def prompt_tokens(self, request: GenerationRequest) -> int:
        """Tokens of a whole question, the chat template included (of a server: from above)."""
        encode = getattr(self.model, "encode", None)
        if encode is not None:
            return len(encode(request))
        texts = [m.content for m in request.messages] + [request.prefill]
        return sum(self.count_tokens(t) for t in texts) + 8 * (len(request.messages) + 1)

    def fit(self, text: str, room: int) -> tuple[str, bool]:
        """The longest beginning of a text within `room` tokens, ended at white space; and whether any was cut."""
        if room <= 0:
            return "", bool(text)
        if len(text) <= room or self.count_tokens(text) <= room:  # a token is a character at least
            return text, False
        low, high = 0, len(text)
        while (
            low < high
        ):  # the longest prefix that fits; token counts grow with length but for a token or two
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count_tokens(text[:middle]) <= room else (low, middle - 1)
        cut = text[:low]
        at_space = max(cut.rfind(" "), cut.rfind("\n"))
        return (cut[:at_space] if at_space > low // 2 else cut).rstrip(), True

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Reply]:
        """Generate for every request what the cache does not hold.

        Args:
            requests: n requests; those the budget has no room for are not asked (the first ones go first).
            sampling: Shared by all of them.

        Returns:
            One reply a request, in order.
        """
        requests = list(requests)
        allowed = self._allow(requests, sampling)
        asked = [r for r, yes in zip(requests, allowed, strict=True) if yes]
        generations: list[Generation] = []
        if asked:
            generations, usage = generate_cached(self.model, asked, sampling, self._cache, self._heartbeat)
            for name in ("requests", "asked", "cache_hits", "errors", "tokens_in", "tokens_out"):
                self._count(f"label.{name}", getattr(usage, name))
            self._spend(usage.tokens_in + usage.tokens_out)
        found = iter(generations)
        return [_reply(next(found)) if yes else Reply(UNASKED) for yes in allowed]

    def choose(self, requests: Sequence[GenerationRequest], answers: Sequence[str]) -> list[Scores]:
        """Log-probabilities of a few short answers as the next token after each prompt.

        Each answer stands for its spellings (with and without a space before it, lower and upper case), whose probabilities
        are added. Requests that say how far they begin alike (`shared`) are read together, so give those of one query in
        one call.

        Args:
            requests: n prompts.
            answers: m answers whose first tokens differ, such as ("Yes", "No").

        Returns:
            One `Scores` a request, in order, with m log-probabilities.

        Raises:
            ModelError: The model gives none, or two answers begin with the same token.
        """
        run = getattr(self.model, "answer_logprobs", None)
        if run is None:
            raise ModelError(f"{self.info.name} gives no next-token scores; use a model in this process")
        heads: list[tuple[str | bytes, ...]] = [
            ("choose", identity(self.info), *answers, _request_bytes(r)) for r in requests
        ]
        return self._scored(
            list(requests), heads, lambda part, done: run(part, list(answers), done), len(answers)
        )

    def score(self, requests: Sequence[GenerationRequest], continuations: Sequence[str]) -> list[Scores]:
        """Log-probability of a given text after each prompt, token by token.

        Args:
            requests: n prompts.
            continuations: n texts, each following its prompt as the model's turn (after the prefill).

        Returns:
            One `Scores` a request, in order; `sum(values)` is the text's log-likelihood (nats).

        Raises:
            ModelError: The model gives none.
        """
        run = getattr(self.model, "chat_logprobs", None)
        if run is None:
            raise ModelError(f"{self.info.name} cannot score given text; use a model in this process")
        pairs = list(zip(requests, continuations, strict=True))
        heads: list[tuple[str | bytes, ...]] = [
            ("score", identity(self.info), text, _request_bytes(r)) for r, text in pairs
        ]
        return self._scored(
            pairs, heads, lambda part, done: run([r for r, _ in part], [t for _, t in part], done), None
        )

    def _scored(
        self,
        items: list[Any],
        heads: Sequence[tuple[str | bytes, ...]],
        run: Callable[[list[Any], Callable[[int, Any], None]], Any],
        width: int | None,
    ) -> list[Scores]:
        """Scores of every item, of which those the cache holds are not computed again."""
        keys = [digest(*head) for head in heads]
        answers: dict[bytes, Scores] = {}
        if self._cache is not None:
            for key, stored in zip(keys, self._cache.get_many(keys), strict=True):
                found = _decode(stored, width) if stored is not None else None
                if found is not None:
                    answers[key] = found
        self._count("label.requests", len(items))
        missing = {k: item for k, item in zip(keys, items, strict=True) if k not in answers}
        self._count("label.cache_hits", len(set(keys)) - len(missing))
        order = list(missing)
        prompts = [i[0] if isinstance(i, tuple) else i for i in missing.values()]
        allowed = self._allow(prompts, None) if missing else []
        part = [k for k, yes in zip(order, allowed, strict=True) if yes]

        def keep(index: int, result: Any) -> None:
            scores = Scores(
                "ok" if result.error is None else _status(result.error),
                tuple(float(v) for v in result.values),
                result.prompt_tokens,
                result.completion_tokens,
                result.error or "",
            )
            answers[part[index]] = scores
            if self._cache is not None and scores.ok:
                self._cache.put_many({part[index]: _encode(scores)})
            self._spend(scores.prompt_tokens + scores.completion_tokens)
            self._heartbeat()

        if part:
            run([missing[k] for k in part], keep)
            self._count("label.asked", len(part))
            self._count("label.errors", sum(not answers[k].ok for k in part))
            tokens_in = sum(answers[k].prompt_tokens for k in part)
            tokens_out = sum(answers[k].completion_tokens for k in part)
            self._count("label.tokens_in", tokens_in)
            self._count("label.tokens_out", tokens_out)
        return [answers.get(k, Scores(UNASKED)) for k in keys]

    def _allow(self, requests: Sequence[GenerationRequest], sampling: Sampling | None) -> list[bool]:
        """Which requests the budget has room for; what the cache holds costs nothing."""
        if self._ledger is None:
            return [True] * len(requests)
        cached = self._cached(requests, sampling) if sampling is not None else [False] * len(requests)
        room = self._ledger.left()
        allowed = []
        for request, known in zip(requests, cached, strict=True):
            cost = 0 if known else self.prompt_tokens(request) + (sampling.max_new_tokens if sampling else 1)
            room -= cost
            allowed.append(known or room >= 0)
            if room < 0:
                room = -1  # what comes later is not asked in its place, however short: the order decides
        return allowed

    def _cached(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[bool]:
        from transforms.requests import request_key

        if self._cache is None:
            return [False] * len(requests)
        keys = [request_key(self.model.info, r, sampling) for r in requests]
        return [found is not None for found in self._cache.get_many(keys)]

    def _spend(self, tokens: int) -> None:
        if self._ledger is not None and tokens:
            self._ledger.spend(tokens)


def _reply(generation: Generation) -> Reply:
    if generation.error is not None:
        return Reply(
            _status(generation.error), error=generation.error, prompt_tokens=generation.prompt_tokens
        )
    texts = tuple(c.text for c in generation.candidates)
    tokens = sum(c.tokens for c in generation.candidates)
    first = generation.candidates[0] if generation.candidates else None
    if first is None or not any(t.strip() for t in texts):
        return Reply("empty", prompt_tokens=generation.prompt_tokens, completion_tokens=tokens)
    return Reply("ok", first.text, texts, generation.prompt_tokens, tokens, first.finish)


def _status(error: str) -> str:
    return "too_long" if any(mark in error for mark in _TOO_LONG) else "error"


def _request_bytes(request: GenerationRequest) -> bytes:
    body = [[[m.role, m.content] for m in request.messages], request.prefill]
    try:
        return orjson.dumps(body)
    except TypeError:  # lone surrogates, which no tokenizer reads either
        return repr(body).encode("utf-8", "backslashreplace")


def _encode(scores: Scores) -> bytes:
    head = np.array([scores.prompt_tokens, scores.completion_tokens], "<i4").tobytes()
    return head + np.array(scores.values, "<f8").tobytes()


def _decode(stored: bytes, width: int | None) -> Scores | None:
    if len(stored) < 8 or (len(stored) - 8) % 8 or (width is not None and len(stored) != 8 + 8 * width):
        return None  # written by another version: ask again
    prompt, completion = np.frombuffer(stored[:8], "<i4")
    return Scores("ok", tuple(np.frombuffer(stored[8:], "<f8").tolist()), int(prompt), int(completion))
