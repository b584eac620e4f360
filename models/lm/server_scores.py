"""Short answers read off the log-probabilities that a chat server gives of its likeliest next tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.lm.dialects import Dialect, GarbledReplyError, write_body
from models.protocols import GenerationRequest, Sampling, TokenScores

TOP = 20  # what the OpenAI interface allows at most
NO_LOGPROBS = "the server gives no log-probabilities"
NO_ANSWER = "none of the answers is among the likeliest tokens"
_ONE_TOKEN = Sampling((0.0,), 1, 1.0, 0, 1.0, 1)


def scores_body(model: str, request: GenerationRequest, dialect: Dialect, prefilled: bool) -> dict[str, Any]:
    """The JSON body that asks for one token and the likeliest others in its place."""
    body = write_body(model, request, _ONE_TOKEN, 0.0, 1, request.seed, dialect, prefilled)
    return {**body, "logprobs": True, "top_logprobs": TOP}


def read_answers(reply: Any, answers: Sequence[str]) -> TokenScores:
    """Log-probabilities of the answers in a reply to `scores_body`.

    A token counts for the answer it spells, whatever its case and the spaces around it; tokens of one answer are added up.

    Args:
        reply: The parsed JSON.
        answers: m short answers.

    Returns:
        m natural log-probabilities: of an answer that no token spells, that of the least likely token given, which is a
        bound from above. An error where no answer is spelt, or no log-probabilities are there.

    Raises:
        GarbledReplyError: It is no chat completion.
    """
    try:
        choice = reply["choices"][0]
        usage = reply.get("usage") or {}
        prompt_tokens = int(usage.get("prompt_tokens") or 0)
        content = ((choice.get("logprobs") or {}).get("content")) or []
        first: Mapping[str, Any] = content[0] if content else {}
        given = [(str(t["token"]), float(t["logprob"])) for t in first.get("top_logprobs") or []]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise GarbledReplyError(f"no chat completion ({error!r})") from error
    given = [(token, value) for token, value in given if math.isfinite(value)]
    if not given:
        return TokenScores((), prompt_tokens, 0, NO_LOGPROBS)
    spelt: dict[str, list[float]] = {}
    for token, value in given:
        # Some servers write the space before a word as the tokenizer does.
        spelt.setdefault(token.replace("\u0120", " ").replace("\u2581", " ").strip().lower(), []).append(
            value
        )
    found = [spelt.get(answer.lower()) for answer in answers]
    if not any(found):
        return TokenScores((), prompt_tokens, 1, f"{NO_ANSWER} (the first is {given[0][0]!r})")
    floor = min(value for _, value in given)
    values = tuple(floor if own is None else _sum(own) for own in found)
    return TokenScores(values, prompt_tokens, 1)


def _sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
