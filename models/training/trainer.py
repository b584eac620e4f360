"""The causal trainer: the loss over planned batches, and the masks that keep packed examples apart.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
import transformers

from models.training.collate import IGNORE, PAD_SEGMENT, block_mask
from models.training.planned import COMPLETE, PlannedTrainer, Progress, checkpoints, clock, remove_partial
from schemas.errors import ModelError

__all__ = [
    "COMPLETE",
    "CausalTrainer",
    "Progress",
    "attention_mask",
    "check_isolation",
    "checkpoints",
    "clock",
    "remove_partial",
    "selects_logits",
]


class CausalTrainer(PlannedTrainer):
    """Trains a causal language model on planned batches.

    The loss is the cross entropy (nats) summed over the tokens that carry it and divided by their number in the whole
    step, accumulation and devices included. Logits are computed for those tokens only.

    Args:
        model: A causal language model, or a PEFT model around one.
        args: Trainer arguments; `output_dir` holds the checkpoints.
        **options: As `PlannedTrainer`.
    """

    def __init__(self, model: Any, args: transformers.TrainingArguments, **options: Any) -> None:
        super().__init__(model, args, **options)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._selects_logits = selects_logits(base)
        self._attention = getattr(base.config, "_attn_implementation", "sdpa")

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """Tokens that carry the loss."""
        carried: torch.Tensor = batch["shift_labels"] != IGNORE
        return carried.sum()

    def count_tokens(self, batch: dict[str, Any]) -> int:
        """Tokens of the rows."""
        return int((batch["segments"] != PAD_SEGMENT).sum())

    def describe_loss(self, loss: float, items: float) -> dict[str, float]:
        """Perplexity, and the number of tokens the loss (nats per token) is a mean of."""
        return {"perplexity": math.exp(min(loss, 700.0)), "tokens": items}

    def summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Cross entropy of the tokens that carry the loss."""
        labels, segments = inputs["shift_labels"], inputs["segments"]
        keep = labels != IGNORE
        arguments: dict[str, Any] = {
            "input_ids": inputs["input_ids"],
            "position_ids": inputs["position_ids"],
            "attention_mask": attention_mask(segments, self._attention, next(model.parameters()).dtype),
            "use_cache": False,
        }
        if self._selects_logits:
            arguments["logits_to_keep"] = keep
        outputs = model(**arguments)
        logits = outputs.logits
        if logits.ndim == 3:
            logits = logits[keep]
        total = torch.nn.functional.cross_entropy(logits.float(), labels[keep], reduction="sum")
        return total, keep.sum(), outputs


def attention_mask(segments: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor | None:
    """The smallest mask that does: none, padding only (b, t), or by block (b, 1, t, t).

    Args:
        segments: int64 tensor of shape (b, t), as `Collator` makes it.
        implementation: The model's attention (`sdpa`, `eager`); eager adds its mask to the scores.
        dtype: Of the model, for eager.
    """
    real = segments != PAD_SEGMENT
    if bool((segments[real] == 1).all()):
        return None if bool(real.all()) else real.long()
    mask: torch.Tensor = block_mask(segments)
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )
    return mask


def selects_logits(model: Any) -> bool:
    """Whether the model's forward takes a boolean (b, t) `logits_to_keep` (transformers 5.2x and later)."""
    module = sys.modules.get(type(model).__module__)
    return (
        hasattr(module, "slice_logits_to_keep")
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    )


def check_isolation(model: Any, max_length: int) -> None:
    """Make sure that packed examples cannot see one another in this model.

    State-space layers and convolutions ignore a block mask; so it is tried: an example's logits must not change with
    what stands before it in its row. (Attention with a window ignores its window under a mask of ours.)

    Args:
        model: The model to train.
        max_length: Most tokens of a row.

    Raises:
        ModelError: They do.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    window = getattr(base.config.get_text_config(), "sliding_window", None)
    if window and window < max_length:
        raise ModelError(
            f"{type(base).__name__} attends within a window of {window} tokens, which packing would undo; "
            f"pass --packing off, or --max-length {window}"
        )
    vocabulary = int(base.config.get_text_config().vocab_size)
    ids = torch.arange(24).remainder(vocabulary)[None]
    segments = torch.tensor([[1] * 16 + [2] * 8])
    positions = torch.cat([torch.arange(16), torch.arange(8)])[None]
    device = next(base.parameters()).device
    implementation = getattr(base.config, "_attn_implementation", "sdpa")
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            mask = attention_mask(segments, implementation, next(base.parameters()).dtype)
            packed = base(
                input_ids=ids.to(device), position_ids=positions.to(device),
                attention_mask=None if mask is None else mask.to(device), use_cache=False,
            ).logits[0, 16:]  # fmt: skip
            alone = base(input_ids=ids[:, 16:].to(device), use_cache=False).logits[0]
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise ModelError(
            f"{type(base).__name__} takes no block mask ({str(error).splitlines()[0][:120]}); pass --packing off"
        ) from error
    finally:
        base.train(was_training)
    scale = float(alone.abs().max()) or 1.0
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    if float((packed - alone).abs().max()) > tolerance * scale:
        raise ModelError(
            f"{type(base).__name__} cannot keep packed examples apart (its layers ignore the mask); pass --packing off"
        )
