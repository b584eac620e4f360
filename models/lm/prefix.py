"""A key/value cache for many continuations of one prompt, and the attention that reads it.

The candidates of a request share their prompt, so its keys and values are kept once, not once a candidate: all
candidates' queries meet the prompt in one matrix product, and only what each has written itself is attended to row
by row (the decomposition of Hydragen, Juravsky et al. 2024, arXiv 2402.05099, in one softmax). New keys are written
in place, and a finished candidate leaves by moving one row: nothing is concatenated at any step. Several prompts, each with its own
rows, may be extended together; each is attended to apart, so what one gives does not depend on the others.

Keys, values and attention are float32 whatever the model's dtype: at one query a row the sizes change at every step,
and bfloat16 kernels would be compiled anew each time (1 ms a layer, measured), where float32 ones are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

NAME = "tamis_shared_prefix"  # as transformers knows the attention function
FIRST_ROOM = 64  # tokens a suffix buffer holds at first; doubled when full


class Group:
    """One layer's keys and values for one prompt (kept once), and for each row that continues it.

    Args:
        prompt_tokens: Length of the prompt.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.filled = 0  # of the prompt
        self.written = 0  # of each row's own
        self.rows = 1
        self.branched = False
        self.longest = 0

    def load(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append keys and values of the prompt, (1, heads, tokens, size) of any dtype."""
        if self.filled == 0:
            shape = (1, keys.shape[1], self.prompt_tokens)
            self.keys = torch.empty(*shape, keys.shape[3])
            self.values = torch.empty(*shape, values.shape[3])
        end = self.filled + keys.shape[2]
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end

    def branch(self, rows: int, longest: int) -> None:
        """End the prompt, and begin `rows` continuations of at most `longest` tokens."""
        self.rows, self.longest, self.branched = rows, longest, True
        self.prompt_keys = self.keys[0].transpose(1, 2).contiguous()  # (heads, size, tokens)
        self.prompt_values = self.values[0]
        heads, room = self.keys.shape[1], min(FIRST_ROOM, longest)
        self.own_keys = torch.empty(rows, heads, room, self.keys.shape[3])
        self.own_values = torch.empty(rows, heads, room, self.values.shape[3])

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append one token's keys and values to each row, (rows, heads, 1, size)."""
        if self.written == self.own_keys.shape[2]:
            room = min(self.longest, 2 * self.written) - self.written
            self.own_keys = functional.pad(self.own_keys[: self.rows], (0, 0, 0, room))
            self.own_values = functional.pad(self.own_values[: self.rows], (0, 0, 0, room))
        self.own_keys[: self.rows, :, self.written] = keys[:, :, 0]
        self.own_values[: self.rows, :, self.written] = values[:, :, 0]
        self.written += 1

    def keep(self, moved: torch.Tensor, sources: torch.Tensor, rows: int) -> None:
        """Go on with `rows` rows, of which those numbered `moved` take the place of `sources`."""
        if moved.numel():
            self.own_keys[moved, :, : self.written] = self.own_keys[sources, :, : self.written]
            self.own_values[moved, :, : self.written] = self.own_values[sources, :, : self.written]
        self.rows = rows

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attend with (rows, query heads, tokens, size) queries; returns (rows, tokens, query heads, size)."""
        if self.branched:
            return self._attend_rows(query, scaling).to(query.dtype)
        out = functional.scaled_dot_product_attention(
            query.float(),
            self.keys[:, :, : self.filled],
            self.values[:, :, : self.filled],
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != self.keys.shape[1],
        )
        return out.transpose(1, 2).to(query.dtype)

    def _attend_rows(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """One query a row: the prompt in one product for all rows, then each row's own tokens."""
        rows, query_heads, _, size = query.shape
        heads, prompt, written = self.keys.shape[1], self.filled, self.written
        group = query_heads // heads
        scaled = (query * scaling).float().view(rows, heads, group, size)
        by_head = scaled.transpose(0, 1).reshape(heads, rows * group, size)
        scores = torch.empty(rows, heads, group, prompt + written)
        to_prompt = torch.bmm(by_head, self.prompt_keys).view(heads, rows, group, prompt)
        scores[..., :prompt] = to_prompt.transpose(0, 1)
        own_keys = self.own_keys[:rows, :, :written].flatten(0, 1)
        own_values = self.own_values[:rows, :, :written].flatten(0, 1)
        by_row = scaled.view(rows * heads, group, size)
        scores[..., prompt:] = torch.bmm(by_row, own_keys.transpose(1, 2)).view(rows, heads, group, written)
        weights = torch.softmax(scores, dim=-1)
        of_prompt = weights[..., :prompt].transpose(0, 1).reshape(heads, rows * group, prompt)
        out = torch.bmm(of_prompt, self.prompt_values).view(heads, rows, group, -1).transpose(0, 1)
        of_own = weights[..., prompt:].reshape(rows * heads, group, written)
        out = out + torch.bmm(of_own, own_values).view(rows, heads, group, -1)
        return out.reshape(rows, 1, query_heads, -1)


class SharedPrefixLayer(CacheLayerMixin):
    """One layer's groups: a prompt being read, or several prompts with the rows that continue them."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[Group] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: groups allocate what they need."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values, (rows, heads, tokens, size); the attention function reads the groups itself."""
        if not self.groups[0].branched:
            self.groups[0].load(key_states, value_states)
            return key_states, value_states
        start = 0
        for group in self.groups:
            end = start + group.rows
            group.write(key_states[start:end], value_states[start:end])
            start = end
        return key_states, value_states

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attend with all groups' queries; see `Group.attend`."""
        if len(self.groups) == 1:
            return self.groups[0].attend(query, mask, scaling)
        parts = torch.split(query, [group.rows for group in self.groups])
        return torch.cat(
            [group.attend(part, mask, scaling) for group, part in zip(self.groups, parts, strict=True)]
        )

    def get_seq_length(self) -> int:
        """Tokens seen so far by the first group's rows."""
        return self.groups[0].filled + self.groups[0].written if self.groups else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys once `query_length` more have come."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


class SharedPrefixCache(Cache):
    """The layers of a model; begins empty."""

    def __init__(self, layer_count: int) -> None:
        self.own = [SharedPrefixLayer() for _ in range(layer_count)]
        super().__init__(layers=list(self.own))

    def begin(self, prompt_tokens: int) -> None:
        """Begin to read one prompt."""
        for layer in self.own:
            layer.groups = [Group(prompt_tokens)]

    def branch(self, rows: int, longest: int) -> None:
        """End the prompt, and begin `rows` continuations of at most `longest` tokens."""
        for layer in self.own:
            layer.groups[0].branch(rows, longest)

    def join(self, other: SharedPrefixCache) -> None:
        """Append the groups of another cache; their rows come last."""
        for layer, joining in zip(self.own, other.own, strict=True):
            layer.groups += joining.groups

    def positions(self) -> torch.Tensor:
        """Position of each row's next token, int64 of shape (rows, 1)."""
        groups = self.own[0].groups
        return torch.tensor([g.filled + g.written for g in groups for _ in range(g.rows)])[:, None]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows listed: new row i is what row `rows[i]` was; rows stay with their group."""
        start = 0
        plans: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        for group in self.own[0].groups:
            own = [row - start for row in rows if start <= row < start + group.rows]
            moved = [new for new, old in enumerate(own) if new != old]
            sources = [own[new] for new in moved]
            plans.append(
                (torch.tensor(moved, dtype=torch.long), torch.tensor(sources, dtype=torch.long), len(own))
            )
            start += group.rows
        for layer in self.own:
            for group, (targets, origins, count) in zip(layer.groups, plans, strict=True):
                group.keep(targets, origins, count)
            layer.groups = [group for group in layer.groups if group.rows]


def register() -> None:
    """Make the attention known to transformers under `NAME`; without a shared cache it is plain `sdpa`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        shared_prefix: SharedPrefixCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if shared_prefix is None:
            out, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
            return out, None
        if kwargs.get("sliding_window") is not None or kwargs.get("softcap") is not None:
            raise NotImplementedError("sliding windows and capped scores are not read from a shared prefix")
        layer = shared_prefix.own[int(module.layer_idx)]  # type: ignore[arg-type]
        mask = attention_mask if query.shape[2] > 1 else None
        return layer.attend(query, mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
