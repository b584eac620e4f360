"""One token for every row of scores: repetition penalty, temperature, top-k, top-p, and a draw."""

from __future__ import annotations

import math

import torch

# With top-p alone, tokens below (1 - top_p) / FIRST_FLOOR are left out of the first look for the nucleus.
FIRST_FLOOR = 256


def penalise(raw: torch.Tensor, history: torch.Tensor, penalty: float) -> torch.Tensor:
    """Apply the repetition penalty of Keskar et al. 2019 (CTRL, section 4.1), as transformers does.

    Args:
        raw: float32 logits of shape (rows, vocabulary); left as they are.
        history: int64 of shape (rows, tokens): every token already in a row, in any order, repeats allowed.
        penalty: Positive scores are divided by it, negative ones multiplied.

    Returns:
        A new tensor of the same shape; `raw` itself when the penalty is 1.
    """
    if penalty == 1.0:
        return raw
    seen = raw.gather(1, history)
    return raw.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def choose(
    scores: torch.Tensor,
    temperatures: torch.Tensor,
    draws: torch.Tensor,
    top_k: int,
    top_p: float,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose each row's next token: temperature, then top-k, then top-p, then one draw by inverse transform.

    Args:
        scores: float32 of shape (rows, vocabulary).
        temperatures: float32 of shape (rows,); 0 takes the likeliest token.
        draws: float64 of shape (rows,), uniform in [0, 1).
        top_k: Keep this many tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens with this mass; 1 keeps all.
        total: `logsumexp` of each row of the scores, where the caller has it.

    Returns:
        int64 of shape (rows,).
    """
    vocabulary = scores.shape[-1]
    greedy = temperatures == 0
    divisor = torch.where(greedy, torch.ones_like(temperatures), temperatures)[:, None]
    ids: torch.Tensor | None
    if top_k or top_p < 1.0:
        # With top-k the nucleus is one of the k; without, one of all.
        probabilities, ids = (
            _ranked(scores, divisor, min(top_k, vocabulary), top_p)
            if top_k
            else _nucleus(scores, divisor, top_p, total)
        )
        best = torch.zeros_like(ids[:, 0])
    else:
        probabilities, ids = torch.softmax(scores / divisor, dim=-1).double(), None
        best = scores.argmax(dim=-1)
    mass = probabilities.cumsum(dim=-1)
    total = mass[:, -1:]
    place = torch.searchsorted(mass, draws[:, None] * total, right=True)
    # Rounding could put a draw at the very top: never past the last token that has any mass.
    place = torch.minimum(place, torch.searchsorted(mass, total.contiguous()))[:, 0]
    place = torch.where(greedy, best, place)
    return place if ids is None else ids.gather(1, place[:, None])[:, 0]


def _ranked(
    scores: torch.Tensor, divisor: torch.Tensor, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens, likeliest first: float64 probabilities (rows, k; zero beyond top-p) and their ids."""
    values, ids = torch.topk(scores, top_k, dim=-1)
    scaled = values / divisor
    probabilities = torch.exp((scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)).double())
    return _within(probabilities, top_p), ids


def _nucleus(
    scores: torch.Tensor, divisor: torch.Tensor, top_p: float, total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens that make up `top_p`, likeliest first, the lower id first where two are equal.

    Sorting a vocabulary costs more than anything else at a step, and most tokens have next to no mass: those above a
    floor are picked out first and sorted alone. Tokens below `(1 - top_p) / vocabulary` cannot make up `1 - top_p`
    together, so a floor there always leaves the nucleus whole; most rows need one much higher. The result of a row
    depends neither on the floor nor on other rows.

    Returns:
        float64 probabilities (rows, widest nucleus and more; not renormalised, zero beyond each row's nucleus) and ids.
    """
    plain = bool((divisor == 1).all())  # dividing by 1 changes no bit, and reads and writes the whole matrix
    scaled = scores if plain else scores / divisor
    norm = torch.logsumexp(scaled, dim=-1, keepdim=True) if total is None or not plain else total[:, None]
    least = (1 - top_p) / (2 * scores.shape[-1])
    return _above(scaled, norm, top_p, (1 - top_p) / FIRST_FLOOR, least)


def _above(
    scaled: torch.Tensor, norm: torch.Tensor, top_p: float, floor: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `_nucleus`; rows whose nucleus reaches below the floor are done again with a lower one."""
    floor = max(floor, least)
    rows, found = (scaled >= norm + math.log(floor)).nonzero(as_tuple=True)  # row by row, ids ascending
    counts = torch.bincount(rows, minlength=len(scaled))
    width = max(1, int(counts.max()))
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = scaled.new_full((len(scaled), width), -torch.inf)
    values[rows, columns] = scaled[rows, found]
    ids = found.new_zeros(len(scaled), width)
    ids[rows, columns] = found
    values, order = values.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    probabilities = torch.exp((values - norm).double())
    lacking = probabilities.sum(dim=-1) < top_p
    probabilities = _within(probabilities, top_p)
    if floor > least and bool(lacking.any()):
        again, their_ids = _above(scaled[lacking], norm[lacking], top_p, floor / 16, least)
        if again.shape[1] > width:
            room = (0, again.shape[1] - width)
            probabilities, ids = (
                torch.nn.functional.pad(probabilities, room),
                torch.nn.functional.pad(ids, room),
            )
        probabilities[lacking, : again.shape[1]] = again
        ids[lacking, : again.shape[1]] = their_ids
    return probabilities, ids


def _within(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero for tokens beyond the nucleus: one stays if those before it do not make up the mass yet (the first always)."""
    if top_p >= 1.0:
        return probabilities
    return torch.where(probabilities.cumsum(dim=-1) - probabilities < top_p, probabilities, 0.0)
