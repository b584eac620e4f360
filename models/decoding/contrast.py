"""Where two models part along a given text, under teacher forcing: what SoCD would do there, token by token.

HSPD localises toxic words only implicitly: they stand where a toxic model and the base model disagree. Reading a text
with both shows where that is, at the cost of two forward passes and no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from models.decoding.pair import Pair
from models.decoding.socd import SoCDSettings, choose_largest_positive, compare, edit_budget
from models.protocols import FloatArray
from schemas.errors import ModelError

# Tokens read at once; longer texts are read in windows that overlap by half. Two sides' logits for a window of 512
# tokens and a vocabulary of 50,000 take 100 MB in bfloat16.
WINDOW = 512
# Positions compared at once, in float32.
CHUNK = 32


@dataclass(frozen=True)
class Contrast:
    """What two models say of the tokens of a text.

    Attributes:
        offsets: (start, end) of each token, in characters.
        alpha: Force of steering at each token, float32 of shape (tokens,), in [0, 1).
        k: Most tokens that might be edited there, int64.
        log_ratio: log(q / p) of the token that stands there, float32: positive where the toxic model prefers it.
        edited: Whether its score would be edited there, bool.
    """

    offsets: list[tuple[int, int]]
    alpha: FloatArray
    k: npt.NDArray[np.int64]
    log_ratio: FloatArray
    edited: npt.NDArray[np.bool_]

    @property
    def force(self) -> FloatArray:
        """How far `logratio` would lower each token: alpha * log(q / p) in nats, negative where the base prefers it."""
        return self.alpha * self.log_ratio


def contrast_text(
    pair: Pair, text: str, settings: SoCDSettings, start: Sequence[int] | None = None
) -> Contrast:
    """Read a text with both models of a pair.

    Args:
        pair: The models; no other thread may run them meanwhile.
        text: Of any length; over `WINDOW` tokens it is read in windows that overlap by half.
        settings: Divergence and k.
        start: Token ids the text follows (a prompt); None is the tokenizer's beginning (or else end) token.

    Raises:
        ModelError: The tokenizer cannot give offsets or has no token to begin with; `start` leaves no room.
    """
    tokenizer = pair.base.tokenizer
    if not tokenizer.is_fast:
        raise ModelError("spans need a fast tokenizer (tokenizer.json), which this model lacks")
    if start is None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ModelError(
                "spans need a tokenizer with a beginning or an end token, to predict the first token from"
            )
        start = [first]
    room = min(WINDOW, pair.base.context_limit - len(start) + 1)
    if room < 2:
        raise ModelError(f"a prompt of {len(start)} tokens leaves no room for the text")
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,  # as in a prompt: no text ends a turn
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    found: list[tuple[torch.Tensor, ...]] = []
    done = 0
    while done < len(ids):
        begin = max(0, done - room // 2)
        end = min(len(ids), begin + room)
        s, z = pair.logits([*start, *ids[begin : end - 1]], end - done)
        targets = torch.tensor(ids[done:end], device=s.device)
        for i in range(0, len(targets), CHUNK):
            part = slice(i, i + CHUNK)
            found.append(_at_tokens(s[part], z[part], targets[part], settings))
        done = end
    if not found:
        return Contrast(offsets, *_NOTHING)
    alpha, k, ratio, edited = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
    return Contrast(offsets, alpha.astype(np.float32), k, ratio, edited)


_NOTHING = (np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.bool_))


def _at_tokens(
    s: torch.Tensor, z: torch.Tensor, tokens: torch.Tensor, settings: SoCDSettings
) -> tuple[torch.Tensor, ...]:
    """alpha, k, log(q / p) and whether it is edited, of the tokens that follow each row's prefix."""
    _, alpha, d = compare(s.float(), z.float(), settings.divergence)
    k = edit_budget(alpha, d.shape[-1], settings)
    place = tokens[:, None]
    edited = choose_largest_positive(d, k).gather(1, place)[:, 0].bool() & (alpha > 0)
    return alpha, k, d.gather(1, place)[:, 0], edited
