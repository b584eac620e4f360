"""Stop strings: seen in decoded text while tokens are drawn, whatever tokens they straddle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens looked at beyond as many as the longest stop string has characters: byte-level tokens may hold part of a
# character only.
MARGIN = 8


class StopWatch:
    """Watches one request's candidates for its stop strings, and turns their tokens into text.

    Args:
        tokenizer: A transformers tokenizer.
        stop: The strings; none may be empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self._last = {text[-1] for text in self.stop}
        self._window = max(map(len, self.stop), default=0) + MARGIN
        self._may_end: dict[int, bool] = {}

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the text of `tokens` now holds a stop string; to be asked after every token."""
        if not self.stop or not self._could_complete(tokens[-1]):
            return False
        tail = self.decode(tokens[-self._window :])
        # The window may begin inside a character or a word; only the whole text decides.
        return any(text in tail for text in self.stop) and self._find(self.decode(tokens)) >= 0

    def text(self, tokens: Sequence[int], eos: frozenset[int], before: int) -> str:
        """The text of a candidate, up to its stop string or its end of turn.

        Args:
            tokens: What was drawn.
            eos: Tokens that end a turn.
            before: The prompt's last token: some tokenizers write a leading space only after another token.
        """
        kept = list(tokens[:-1] if tokens and tokens[-1] in eos else tokens)
        lead = self.decode([before])
        text = self.decode([before, *kept])
        text = text[len(lead) :] if text.startswith(lead) else self.decode(kept)
        end = self._find(text)
        return text[:end] if end >= 0 else text

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out, spaces as the tokens have them."""
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _could_complete(self, token: int) -> bool:
        """Whether a token's own text holds the last character of a stop string (or part of a character)."""
        known = self._may_end.get(token)
        if known is None:
            text = self.decode([token])
            known = self._may_end[token] = "�" in text or not self._last.isdisjoint(text)
        return known

    def _find(self, text: str) -> int:
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        return min(places, default=-1)
