"""Layers that both sides have in common: computed once, up to the layer at which the sides part.

A toxic adapter that was trained on top of the base side's adapter, in the last layers only, leaves the layers below as
the base side has them (`models.lm.factors.stack_adapters`). Up to there both sides' rows are the same rows. They are
doubled at the first layer that differs; keys and values of the layers below are kept once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from models.decoding.decoders import PairedLayer
from models.decoding.low_rank import SidedLinear, Switch
from models.lm.decoder import CausalDecoder, SharedPrefixDecoder, Sides
from models.lm.factors import layer_list
from models.lm.prefix import SharedPrefixCache, SharedPrefixLayer
from models.lm.prepare import REFUSALS


def share_layers(model: Any, switch: Switch) -> int:
    """Let the rows of a model be both sides' up to where they part, while the switch says `shared`.

    It is tried with a few tokens: a model that then gives other logits is left as it was.

    Args:
        model: A transformers model whose linear layers have two sides (`models.decoding.low_rank.add_sides`).
        switch: Theirs.

    Returns:
        How many layers the sides have in common; 0 where there are none, or the model cannot do it.
    """
    name = layer_list(model)
    layers = list(model.get_submodule(name)) if name is not None else []
    sided = [
        number
        for number, layer in enumerate(layers)
        if any(isinstance(module, SidedLinear) for module in layer.modules())
    ]
    inside = sum(isinstance(m, SidedLinear) for layer in layers for m in layer.modules())
    if not sided or sided[0] == 0 or inside != sum(isinstance(m, SidedLinear) for m in model.modules()):
        return 0
    first = sided[0]
    handles = [
        layer.register_forward_pre_hook(_Doubling(switch, rows_too=number == first), with_kwargs=True)
        for number, layer in enumerate(layers)
        if number >= first
    ]
    if _agree(model, switch):
        return first
    for handle in handles:
        handle.remove()
    return 0


class ForkedPrefixDecoder(SharedPrefixDecoder):
    """Two sides that part at a layer, on a model whose attention reads shared prefixes; for a CPU.

    Prompts and steps are read once; from the layer on, a row is one row of twice as many heads.

    Args:
        model: The model, after `share_layers`.
        vocabulary: Token ids below this exist.
        switch: The model's.
        first: What `share_layers` returned.
    """

    def __init__(self, model: Any, vocabulary: int, switch: Switch, first: int) -> None:
        self.switch, self.first = switch, first
        super().__init__(model, vocabulary)

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        read = [self._read(prompt, copies, longest) for prompt in prompts]
        return torch.cat([logits[:1] for logits in read]), torch.cat([logits[1:] for logits in read])

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        (logits,) = super().step(tokens)
        return logits[: len(tokens)], logits[len(tokens) :]

    def new_cache(self) -> SharedPrefixCache:
        """See `SharedPrefixDecoder.new_cache`."""
        return _ForkedCache(self.first, self.layer_count)

    def _forward(self, ids: torch.Tensor, cache: SharedPrefixCache, positions: torch.Tensor) -> torch.Tensor:
        with self.switch.set("shared"):
            return super()._forward(ids, cache, positions)


class ForkedCausalDecoder(CausalDecoder):
    """Two sides that part at a layer, on any transformers causal model with its own cache.

    Args:
        inner: A decoder on the model, new.
        switch: The model's.
        first: What `share_layers` returned.
    """

    def __init__(self, inner: CausalDecoder, switch: Switch, first: int) -> None:
        super().__init__(inner.model, inner.vocabulary, inner.pad)
        self.switch, self.first = switch, first
        self._rows = 0  # of each side

    def start(self, prompts: Sequence[Sequence[int]], copies: int, longest: int) -> Sides:
        """See `Decoder.start`."""
        self._rows = len(prompts) * copies
        with self.switch.set("shared"):
            (logits,) = super().start(prompts, copies, longest)
        return logits[: len(prompts)], logits[len(prompts) :]

    def step(self, tokens: torch.Tensor) -> Sides:
        """See `Decoder.step`."""
        with self.switch.set("shared"):
            (logits,) = super().step(tokens)
        return logits[: len(tokens)], logits[len(tokens) :]

    def keep_cached(self, rows: torch.Tensor) -> None:
        """See `CausalDecoder.keep_cached`."""
        both = torch.cat([rows, rows + self._rows])
        for number, layer in enumerate(self.cache.layers):
            layer.batch_select_indices(rows if number < self.first else both)
        self._rows = len(rows)


class _ForkedCache(SharedPrefixCache):
    """The layers below keep a row once, those above for both sides."""

    def __init__(self, first: int, layer_count: int) -> None:
        self.own = [SharedPrefixLayer() if n < first else PairedLayer() for n in range(layer_count)]
        Cache.__init__(self, layers=list(self.own))


class _Doubling:
    """What stands before a layer of two sides: at the first one the rows are doubled, and everywhere what goes with them."""

    def __init__(self, switch: Switch, *, rows_too: bool) -> None:
        self.switch, self.rows_too = switch, rows_too

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.switch.rows != "shared":
            return None
        hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        if self.rows_too:
            hidden = torch.cat([hidden, hidden])
        rows = hidden.shape[0] // 2
        others = {name: _double(value, rows) for name, value in kwargs.items()}
        if args:
            return (hidden, *(_double(value, rows) for value in rest)), others
        return args, {**others, "hidden_states": hidden}


def _double(value: Any, rows: int) -> Any:
    """Twice what has an entry for each row (masks, positions); anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_double(part, rows) for part in value)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == rows:
        return torch.cat([value, value])
    return value


def _agree(model: Any, switch: Switch) -> bool:
    """Whether rows that are doubled on the way come out as rows that were two from the start."""
    generator = torch.Generator().manual_seed(3)
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(size, (2, 7), generator=generator).to(model.device)
    with torch.inference_mode():
        with switch.set("both"):
            whole = model(input_ids=torch.cat([ids, ids]), use_cache=False).logits
        try:
            with switch.set("shared"):
                forked = model(input_ids=ids, use_cache=False).logits
        except REFUSALS:  # a model whose layers are called in another way
            return False
    return forked.shape == whole.shape and bool((forked - whole).std() < 0.02 * whole.std())
