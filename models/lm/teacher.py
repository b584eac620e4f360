"""Teacher forcing: the log-probability of each token of a given text, or of several continuations of one prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.lm.chat import well_formed
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
    ids, offsets = _encode(tokenizer, text)
    first = _first_token(tokenizer)
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


# Continuation tokens scored at once: bounds the logits in memory (512 x 49,152 float32 = 100 MB).
_TOKENS_AT_ONCE = 512


def continuation_logprobs(
    model: Any, tokenizer: Any, prompt: str, continuations: Sequence[str], limit: int, vocabulary: int
) -> list[FloatArray]:
    """Score continuations of one prompt; its keys and values are computed once.

    Args:
        model: A transformers causal model.
        tokenizer: Its fast tokenizer.
        prompt: What stands before every continuation.
        continuations: n texts.
        limit: Tokens the model reads at once; of what is longer, the beginning of the prompt goes unseen.
        vocabulary: Rows of the output layer beyond this are padding.

    Returns:
        n float32 arrays: log-probabilities (nats) of the tokens that end beyond the prompt. What one gives depends
        on the others in the last bits only (they are padded to one length).

    Raises:
        ModelError: As `token_logprobs`; or a score is not a number.
    """
    first = _first_token(tokenizer)
    prompt = well_formed(prompt)  # its length is that of what is tokenised
    rows: list[list[int]] = []
    counts: list[int] = []  # tokens of the row's end that are scored
    for text in continuations:
        ids, offsets = _encode(tokenizer, prompt + text)
        own = sum(end > len(prompt) for _, end in offsets) if text else 0
        whole = [first, *ids][-limit:]
        rows.append(whole)
        counts.append(min(own, len(whole) - 1))
    out: list[FloatArray] = [np.empty(0, np.float32) for _ in rows]
    # Rows of about one length together: padding is work for nothing.
    order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: (len(rows[i]), i))
    while order:
        shared = _shared([rows[i] for i in order], [len(rows[i]) - counts[i] - 1 for i in order])
        widest = max(len(rows[i]) for i in order) - shared
        now, order = order[: max(1, _TOKENS_AT_ONCE // widest)], order[max(1, _TOKENS_AT_ONCE // widest) :]
        scored = _score_rows(model, [rows[i] for i in now], [counts[i] for i in now], shared, vocabulary)
        for i, scores in zip(now, scored, strict=True):
            out[i] = scores
    return out


def _score_rows(
    model: Any, rows: list[list[int]], counts: list[int], shared: int, vocabulary: int
) -> list[FloatArray]:
    """Log-probabilities of the last `counts[i]` tokens of each row; the first `shared` tokens are the same in all."""
    device = model.device
    width = max(map(len, rows)) - shared
    ids = torch.tensor(
        [row[shared:] + [row[-1]] * (width + shared - len(row)) for row in rows], device=device
    )
    options: dict[str, Any] = {}
    with torch.inference_mode():
        if shared:
            begin = model(
                input_ids=torch.tensor([rows[0][:shared]], device=device), use_cache=True, **_last(model)
            )
            cache = begin.past_key_values
            if len(rows) > 1:
                cache.batch_repeat_interleave(len(rows))
            options = {"past_key_values": cache, "use_cache": True}
        # Padding stands on the right, where a causal model does not see it.
        logits = model(input_ids=ids, **(options or {"use_cache": False})).logits
        out = []
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            end = len(row) - shared  # logits[end - 2] predict the row's last token
            own = logits[number, end - 1 - count : end - 1, :vocabulary].float()
            chosen = own.gather(1, ids[number, end - count : end, None])[:, 0] - torch.logsumexp(own, dim=-1)
            out.append(chosen.cpu().numpy().astype(np.float32))
    if not all(np.isfinite(scores).all() for scores in out):
        raise ModelError("the model's scores are not numbers (NaN or infinite); try dtype=float32")
    return out


def _shared(rows: list[list[int]], before: list[int]) -> int:
    """How many tokens all rows begin with, at most as many as stand before the token that predicts a scored one."""
    most = min(before)
    shared = 0
    while shared < most and all(row[shared] == rows[0][shared] for row in rows):
        shared += 1
    return shared


def _last(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise ModelError("token scores need a fast tokenizer (tokenizer.json), which this model lacks")
    encoded = tokenizer(
        well_formed(text),
        add_special_tokens=False,
        split_special_tokens=True,  # as in a prompt: a special token's name in a text is the characters it is
        return_offsets_mapping=True,
        verbose=False,
    )
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _first_token(tokenizer: Any) -> int:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ModelError(
            "token scores need a tokenizer with a beginning or an end token, to predict the first from"
        )
    return int(first)
