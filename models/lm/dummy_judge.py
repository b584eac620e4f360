"""What the dummy server says as a judge: its opinion is how many words of the query a passage holds, and nothing else.

It answers in whatever form it is asked for: a JSON schema, log-probabilities of the next token, a list, or a word. As a
reader it gives back the passages it was given, so its answer is right where one of them holds it.
"""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

_QUERY = re.compile(r"^(?:Query|Question):[ \t]*(.+)$", re.MULTILINE | re.IGNORECASE)
_PASSAGE = re.compile(r"^Passage:[ \t]*(.+?)(?:\n\n|\Z)", re.MULTILINE | re.IGNORECASE | re.DOTALL)
# A passage of a list, shown in a turn of its own.
_SHOWN = re.compile(r"\[(\d+)\] (.*)", re.DOTALL)
_WORD = re.compile(r"\w+")
# The least likely of what it names as next tokens.
_UNLIKELY = -9.0


def opinion(messages: list[dict[str, Any]]) -> float:
    """How relevant the passage is, in [0, 1]: the share of the query's words that it holds."""
    text = "\n\n".join(m["content"] for m in messages)
    query, passage = _QUERY.search(text), _PASSAGE.search(text)
    if query is None or passage is None:
        return 0.0
    return _overlap(query[1], passage[1])


def grade(share: float) -> int:
    """A grade of 0 to 3."""
    return min(3, int(share * 4))


def judge(messages: list[dict[str, Any]], schema: dict[str, Any] | None) -> str:
    """The answer, in the form that is asked for."""
    share = opinion(messages)
    asks = [m["content"] for m in messages if m["role"] == "user"]
    shown = {int(m[1]): m[2] for m in map(_SHOWN.fullmatch, asks) if m}
    if shown and len(asks) > 1:
        return _list(messages, shown, schema)
    if schema is not None:
        return json.dumps(_fill(schema, share))
    passages, question, _ = f"\n{asks[-1]}".rpartition("\nQuestion: ")
    if question:
        return passages.strip() or "I do not know"
    asked = messages[-1]["content"].lower()
    if "yes or no" in "\n".join(m["content"] for m in messages).lower() or "relevant?" in asked:
        return "Yes" if share > 0.5 else "No"
    return str(grade(share))


def noise(draw: random.Random) -> str:
    """What nobody can read."""
    return " ".join(
        "".join(draw.choices("abcdefghij#%&", k=draw.randint(1, 9))) for _ in range(draw.randint(3, 12))
    )


def top_tokens(messages: list[dict[str, Any]], count: int, *, sense: bool) -> list[dict[str, Any]]:
    """The likeliest next tokens with their log-probabilities: yes, no and the digits; or noise."""
    if not sense:
        return [{"token": t, "logprob": -1.0 - i} for i, t in enumerate(("#", "qz", "%%"))][:count]
    share = opinion(messages)
    weights = {"Yes": 0.05 + 0.8 * share, " yes": 0.02, "No": 0.05 + 0.8 * (1 - share)}
    weights |= {str(g): math.exp(-abs(3 * share - g)) / 4 for g in range(4)}
    total = sum(weights.values()) * 1.01
    ranked = sorted(((math.log(w / total), t) for t, w in weights.items()), reverse=True)
    return [{"token": t, "logprob": max(_UNLIKELY, v)} for v, t in ranked][:count]


def _overlap(query: str, passage: str) -> float:
    wanted = set(_WORD.findall(query.lower()))
    return len(wanted & set(_WORD.findall(passage.lower()))) / max(1, len(wanted))


def _list(messages: list[dict[str, Any]], shown: dict[int, str], schema: dict[str, Any] | None) -> str:
    """Passages that hold more than half of the query's words, or all of them by how many they hold."""
    query = _QUERY.search("\n\n".join(m["content"] for m in messages))
    shares = {number: _overlap(query[1] if query else "", text) for number, text in shown.items()}
    ranked = sorted(shares, key=lambda number: (-shares[number], number))
    if ranking := "with > between" in messages[-1]["content"] or "ranking" in (schema or {}).get(
        "properties", {}
    ):
        chosen = ranked
    else:
        chosen = [number for number in sorted(shares) if shares[number] > 0.5]
    if schema is not None:
        return json.dumps(dict.fromkeys(schema.get("properties", {}), chosen))
    return (" > " if ranking else ", ").join(f"[{number}]" for number in chosen) or "none"


def _fill(schema: dict[str, Any], share: float) -> Any:
    """The simplest thing a JSON schema allows that says the opinion."""
    if "enum" in schema:
        values = schema["enum"]
        return values[min(len(values) - 1, int(share * len(values)))]
    kind = schema.get("type")
    if kind == "object":
        return {name: _fill(part, share) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [1] if share > 0.5 else []
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", 0), schema.get("maximum", 3)
        return low + min(high - low, int(share * (high - low + 1)))
    return share > 0.5 if kind == "boolean" else f"{100 * share:.0f} % of the query's words are there"
