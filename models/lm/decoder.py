"""Decoders: what runs a model forward, one token a row at a time, for the sampling loop.

The loop (`models.lm.sampling`) knows no model. It asks a decoder to read prompts once, to go on with several rows for
each, and to let finished rows go. A decoder may offer more than one side: the logits of a second model, or of a second
adapter on the same base, for the same tokens; what to make of the sides is the loop's hook's business.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from models.lm.prefix import SharedPrefixCache

Sides = tuple[torch.Tensor, ...]


class Decoder(Protocol):
    """Reads prompts, then extends rows; not thread-safe by itself.

    Attributes:
        joins: Whether prompts may be started while rows of others are being extended; their rows come last.
        compact_below: The share of rows still wanted at or below which letting the others go is worth its cost.
    """

    joins: bool
    compact_below: float

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """Read every prompt once, and append `copies` rows of each (rows of one prompt lie together).

        Args:
            prompts: Token ids, at least one each.
            copies: Rows for each prompt.
            longest: Most tokens any row will be extended by.

        Returns:
            Next-token logits for each side, shape (len(prompts), vocabulary): one row a *prompt*.
        """
        ...

    def step(self, tokens: torch.Tensor) -> Sides:
        """Extend each row by one token, int64 of shape (rows,); returns (rows, vocabulary) logits for each side."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows listed only: new row i is what row `rows[i]` was; prompts stay in their order."""
        ...

    def reset(self) -> None:
        """Forget all rows; what a generation that was broken off has left."""
        ...


class Lockstep:
    """Several decoders fed the same tokens; their sides come one after the other.

    The first one's logits are the base scores. All must share one tokenizer; sides are cut to the shortest vocabulary.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.decoders = tuple(decoders)
        self.joins = all(decoder.joins for decoder in self.decoders)
        self.compact_below = min(decoder.compact_below for decoder in self.decoders)

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        return _level([decoder.start(prompts, copies, longest) for decoder in self.decoders])

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        return _level([decoder.step(tokens) for decoder in self.decoders])

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        for decoder in self.decoders:
            decoder.keep(rows)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        for decoder in self.decoders:
            decoder.reset()


class CausalDecoder:
    """Any transformers causal model with its own cache; prompts of different lengths are padded on the left.

    Padding is masked and positions are counted from each prompt's own first token, so that it changes nothing but
    the last bits of floating-point sums. Prompts of one length need neither.
    """

    joins = False
    # Every layer's cache is copied when rows leave: do it when a third of the work is for nothing.
    compact_below = 0.67

    def __init__(self, model: Any, vocabulary: int, pad: int = 0) -> None:
        self.model, self.vocabulary, self.pad = model, vocabulary, pad
        self.device = model.device
        self._keep_last = accepts_logits_to_keep(model)
        self.cache: Any = None
        self.mask: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad, dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            real[row, width - len(prompt) :] = 1
        ids, real = ids.to(self.device), real.to(self.device)
        self.mask = self.positions = None
        extra: dict[str, torch.Tensor] = {}
        if len({len(prompt) for prompt in prompts}) > 1:
            positions = (real.cumsum(1) - 1).clamp(min=0)
            extra = {"attention_mask": real, "position_ids": positions}
            self.mask = real.repeat_interleave(copies, 0)
            self.positions = positions[:, -1:].repeat_interleave(copies, 0)
        out = self.model(input_ids=ids, use_cache=True, **self._last(), **extra)
        self.cache = out.past_key_values
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
        return (out.logits[:, -1, : self.vocabulary],)

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        extra: dict[str, torch.Tensor] = {}
        if self.mask is not None and self.positions is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
            self.positions = self.positions + 1
            extra = {"attention_mask": self.mask, "position_ids": self.positions}
        out = self.model(
            input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True, **self._last(), **extra
        )
        return (out.logits[:, -1, : self.vocabulary],)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        indices = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.keep_cached(indices)
        if self.mask is not None and self.positions is not None:
            self.mask, self.positions = self.mask[indices], self.positions[indices]

    def keep_cached(self, rows: torch.Tensor) -> None:
        """Go on with these rows of every layer's keys and values, int64 of shape (rows,)."""
        self.cache.batch_select_indices(rows)

    def reset(self) -> None:
        """See `Decoder.reset`."""
        self.cache = self.mask = self.positions = None

    def _last(self) -> dict[str, int]:
        return {"logits_to_keep": 1} if self._keep_last else {}


class SharedPrefixDecoder:
    """Keys and values of a prompt kept once for all its rows (see `models.lm.prefix`); for a CPU.

    A prompt is read alone, in pieces that end at fixed places (64, 128, 256, ... tokens), and what the last few
    prompts computed up to such a place is used again where a new prompt begins with the same tokens, as prompts made
    from one template do. The places are fixed so that a result never depends on what was read before: a piece is
    computed from the same numbers in the same shapes whether it is found or not.

    Args:
        model: A transformers causal model that `models.lm.prepare` has accepted.
        vocabulary: Token ids below this exist.
        first_place: Where the first piece of a prompt ends.
    """

    joins = True
    compact_below = 1.0  # a row leaves by moving one other: always worth it
    REMEMBERED = 4  # prompts
    LONGEST_REMEMBERED = 1024  # tokens of each

    def __init__(self, model: Any, vocabulary: int, first_place: int = 64) -> None:
        self.model, self.vocabulary, self.first_place = model, vocabulary, first_place
        self.layer_count = model.config.get_text_config(decoder=True).num_hidden_layers
        self.pool = self.new_cache()
        # What each layer computed for the last few prompts: (keys, values) pairs, by token ids.
        self._recent: OrderedDict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        return (torch.cat([self._read(prompt, copies, longest) for prompt in prompts]),)

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        return (self._forward(tokens[:, None], self.pool, self.pool.positions()),)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Decoder.keep`."""
        self.pool.keep(rows)

    def reset(self) -> None:
        """See `Decoder.reset`; prompts read before stay remembered."""
        self.pool = self.new_cache()

    def new_cache(self) -> SharedPrefixCache:
        """An empty cache for the model's layers."""
        return SharedPrefixCache(self.layer_count)

    def _read(self, prompt: Sequence[int], copies: int, longest: int) -> torch.Tensor:
        cache = self.new_cache()
        cache.begin(len(prompt))
        known = self._load_known(prompt, cache)
        ids = torch.tensor([list(prompt)])
        places = [place for place in fixed_places(len(prompt), self.first_place) if place > known]
        for begin, end in zip([known, *places[:-1]], places, strict=True):
            logits = self._forward(ids[:, begin:end], cache, torch.arange(begin, end)[None])
        self._remember(prompt, cache)
        cache.branch(copies, longest)
        self.pool.join(cache)
        return logits

    def _forward(self, ids: torch.Tensor, cache: SharedPrefixCache, positions: torch.Tensor) -> torch.Tensor:
        # The cache goes in twice: as the cache, and by our own name through to the attention function.
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            shared_prefix=cache,
        )
        logits: torch.Tensor = out.logits[:, -1, : self.vocabulary]
        return logits

    def _load_known(self, prompt: Sequence[int], cache: SharedPrefixCache) -> int:
        """Fill a new cache with what a recent prompt shares, up to a fixed place; returns how many tokens."""
        best, source = 0, None
        for tokens in self._recent:
            shared = _common_prefix(tokens, prompt)
            # At least the last token is always read anew: its logits are needed.
            places = fixed_places(len(prompt), self.first_place)[:-1]
            place = max((p for p in places if p <= shared), default=0)
            # A place must have been the end of a piece there too.
            if place > best and place in fixed_places(len(tokens), self.first_place)[:-1]:
                best, source = place, tokens
        if source is None:
            return 0
        self._recent.move_to_end(source)
        for layer, (keys, values) in zip(cache.own, self._recent[source], strict=True):
            layer.groups[0].load(keys[:, :, :best], values[:, :, :best])
        return best

    def _remember(self, prompt: Sequence[int], cache: SharedPrefixCache) -> None:
        if self.first_place < len(prompt) <= self.LONGEST_REMEMBERED:
            self._recent[tuple(prompt)] = [
                (layer.groups[0].keys, layer.groups[0].values) for layer in cache.own
            ]
            self._recent.move_to_end(tuple(prompt))
            while len(self._recent) > self.REMEMBERED:
                self._recent.popitem(last=False)


def fixed_places(length: int, first: int) -> list[int]:
    """Where the pieces of a prompt end: `first`, then doubling, and the prompt's own end."""
    places = []
    place = first
    while place < length:
        places.append(place)
        place *= 2
    return [*places, length]


def accepts_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute the last position's logits alone (a prompt's others cost more than its layers)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _level(sides: Sequence[Sides]) -> Sides:
    flat = [side for group in sides for side in group]
    shortest = min(side.shape[-1] for side in flat)
    return tuple(side[..., :shortest] for side in flat)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
