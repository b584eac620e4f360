"""What OpenAI-compatible servers agree on, and what they do not: requests written and replies read for each.

All of them take messages, temperature, top_p, max_tokens, n, seed and stop. They differ in how the assistant's turn is
continued from a prefill, and in what they call top-k and the repetition penalty; some refuse what they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.lm.chat import well_formed
from models.protocols import GenerationRequest, Sampling


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is spoken to.

    Attributes:
        continues: It continues a final assistant message.
        continue_body: What the body must say for that.
        top_k: Its name for top-k; None = it has none.
        repetition_penalty: Its name for the repetition penalty; None = it has none.
        max_tokens: Its name for the longest answer.
        structured: It holds answers to a JSON schema when asked to (`response_format`).
    """

    continues: bool = False
    continue_body: Mapping[str, Any] = field(default_factory=dict)
    top_k: str | None = None
    repetition_penalty: str | None = None
    max_tokens: str = "max_tokens"
    structured: bool = True


_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
DIALECTS = {
    "vllm": Dialect(True, _CONTINUE, "top_k", "repetition_penalty"),
    "sglang": Dialect(True, _CONTINUE, "top_k", "repetition_penalty"),
    # llama.cpp continues a final assistant message without being told.
    "llama.cpp": Dialect(True, {}, "top_k", "repeat_penalty"),
    # Nothing beyond the standard: unknown fields are refused by some hosted servers.
    "openai": Dialect(max_tokens="max_completion_tokens"),
    "basic": Dialect(structured=False),
}
# What a server's model list calls its owner -> its dialect.
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "openai": "openai", "system": "openai"}


class GarbledReplyError(Exception):
    """A reply that is no chat completion; asking again may help."""


@dataclass(frozen=True)
class Choice:
    """One answer of a reply.

    Attributes:
        text: What continues the prefill, up to the stop string.
        finish: `stop` (a stop string), `eos` (the model ended its turn) or `length`.
        tokens: Tokens it cost; shared out by length where a reply counts several answers together.
    """

    text: str
    finish: str
    tokens: int


def write_body(
    model: str,
    request: GenerationRequest,
    sampling: Sampling,
    temperature: float,
    n: int,
    seed: int,
    dialect: Dialect,
    prefilled: bool,
) -> dict[str, Any]:
    """The JSON body of one chat completion.

    Args:
        model: The server's id of the model.
        request: Turns, prefill and stop strings.
        sampling: Top-p, top-k, repetition penalty and length; those at "off" are not sent.
        temperature: Of this call.
        n: Answers wanted.
        seed: Of this call, cut to the 31 bits that every server takes.
        dialect: The server's.
        prefilled: Send the prefill as the beginning of the assistant's turn. Where it is not sent, neither are stop
            strings: the model is to write both tags, and whether the closing one came must be seen.
    """
    messages = [{"role": m.role, "content": well_formed(m.content)} for m in request.messages]
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": temperature,
        dialect.max_tokens: sampling.max_new_tokens,
        "seed": seed & 0x7FFFFFFF,
    }
    if n > 1:
        body["n"] = n
    if sampling.top_p < 1.0:
        body["top_p"] = sampling.top_p
    if sampling.top_k and dialect.top_k:
        body[dialect.top_k] = sampling.top_k
    if sampling.repetition_penalty != 1.0 and dialect.repetition_penalty:
        body[dialect.repetition_penalty] = sampling.repetition_penalty
    if request.prefill and prefilled:
        messages.append({"role": "assistant", "content": well_formed(request.prefill)})
        body |= dialect.continue_body
    if request.stop and (prefilled or not request.prefill):
        body["stop"] = list(request.stop)
    if request.schema and dialect.structured:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": json.loads(request.schema)},
        }
    return body


def read_reply(reply: Any, request: GenerationRequest, prefilled: bool) -> tuple[list[Choice], int]:
    """The answers of a reply, and how many tokens its prompt had (0 where it does not say).

    Args:
        reply: The parsed JSON.
        request: What was asked.
        prefilled: Whether the prefill was sent (see `write_body`).

    Raises:
        GarbledReplyError: It is not a chat completion with at least one answer.
    """
    try:
        raw = [(choice["message"]["content"], choice) for choice in reply["choices"]]
        usage = reply.get("usage") or {}
        prompt_tokens, completion_tokens = (
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GarbledReplyError(f"no chat completion ({error!r})") from error
    if not raw or not all(isinstance(text, str) for text, _ in raw):
        raise GarbledReplyError("no answer in the reply")
    tokens = share_out(completion_tokens, [len(text) for text, _ in raw])
    choices = []
    for (text, choice), count in zip(raw, tokens, strict=True):
        text, closed = _continuation(text, request, prefilled)
        finish = "stop" if closed else _finish(choice)
        if finish == "stop" and not closed and request.prefill and not prefilled:
            finish = "eos"  # no stop string was sent, so none was met
        choices.append(Choice(text, finish, count))
    return choices, prompt_tokens


def share_out(total: int, weights: Sequence[int]) -> list[int]:
    """Split a count into whole parts in proportion to weights; the parts add up to it."""
    whole = sum(weights)
    shares, given, seen = [], 0, 0
    for number, weight in enumerate(weights, start=1):
        seen += weight
        upto = round(total * (seen / whole if whole else number / len(weights)))
        shares.append(upto - given)
        given = upto
    return shares


def _finish(choice: Mapping[str, Any]) -> str:
    reason = choice.get("finish_reason")
    if reason != "stop":
        return "length" if reason == "length" else "eos"
    # vLLM and SGLang say which stop string it was; others do not tell it from the end of the turn.
    for key in ("stop_reason", "matched_stop"):
        if key in choice:
            return "stop" if isinstance(choice[key], str) else "eos"
    return "stop"


def _continuation(text: str, request: GenerationRequest, prefilled: bool) -> tuple[str, bool]:
    """What comes after the prefill, should the reply hold it, up to a stop string; and whether one was there.

    A model that was given the prefill may write it again at once; one that was not may say something before it.
    """
    if request.prefill:
        before, found, after = text.partition(request.prefill)
        if found and (not prefilled or not before.strip()):
            text = after
    ends = [place for place in (text.find(stop) for stop in request.stop) if place >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
