"""Preparing a loaded model for decoding on a CPU, and finding out what may be relied on afterwards.

Models differ in what they ask of their attention (windows, caps, biases, caches of other kinds), and machines in what
their matrix kernels do with different numbers of rows. Rather than list either, a few tokens are run in different ways
and compared, once at loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.lm import packed, prefix
from models.lm.decoder import CausalDecoder, SharedPrefixDecoder

# Rows at which the kernels are compared: one, a few, past the size from which prompts are padded, and full batches.
ROWS = (1, 2, 5, 11, 17, 33, 64, 128)
# What may go wrong in a model that was not written for our attention function.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, IndexError)


@dataclass(frozen=True)
class Prepared:
    """What a model can do after preparation.

    Attributes:
        shared: Its attention reads shared prefixes; `SharedPrefixDecoder` may be used.
        exact: A request's results are the same bits whatever other requests are in the batch.
    """

    shared: bool
    exact: bool


def prepare(model: Any, vocabulary: int) -> Prepared:
    """Pack a model's linear layers and let its attention read shared prefixes, where both give what they should.

    Args:
        model: A transformers causal model on a CPU, in evaluation mode; changed in place.
        vocabulary: Token ids below this exist.
    """
    if packed.can_pack(model.dtype):
        packed.pack_linears(model)
    implementation = model.config._attn_implementation
    prompts, written = _probe_tokens(vocabulary)
    with torch.inference_mode():
        plain = _continue(CausalDecoder(model, vocabulary), prompts[:1], written)
        try:
            prefix.register()
            model.set_attn_implementation(prefix.NAME)
            alone = _continue(SharedPrefixDecoder(model, vocabulary, first_place=4), prompts[:1], written)
        except REFUSALS:
            alone = torch.zeros(1)
        # In bfloat16 two right ways differ by a few percent of the logits' spread; a wrong mask or window by all of it.
        if alone.shape != plain.shape or not bool((alone - plain).std() < 0.1 * plain.std()):
            model.set_attn_implementation(implementation)
            return Prepared(shared=False, exact=False)
        beside = _continue(SharedPrefixDecoder(model, vocabulary, first_place=4), prompts, written)
        return Prepared(shared=True, exact=torch.equal(alone, beside) and _rows_are_independent(model))


def _probe_tokens(vocabulary: int) -> tuple[list[list[int]], torch.Tensor]:
    """Two prompts and what continues them: (step, row) token ids."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (9, 7)]
    return prompts, torch.randint(vocabulary, (3, 2), generator=generator)


def _continue(
    decoder: CausalDecoder | SharedPrefixDecoder, prompts: Sequence[list[int]], written: torch.Tensor
) -> torch.Tensor:
    """The first prompt's logits, after it and after each step of its rows; one row leaves on the way.

    Where there are more prompts, they are started beside the first one, and two of their rows stay to the end.
    """
    rows = written.shape[1]
    logits = [decoder.start(prompts[:1], rows, len(written))[0]]
    for prompt in prompts[1:]:
        decoder.start([prompt], 2, len(written))
    others = torch.arange(2 * len(prompts[1:]))
    for number, tokens in enumerate(written):
        if number == 2:
            decoder.keep([1, *range(rows, rows + len(others))])
            tokens = tokens[1:]
        (step,) = decoder.step(torch.cat([tokens, others]))
        logits.append(step[: len(tokens)])
    return torch.cat(logits).float()


def _rows_are_independent(model: Any) -> bool:
    """Whether each linear layer gives a row the same bits whatever number of rows it is computed with."""
    seen = set()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if not isinstance(module, (torch.nn.Linear, packed.PackedLinear)):
            continue
        kind = (module.in_features, module.out_features, module.weight.dtype)  # adapters may keep float32
        if kind in seen:
            continue
        seen.add(kind)
        rows = torch.randn(max(ROWS), module.in_features, generator=generator).to(module.weight.dtype)
        whole = module(rows)
        if not all(torch.equal(module(rows[-count:].contiguous()), whole[-count:]) for count in ROWS):
            return False
    return True
