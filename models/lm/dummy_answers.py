"""What the dummy server says: a text given back, softened with the lexicon, or noise."""

from __future__ import annotations

import random
import re
from typing import Any

from models.lm.dummy_judge import noise

OPEN, CLOSE = "<answer>", "</answer>"
# What a listed word gives way to, besides nothing at all.
MILDER = ("person", "thing", "poor", "bad", "unwise", "not good")
_TOKEN = re.compile(r"\s*\S+|\s+$")


def write_answer(messages: list[dict[str, Any]], mode: str, draw: random.Random) -> str:
    """What the model says: the asked-for text, rewritten by the mode, in tags where the prompt speaks of them."""
    asked = [message["content"] for message in messages if message.get("role") == "user"]
    question = asked[-1] if asked else messages[-1]["content"]
    if mode == "garbage":
        return noise(draw)
    # A rewrite prompt ends in the text, after its label; any other question is the text itself.
    _, labelled, text = question.rpartition("\nText: ")
    text = text if labelled else question
    answer = _soften(text, draw) if mode == "soften" else text
    if OPEN not in question:
        return answer
    begun = messages[-1]["content"] if messages[-1].get("role") == "assistant" else ""
    return f"{'' if OPEN in begun else OPEN}{answer}{CLOSE}"


def _soften(text: str, draw: random.Random) -> str:
    """Take each listed word out, or put a milder one in its place."""
    parts, position = [], 0
    for match in _lexicon().find(text):
        milder = draw.choice(("", *MILDER))
        parts += [text[position : match.start], milder]
        position = match.end
        if (
            not milder
            and text[position : position + 1] == " "
            and text[match.start - 1 : match.start] in ("", " ")
        ):
            position += 1  # not two spaces where a word was
    return "".join([*parts, text[position:]])


def _lexicon() -> Any:
    from models.registry import load

    return load("scorer", "lexicon")


def cut(text: str, stops: list[str], limit: int) -> tuple[str, str, str | None, int]:
    """A text up to its first stop string and its longest length: text, finish reason, stop string, tokens."""
    found = sorted((text.find(stop), stop) for stop in stops if stop and stop in text)
    tokens = _TOKEN.findall(text[: found[0][0]] if found else text)
    if len(tokens) > limit:
        return "".join(tokens[:limit]), "length", None, limit
    return "".join(tokens), "stop", found[0][1] if found else None, len(tokens) + 1


def count_tokens(text: str) -> int:
    """Words, as the dummy counts tokens."""
    return len(_TOKEN.findall(text))
