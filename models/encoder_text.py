"""Texts as an encoder takes them: tokenised, with their prompt, those over the limit cut or in windows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.batching import IntArray
from models.scorers.sequence import tokenize_windows
from schemas.errors import ModelError

# A longer text is tokenised in parts of so many characters, so that a book in one row stays within memory.
PART_CHARACTERS = 1_000_000
# A window's text is tokenised again behind the prompt, where its first word may fall into other pieces.
_SLACK = 2


@dataclass(frozen=True)
class Pieces:
    """What is computed for n texts.

    Attributes:
        sequences: Token ids of the windows, special tokens included, in the order of their owners.
        owner: int64: which text each window comes from.
        tokens: int64 (n,): tokens of each text whole.
        truncated: bool (n,): whether some of them are in no window.
    """

    sequences: list[Sequence[int]]
    owner: IntArray
    tokens: IntArray
    truncated: npt.NDArray[np.bool_]


def cut_pieces(
    tokenizer: Any,
    texts: Sequence[str],
    limit: int,
    lock: threading.Lock,
    *,
    prompt: str = "",
    whole: bool = True,
) -> Pieces:
    """Tokenise texts behind a prompt.

    Args:
        tokenizer: A fast tokenizer.
        texts: n texts.
        limit: Longest window, special tokens included.
        lock: Held while the tokenizer is at work.
        prompt: Put before each text.
        whole: Give a text over the limit several windows, the prompt before each; else only its beginning.

    Raises:
        ModelError: The prompt leaves no room for text.
    """
    n = len(texts)
    special = tokenizer.num_special_tokens_to_add()
    parts = [t if len(t) <= PART_CHARACTERS else t[:PART_CHARACTERS] for t in texts]
    sequences, owner = tokenize_windows(tokenizer, [prompt + p for p in parts], limit, lock, overlap=0)
    several = np.bincount(owner, minlength=n) > 1
    sizes = np.fromiter(map(len, sequences), np.int64, len(sequences)) - special
    tokens = np.bincount(owner, weights=sizes, minlength=n).astype(np.int64) + special
    huge = np.fromiter((len(t) > PART_CHARACTERS for t in texts), bool, n)
    if not whole:
        first = np.searchsorted(owner, np.arange(n))
        # Of a huge text only the first part was counted; it exceeds every limit all the same.
        return Pieces([sequences[i] for i in first], np.arange(n), tokens, several | huge)
    again = np.flatnonzero((several & bool(prompt)) | huge)
    if len(again):
        redone = {
            int(i): _windows_behind(tokenizer, texts[i], limit, lock, prompt, int(special)) for i in again
        }
        first = np.searchsorted(owner, np.arange(n + 1))
        runs = [redone.get(i) or sequences[first[i] : first[i + 1]] for i in range(n)]
        sequences = [s for run in runs for s in run]
        owner = np.repeat(np.arange(n), [len(run) for run in runs])
        for i in np.flatnonzero(huge):
            tokens[i] = sum(len(s) - special for s in redone[int(i)]) + special
    return Pieces(sequences, owner, tokens, np.zeros(n, bool))


def prompt_length(tokenizer: Any, prompt: str, lock: threading.Lock) -> int:
    """Tokens of a prompt where it stands before a text: the leading special tokens count, the trailing do not."""
    with lock:
        ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)


def _windows_behind(
    tokenizer: Any, text: str, limit: int, lock: threading.Lock, prompt: str, special: int
) -> list[Sequence[int]]:
    """Windows of one long text, each behind the prompt, cut where a token begins."""
    with lock:
        taken = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else 0
    room = limit - special - taken - (_SLACK if prompt else 0)
    if room < 1:
        raise ModelError(f"a prompt of {taken} tokens leaves no room for text: the model takes {limit}")
    bounds: list[int] = []
    for start in range(0, len(text), PART_CHARACTERS):
        part = text[start : start + PART_CHARACTERS]
        with lock:
            encoded = tokenizer(
                part,
                truncation=True,
                max_length=room,
                stride=0,
                add_special_tokens=False,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        bounds += [start + offsets[0][0] for offsets in encoded["offset_mapping"] if offsets]
    edges = [0, *bounds[1:], len(text)]
    pieces = [prompt + text[a:b] for a, b in itertools.pairwise(edges) if b > a]
    with lock:
        encoded = tokenizer(
            pieces,
            truncation=True,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
    return list(encoded["input_ids"])
