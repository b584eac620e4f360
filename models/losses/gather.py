"""Documents of all processes as negatives of each: gathered with their gradients.

Every process computes the loss of its own queries against all documents. The gradient of a gathered vector is the sum of what
all processes ask of it, so it goes back whole to the process that made it. A trainer that averages gradients over processes
(DistributedDataParallel) has to multiply the loss by their number; `PlannedTrainer` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def world_size() -> int:
    """Processes that train together; 1 where torch.distributed is not at work."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_documents(vectors: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents of all processes, each once, in the same order everywhere.

    Args:
        vectors: float (m, d), with any gradient; m may differ between processes.
        numbers: int64 (m,): names the documents, alike on all processes.

    Returns:
        Vectors float (M, d) and their numbers int64 (M,). A document several processes have is taken from the first.
    """
    if world_size() == 1:
        return vectors, numbers
    sizes = _gather(torch.tensor([len(numbers)], device=numbers.device)).tolist()
    widest = max(sizes)
    padded = torch.nn.functional.pad(numbers, (0, widest - len(numbers)), value=-1)
    every = _gather(padded)
    parts = _GatherWithGradient.apply(torch.nn.functional.pad(vectors, (0, 0, 0, widest - len(vectors))))
    there = torch.cat([torch.arange(widest, device=every.device) < n for n in sizes])
    places = torch.nonzero(there).squeeze(1)
    numbers = every[places]
    kept = places[_first_of_each(numbers)]
    return parts[kept], every[kept]


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """Places of the first occurrence of every number, ascending."""
    values, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((len(values),), len(numbers), dtype=torch.int64, device=numbers.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(numbers), device=numbers.device), reduce="amin")
    return first.sort().values


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    """Concatenates a tensor of every process; the gradient comes back summed over all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(tensor)
        return _gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        whole = gradient.contiguous().clone()
        distributed.all_reduce(whole)
        start = distributed.get_rank() * ctx.rows
        return whole[start : start + ctx.rows]
