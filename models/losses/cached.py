"""Large batches in the memory of small ones: texts are encoded in chunks, and encoded again when their gradient is due.

This is GradCache (L. Gao et al. 2021, arXiv 2101.06983): of the first pass only the vectors are kept, the loss is computed over
all of them, and each chunk's activations exist only while its own gradient is computed. torch's checkpointing at the edge of a
chunk does exactly that, random numbers (dropout) and autocast included, and works under any trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def encode_chunks(
    encode: Callable[..., torch.Tensor], chunks: Sequence[tuple[Any, ...]], *, cached: bool
) -> torch.Tensor:
    """Encode chunks one after another.

    Args:
        encode: Makes vectors float (n, d) of a chunk's tensors.
        chunks: Arguments of `encode`, a tuple a chunk; at least one.
        cached: Keep only the vectors, and encode again in the backward pass: memory of one chunk, a third more time.

    Returns:
        float (sum of n, d). Gradients are those of one pass over everything.
    """
    if cached and torch.is_grad_enabled():
        parts = [checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [encode(*chunk) for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
