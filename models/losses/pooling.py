"""Pooling over ragged sets given as masks: exact, and with gradients that are finite where a set is empty.

Everything is computed in float32 at least. Absent elements are minus infinity inside, never a large negative number: one of
those becomes a large loss where a row has nothing else.
"""

from __future__ import annotations

import torch

INFINITY = float("inf")


def at_least_float32(scores: torch.Tensor) -> torch.Tensor:
    """Half-precision scores as float32; float32 and float64 as they are."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def masked_logsumexp(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log of the sum of e^s over the elements of each row's set.

    Args:
        scores: float (b, m).
        mask: bool (b, m): which elements the set has.

    Returns:
        float (b,); minus infinity for an empty set, with a gradient of zero.
    """
    filled, there = _filled(scores, mask)
    return torch.where(there, torch.logsumexp(filled, dim=-1), -INFINITY)


def masked_max(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest element of each row's set, float (b,); minus infinity for an empty set."""
    filled, there = _filled(scores, mask)
    return torch.where(there, filled.amax(dim=-1), -INFINITY)


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over each row's set, float (b,); what stands outside, even infinity, has no part in it."""
    return values.masked_fill(~mask, 0.0).sum(dim=-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over each row's set, float (b,); 0 for an empty one."""
    return masked_sum(values, mask) / mask.sum(dim=-1).clamp(min=1)


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The variance over each row's set (divided by its size), float (b,)."""
    return masked_mean((values - masked_mean(values, mask)[..., None]) ** 2, mask)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x), exact in every precision (torch's own is linear above 20); 0 at minus infinity."""
    # Where x is minus infinity the value is 0 whatever else is going on: no gradient passes.
    finite = x > -INFINITY
    safe = torch.where(finite, x, 0.0)
    return torch.where(finite, torch.logaddexp(safe, torch.zeros_like(safe)), 0.0)


def _filled(scores: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with minus infinity outside the set (zeros where the set is empty: infinity has no gradient)."""
    there = mask.any(dim=-1)
    outside = ~mask & there[..., None]
    return scores.masked_fill(~mask, 0.0).masked_fill(outside, -INFINITY), there
