"""Decoders with two sides on one model: the base's rows and the toxic's in one batch, fed the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from models.decoding.low_rank import Switch
from models.lm.decoder import CausalDecoder, SharedPrefixDecoder, Sides
from models.lm.prefix import Group, SharedPrefixCache, SharedPrefixLayer


class PairedLayer(SharedPrefixLayer):
    """A layer whose rows are twice as many as its groups': the base side's, then the toxic's.

    Inside, a row's two sides are one row of twice as many heads, so that both are attended to in the same products.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SharedPrefixLayer.update`."""
        super().update(_as_heads(key_states), _as_heads(value_states))
        return key_states, value_states

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """See `SharedPrefixLayer.attend`."""
        mask = mask if mask is None else mask[:1]  # a prompt is read alone
        return torch.cat(super().attend(_as_heads(query), mask, scaling).chunk(2, dim=2))


class PairedPrefixCache(SharedPrefixCache):
    """Prompts read by both sides, and the rows of both that continue them."""

    def __init__(self, layer_count: int) -> None:
        self.own = [PairedLayer() for _ in range(layer_count)]
        Cache.__init__(self, layers=list(self.own))

    def join_sides(self, base: SharedPrefixCache, toxic: SharedPrefixCache) -> None:
        """Append the groups of two caches that have read the same prompts; their rows come last on each side."""
        for layer, left, right in zip(self.own, base.own, toxic.own, strict=True):
            for one, other in zip(left.groups, right.groups, strict=True):
                group = Group(one.prompt_tokens)
                group.load(
                    torch.cat([one.keys, other.keys], dim=1), torch.cat([one.values, other.values], dim=1)
                )
                group.branch(one.rows, one.longest)
                layer.groups.append(group)

    def positions(self) -> torch.Tensor:
        """See `SharedPrefixCache.positions`."""
        return super().positions().repeat(2, 1)


class PairedPrefixDecoder:
    """Two sides on a model whose attention reads shared prefixes; for a CPU (see `models.lm.decoder.Decoder`).

    Each side reads a prompt by itself (a prompt's many tokens fill the matrix kernels as they are) and remembers its
    beginnings by itself; every step is one forward pass for both.

    Args:
        base: A decoder on the model, new.
        toxic: Another one on the same model.
        switch: The model's (`models.decoding.low_rank.add_sides`).
    """

    def __init__(self, base: SharedPrefixDecoder, toxic: SharedPrefixDecoder, switch: Switch) -> None:
        self.base, self.toxic, self.switch = base, toxic, switch
        self.joins, self.compact_below = base.joins, base.compact_below
        self.pool = PairedPrefixCache(base.layer_count)

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        with self.switch.set("base"):
            base = self.base.start(prompts, copies, longest)
        with self.switch.set("toxic"):
            toxic = self.toxic.start(prompts, copies, longest)
        self.pool.join_sides(self.base.pool, self.toxic.pool)
        self.base.reset()
        self.toxic.reset()
        return (*base, *toxic)

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        with self.switch.set("both"):
            logits = self.base._forward(tokens.repeat(2)[:, None], self.pool, self.pool.positions())
        return logits[: len(tokens)], logits[len(tokens) :]

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        self.pool.keep(rows)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self.base.reset()
        self.toxic.reset()
        self.pool = PairedPrefixCache(self.base.layer_count)


class PairedCausalDecoder:
    """Two sides on any transformers causal model: prompts and rows twice, the toxic side's last.

    Args:
        inner: A decoder on the model, new.
        switch: The model's (`models.decoding.low_rank.add_sides`).
    """

    def __init__(self, inner: CausalDecoder, switch: Switch) -> None:
        self.inner, self.switch = inner, switch
        self.joins, self.compact_below = inner.joins, inner.compact_below
        self._rows = 0  # of each side

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        self._rows = len(prompts) * copies
        with self.switch.set("both"):
            (logits,) = self.inner.start([*prompts, *prompts], copies, longest)
        return logits[: len(prompts)], logits[len(prompts) :]

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        with self.switch.set("both"):
            (logits,) = self.inner.step(tokens.repeat(2))
        return logits[: len(tokens)], logits[len(tokens) :]

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        self.inner.keep([*rows, *(row + self._rows for row in rows)])
        self._rows = len(rows)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self.inner.reset()


def _as_heads(states: torch.Tensor) -> torch.Tensor:
    """(2 * rows, heads, tokens, size) to (rows, 2 * heads, tokens, size)."""
    return torch.cat(states.chunk(2), dim=1)
