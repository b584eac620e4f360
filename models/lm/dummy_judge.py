"""What the dummy server says as a judge: its opinion is how many words of the query a passage holds, and nothing else.

It answers in whatever form it is asked for: a JSON schema, log-probabilities of the next token, or a word.
"""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

_QUERY = re.compile(r"^(?:Query|Question):[ \t]*(.+)$", re.MULTILINE | re.IGNORECASE)
_PASSAGE = re.compile(r"^Passage:[ \t]*(.+?)(?:\n\n|\Z)", re.MULTILINE | re.IGNORECASE | re.DOTALL)
_WORD = re.compile(r"\w+")
# The least likely of what it names as next tokens.
_UNLIKELY = -9.0


def opinion(messages: list[dict[str, Any]]) -> float:
    """How relevant the passage is, in [0, 1]: the share of the query's words that it holds."""
    text = "\n\n".join(m["content"] for m in messages)
    query, passage = _QUERY.search(text), _PASSAGE.search(text)
    if query is None or passage is None:
        return 0.0
    wanted = set(_WORD.findall(query[1].lower()))
    return len(wanted & set(_WORD.findall(passage[1].lower()))) / max(1, len(wanted))


def grade(share: float) -> int:
    """A grade of 0 to 3."""
    return min(3, int(share * 4))


def judge(messages: list[dict[str, Any]], schema: dict[str, Any] | None) -> str:
    """The answer, in the form that is asked for."""
    share = opinion(messages)
    if schema is not None:
        return json.dumps(_fill(schema, share))
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
