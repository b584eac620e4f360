"""Decoders with two sides on one model: the base's rows and the toxic's in one batch, fed the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.decoding.low_rank import Switch
from models.lm.decoder import CausalDecoder, SharedPrefixDecoder, Sides
from models.lm.prefix import SharedPrefixCache


class PairedPrefixDecoder:
    """Two sides on a model whose attention reads shared prefixes; for a CPU (see `models.lm.decoder.Decoder`).

    Each side reads a prompt by itself (a prompt's many tokens fill the matrix kernels as they are), remembers its
    beginnings by itself, and has its own keys and values; every step is one forward pass for both.

    Args:
        base: A decoder on the model, new.
        toxic: Another one on the same model.
        switch: The model's (`models.decoding.low_rank.add_sides`).
    """

    def __init__(self, base: SharedPrefixDecoder, toxic: SharedPrefixDecoder, switch: Switch) -> None:
        self.base, self.toxic, self.switch = base, toxic, switch
        self.joins, self.compact_below = base.joins, base.compact_below
        self._both = SharedPrefixCache(base.layer_count)

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        with self.switch.set("base"):
            base = self.base.start(prompts, copies, longest)
        with self.switch.set("toxic"):
            return (*base, *self.toxic.start(prompts, copies, longest))

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        pools = (self.base.pool.own, self.toxic.pool.own)
        for layer, base, toxic in zip(self._both.own, *pools, strict=True):
            layer.groups = base.groups + toxic.groups
        with self.switch.set("both"):
            logits = self.base._forward(tokens.repeat(2)[:, None], self._both, self._both.positions())
        return logits[: len(tokens)], logits[len(tokens) :]

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        self.base.keep(rows)
        self.toxic.keep(rows)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self.base.reset()
        self.toxic.reset()


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
