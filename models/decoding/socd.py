"""Soft contrastive decoding, one step: a base model's scores edited by what a toxic model prefers (pure functions).

From HSPD (Shao et al., ACL 2026, arXiv 2604.19124), as its released code has it. With p = softmax(s) of the base
scores s and q = softmax(z) of the toxic logits z:

    delta = D(p, q)         how far the two lie apart (`models.decoding.divergence`)
    t     = ln(1 + delta),  alpha = t / (1 + t)
    k     = floor(alpha * V), at least k_min and at most V
    d     = log q - log p   which tokens the toxic model prefers, and how much
    edited are the k tokens of the largest positive d (all positive ones where there are fewer)

so where the models agree hardly anything changes, and where they part, the more tokens are edited, and the harder.

Modes:
    logratio    s - alpha * d on the edited tokens. The default: d > 0 there, so no token is ever raised, and adding
                a constant to z (which means nothing: softmax does not see it) changes nothing.
    official    s - alpha * z, the release's formula, for parity. It depends on the constant, and a negative z
                raises its token.
    vanilla_cd  (1 + beta1) * s - beta2 * z on all tokens, of which those far below the best are banned
                (contrastive decoding, Li et al. 2023, arXiv 2210.15097, in the release's form).
    prompt_only s untouched.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.decoding.divergence import DIVERGENCES
from schemas.errors import ModelError

MODES = ("logratio", "official", "vanilla_cd", "prompt_only")
BANNED = -1e8  # what `vanilla_cd` scores a token that is not plausible, as the release does


@dataclass(frozen=True)
class SoCDSettings:
    """How a step is edited. The defaults are the paper's but for the mode.

    Attributes:
        mode: One of `MODES`.
        divergence: One of `models.decoding.divergence.DIVERGENCES`.
        dynamic_k: Edit up to floor(alpha * V) tokens; False edits up to `k_min` at every step.
        k_min: Fewest tokens that may be edited.
        compare_raw: Compare the base's logits as they were before the repetition penalty. The paper compares after it;
            but the penalty alone then makes the toxic model seem to prefer every word of the prompt.
        strength: Multiplies alpha where it is an edit's force, not where it is k's share; 1 is the paper.
        beta1: `vanilla_cd`'s weight of the base scores, beyond 1.
        beta2: `vanilla_cd`'s weight of the toxic logits.
        plausible: `vanilla_cd` bans tokens with p < plausible * max p; None takes delta in its place (at most 1).
    """

    mode: str = "logratio"
    divergence: str = "l2"
    dynamic_k: bool = True
    k_min: int = 10
    compare_raw: bool = False
    strength: float = 1.0
    beta1: float = 0.5
    beta2: float = 0.5
    plausible: float | None = 0.1

    def __post_init__(self) -> None:
        problems = [
            (self.mode not in MODES, f"mode '{self.mode}' is not known; use {', '.join(MODES)}"),
            (
                self.divergence not in DIVERGENCES,
                f"divergence '{self.divergence}' is not known; use {', '.join(DIVERGENCES)}",
            ),
            (self.k_min < 1, "k_min must be 1 or more"),
            (not 0 <= self.strength < math.inf, "strength must be 0 or more"),
            (self.plausible is not None and not 0 < self.plausible <= 1, "plausible must be in (0, 1]"),
            (not all(math.isfinite(b) for b in (self.beta1, self.beta2)), "beta1 and beta2 must be numbers"),
        ]
        for wrong, message in problems:
            if wrong:
                raise ModelError(f"SoCD: {message}")

    def relevant(self) -> dict[str, Any]:
        """The settings that change a result in this mode, for records and hashes."""
        names = {
            "prompt_only": (),
            "vanilla_cd": (
                "beta1",
                "beta2",
                "plausible",
                *(("divergence",) if self.plausible is None else ()),
            ),
        }.get(self.mode, ("divergence", "dynamic_k", "k_min", "compare_raw", "strength"))
        return {"mode": self.mode} | {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True)
class Steering:
    """An edited step, and what was measured on the way.

    Attributes:
        scores: Edited scores, float32 of shape (rows, vocabulary).
        delta: Divergence of each row, float32.
        alpha: float64 of shape (rows,), in [0, 1).
        k: Most tokens that may be edited, int64 of shape (rows,).
        edited: Tokens whose score was edited, int64 of shape (rows,); with `vanilla_cd`, those banned.
    """

    scores: torch.Tensor
    delta: torch.Tensor
    alpha: torch.Tensor
    k: torch.Tensor
    edited: torch.Tensor


def steer(
    scores: torch.Tensor,
    toxic: torch.Tensor,
    settings: SoCDSettings,
    *,
    raw: torch.Tensor | None = None,
    in_place: bool = False,
) -> Steering:
    """Edit one step of any number of rows; each row by itself.

    Args:
        scores: The base model's scores s, float32 of shape (rows, vocabulary), after the repetition penalty and
            before temperature and truncation. Minus infinity stays so.
        toxic: The toxic model's logits z after the same tokens, same shape, any float dtype.
        settings: Mode and its parameters.
        raw: The base model's logits before the repetition penalty, same shape; used where `compare_raw` is set, and by
            default the scores themselves.
        in_place: Whether `scores` may be overwritten.

    Raises:
        ValueError: The two differ in shape.

    Example (spec: six tokens, k_min 2):
        >>> s = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
        >>> z = torch.tensor([[0.5, 3.0, 2.5, -0.5, -1.5, -0.2]])
        >>> steer(s, z, SoCDSettings(k_min=2)).scores[0, :3]
        tensor([2.0000, 0.6579, 0.1579])
    """
    if scores.shape != toxic.shape:
        raise ValueError(f"base scores have shape {tuple(scores.shape)}, toxic logits {tuple(toxic.shape)}")
    s, z = scores.float(), toxic.float()
    s = s if in_place or s is not scores else s.clone()
    p_scores = raw.float() if settings.compare_raw and raw is not None else s
    delta, alpha, d = compare(p_scores, z, settings.divergence)
    k = edit_budget(alpha, s.shape[-1], settings)
    if settings.mode == "prompt_only":
        return Steering(s, delta, alpha, k, torch.zeros_like(k))
    if settings.mode == "vanilla_cd":
        return Steering(s, delta, alpha, k, _contrast(s, z, delta, settings))
    finite = bool(torch.isfinite(torch.stack(d.aminmax())).all())
    if not finite:
        # Tokens that one side rules out: there is no more to take from them, and no place among the k to give.
        d = d.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    chosen = choose_largest_positive(d, k).mul_(alpha[:, None] > 0)
    edited = chosen.sum(dim=-1).long()
    push = d if settings.mode == "logratio" else z
    if not finite:
        push = torch.where(chosen > 0, push, 0.0)  # 0 * inf is not 0
    force = (settings.strength * alpha).to(s.dtype)[:, None]
    s.addcmul_(chosen.mul_(push), force, value=-1)
    return Steering(s, delta, alpha, k, edited)


def compare(
    s: torch.Tensor, z: torch.Tensor, divergence: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compare two next-token distributions, given by scores or logits.

    Args:
        s: The base side's, float32 of shape (rows, vocabulary).
        z: The toxic side's, same shape.
        divergence: One of `models.decoding.divergence.DIVERGENCES`.

    Returns:
        delta, float32 of shape (rows,); alpha, float64 of shape (rows,); and d = log q - log p, float32 of shape
        (rows, vocabulary), where q is the toxic side's distribution and p the base side's.
    """
    p, q = torch.softmax(s, dim=-1), torch.softmax(z, dim=-1)
    # The normalisers are read off the likeliest token (log sum = s_max - log p_max): with softmax, that takes half
    # the time of two log-softmaxes and their exponentials.
    total_s = s.amax(dim=-1) - p.amax(dim=-1).log()
    total_z = z.amax(dim=-1) - q.amax(dim=-1).log()
    d = z - s
    d += (total_s - total_z)[:, None]
    delta = DIVERGENCES[divergence](p, q, d)
    return delta, steering_strength(delta), d


def steering_strength(delta: torch.Tensor) -> torch.Tensor:
    """The force of an edit, alpha = t / (1 + t) with t = ln(1 + max(delta, 0)); 0 where delta is not a finite number.

    Args:
        delta: Of any shape.

    Returns:
        float64, same shape, in [0, 1): at most 0.4685 for `l2` and 0.4094 for `tvd`, whose deltas are bounded.
    """
    wide = delta.double()
    t = torch.log1p(wide.clamp(min=0))
    return torch.where(torch.isfinite(wide), t / (1 + t), torch.zeros_like(t))


def edit_budget(alpha: torch.Tensor, vocabulary: int, settings: SoCDSettings) -> torch.Tensor:
    """k: floor(alpha * V), at least k_min and at most V; int64 of alpha's shape."""
    least = min(settings.k_min, vocabulary)
    if not settings.dynamic_k:
        return torch.full_like(alpha, least, dtype=torch.long)
    return (alpha * vocabulary).floor().long().clamp(min=least, max=vocabulary)


def choose_largest_positive(values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Mark the k largest positive values of each row; all positive ones where there are no more than k.

    Of equal values at the boundary the lower token ids are chosen, on any device, so that exactly k are marked.

    Args:
        values: float32 of shape (rows, vocabulary); NaN counts as not positive.
        k: int64 of shape (rows,), 1 or more.

    Returns:
        1.0 where marked, else 0.0, float32, shape of `values` (as floats, comparisons take a quarter of the time).
    """
    wanted = k.to(values.dtype)  # exact: vocabularies have fewer than 2 ** 24 tokens
    marks = torch.empty_like(values)
    least = _kth_largest(values, wanted, marks)[:, None]
    chosen = torch.ge(values, least, out=marks)
    surplus = chosen.sum(dim=-1) - wanted
    rows = (surplus > 0).nonzero()[:, 0]
    if len(rows):
        every = len(rows) == len(values)
        some, bound, excess = (
            (values, least, surplus) if every else (values[rows], least[rows], surplus[rows])
        )
        tied = torch.eq(some, bound, out=torch.empty_like(some))
        last = (tied.sum(dim=-1) - excess)[:, None]
        ranks = tied.cumsum(dim=-1)
        late = torch.gt(ranks, last, out=ranks).mul_(tied)
        if every:
            chosen -= late
        else:
            chosen[rows] -= late
    return chosen


def _kth_largest(values: torch.Tensor, k: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """A bound that k values of each row reach: the k-th largest, or a smallest positive float where that is less.

    Bisection over the bit patterns of positive floats, which are in the order of the floats: at most 33 comparisons
    of the whole tensor, and none more once every row has exactly its k. That is faster than selecting (torch's `topk`
    and `kthvalue`, numpy's `partition`) and many times faster than sorting; and the hundreds of ties that bfloat16
    logits make, which slow those down, change nothing. `marks`, of the shape of `values`, is overwritten.
    """
    best = values.amax(dim=-1).nan_to_num(nan=math.inf, posinf=math.inf).clamp(min=0)
    high = best.view(torch.int32) + 1  # bits that no value reaches
    low = torch.ones_like(high)  # bits that enough values reach, or all positive ones
    enough = torch.gt(values, 0, out=marks).sum(dim=-1) > k
    high = torch.where(enough, high, low + 1)
    # Begin at 1/256 of the largest: half of all bit patterns are of numbers below 1e-19.
    middle = torch.maximum(high - (8 << 23), low + ((high - low) >> 1))
    while bool((high - low).amax() > 1):
        count = torch.ge(values, middle.view(torch.float32)[:, None], out=marks).sum(dim=-1)
        enough = count >= k
        high = torch.where(enough, high, middle)
        low = torch.where(enough, middle, low)
        high = torch.where(count == k, low + 1, high)
        middle = low + ((high - low) >> 1)
    return low.view(torch.float32)


def _contrast(s: torch.Tensor, z: torch.Tensor, delta: torch.Tensor, settings: SoCDSettings) -> torch.Tensor:
    """Contrastive decoding in place of `s`; returns how many tokens each row loses."""
    if settings.plausible is not None:
        share = torch.full_like(delta, settings.plausible)
    else:
        # Above 1 (an l2 distance may be) even the best token would be banned.
        share = torch.where(torch.isfinite(delta), delta, torch.zeros_like(delta)).clamp(0, 1)
    implausible = s < (s.amax(dim=-1) + share.log())[:, None]
    s.mul_(1 + settings.beta1).sub_(z * settings.beta2).masked_fill_(implausible, BANNED)
    return implausible.sum(dim=-1)
