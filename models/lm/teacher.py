"""Teacher forcing: the log-probability of each token of a given text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.protocols import FloatArray
from schemas.errors import ModelError


def token_logprobs(
    model: Any, tokenizer: Any, text: str, limit: int, vocabulary: int
) -> tuple[list[tuple[int, int]], FloatArray]:
    """Score one text.

    Args:
        model: A transformers causal model.
        tokenizer: Its fast tokenizer (character offsets are needed).
        text: Of any length; over `limit` tokens it is scored in windows that overlap by half.
        limit: Tokens the model reads at once.
        vocabulary: Rows of the output layer beyond this are padding.

    Returns:
        Character offsets (start, end) of the tokens, and their float32 log-probabilities (nats).

    Raises:
        ModelError: The tokenizer cannot give offsets, or has no token to begin with.
    """
    if not tokenizer.is_fast:
        raise ModelError("token scores need a fast tokenizer (tokenizer.json), which this model lacks")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ModelError(
            "token scores need a tokenizer with a beginning or an end token, to predict the first from"
        )
    scores = np.empty(len(ids), dtype=np.float32)
    done = 0
    whole = [first, *ids]  # whole[i] predicts ids[i]
    stride = max(1, limit // 2)
    while done < len(ids):
        begin = 0 if done == 0 else max(0, done - (limit - stride))
        end = min(len(ids), begin + limit)
        window = torch.tensor([whole[begin:end]], device=model.device)
        targets = torch.tensor(ids[done:end], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=window, use_cache=False).logits[0, done - begin :, :vocabulary].float()
            chosen = logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)
        scores[done:end] = chosen.cpu().numpy()
        done = end
    return offsets, scores
