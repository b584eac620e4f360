"""The objectives, one value a query, from scores and two masks.

Scores s are already scaled. P are a query's positives (m of them), N its negatives: its own, and what other queries of the
batch brought. With LSE the log-sum-exp and softplus(x) = log(1 + e^x):

    SingleLH     softplus(LSE(N) - s_p)                       p = the first positive
    JointLH      m LSE(P u N) - sum_P s
    SumMargLH    LSE(P u N) - LSE(P) = softplus(LSE(N) - LSE(P))
    LSEPair      log(1 + sum_PxN e^(s_n - s_p)) = softplus(LSE(N) + LSE(-P))
    MNRL         mean_P softplus(LSE(N) - s_p)
    MarginMSE    mean_PxN ((s_p - s_n) - (t_p - t_n))^2       t = the teacher's scores
    KL           sum t' log(t' / s')                          t', s' = softmax over the query's own group

They differ in how the positive side is pooled: one, all with their siblings in the denominator, a soft maximum (LSE(P)), a soft
minimum (-LSE(-P)), a mean. With one positive the first five are the same number. None needs the |P| x |N| pairs: sums over
pairs factor into sums over both sides.

Rand1LH is SingleLH on a positive the sampler draws anew each epoch. It is not LSEPair in expectation: with e^s = 2 and 1 for
two positives and 1 for one negative its gradients are (-1/6, -1/4), those of LSEPair (-1/5, -2/5).

References: H. Wang et al., "Training Dense Retrievers with Multiple Positive Passages", KDD 2026 (JointLH, SumMargLH, LSEPair);
H. Zhang et al., EMNLP 2025, arXiv 2504.05220 (SumMargLH); S. Hofstaetter et al. 2020, arXiv 2010.02666 (MarginMSE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.losses.pooling import (
    at_least_float32,
    masked_logsumexp,
    masked_max,
    masked_mean,
    masked_sum,
    masked_variance,
    softplus,
)
from models.losses.settings import LossSettings


@dataclass(frozen=True)
class GroupScores:
    """Scores of b queries against m documents, and what each document is to each query.

    Attributes:
        scores: float (b, m), scaled.
        positive: bool (b, m).
        negative: bool (b, m); what is neither has no part in a query's loss.
        first: int64 (b,): column of each query's best positive; anything where there is none.
        teacher: float (b, m), NaN where the teacher says nothing; None without a teacher.
    """

    scores: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    first: torch.Tensor
    teacher: torch.Tensor | None = None

    @property
    def usable(self) -> torch.Tensor:
        """Which queries, bool (b,), have a positive and a negative. Others teach nothing, and are in no mean."""
        return self.positive.any(dim=-1) & self.negative.any(dim=-1)


def query_losses(groups: GroupScores, settings: LossSettings) -> torch.Tensor:
    """The loss of every query.

    Args:
        groups: The scores; half precision is computed in float32.
        settings: Which loss, and its options. `scale` is not applied here.

    Returns:
        float (b,): 0, with a gradient of zero, where a query is not usable.

    Raises:
        ValueError: The loss needs a teacher and there is none.
    """
    scores = at_least_float32(groups.scores)
    usable = groups.usable
    # Rows without both sides are emptied, so that nothing of them is computed that could be infinite.
    positive, negative = groups.positive & usable[:, None], groups.negative & usable[:, None]
    # What is neither is not looked at: 0 times infinity in a gradient would not be 0.
    scores = scores.masked_fill(~(positive | negative), 0.0)
    name = settings.name
    if name in ("single_lh", "infonce", "rand1_lh"):
        values = _single(scores, groups.first, negative)
    elif name == "joint_lh":
        m = positive.sum(dim=-1)
        joint = torch.where(usable, masked_logsumexp(scores, positive | negative), 0.0)
        values = m * joint - masked_sum(scores, positive)
    elif name == "sum_marg_lh":
        top = torch.where(usable, masked_logsumexp(scores, positive), 0.0)
        values = softplus(masked_logsumexp(scores, negative) - top)
    elif name == "lse_pair":
        values = softplus(
            _negative_side(scores, negative, settings) + _positive_side(scores, positive, usable, settings)
        )
    elif name == "mnrl":
        each = softplus(masked_logsumexp(scores, negative)[:, None] - scores)
        values = masked_mean(each, positive)
    else:
        if groups.teacher is None:
            raise ValueError(f"{name} needs the scores of a teacher")
        teacher = groups.teacher.to(scores.dtype) * settings.teacher_scale
        known = ~teacher.isnan()
        teacher = teacher.nan_to_num()
        distil = _margin_mse if name == "margin_mse" else _listwise_kl
        values = distil(scores, teacher, positive & known, negative & known)
    if settings.divide_by_m:
        values = values / positive.sum(dim=-1).clamp(min=1)
    return torch.where(usable, values, 0.0)


def _single(scores: torch.Tensor, first: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    best = scores.gather(1, first[:, None]).squeeze(1)
    return softplus(masked_logsumexp(scores, negative) - best)


def _positive_side(
    scores: torch.Tensor, positive: torch.Tensor, usable: torch.Tensor, settings: LossSettings
) -> torch.Tensor:
    if settings.positive_side == "max":
        pooled = -torch.where(usable, masked_max(scores, positive), 0.0)
    else:
        pool = masked_max if settings.positive_side == "min" else masked_logsumexp
        pooled = torch.where(usable, pool(-scores, positive), 0.0)
    return pooled


def _negative_side(scores: torch.Tensor, negative: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    return (masked_max if settings.negative_side == "max" else masked_logsumexp)(scores, negative)


def _margin_mse(
    scores: torch.Tensor, teacher: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
) -> torch.Tensor:
    """The mean over pairs of (a_p - a_n)^2 with a = s - t is Var_P(a) + Var_N(a) + (mean_P a - mean_N a)^2."""
    gap = scores - teacher
    between = masked_mean(gap, positive) - masked_mean(gap, negative)
    return masked_variance(gap, positive) + masked_variance(gap, negative) + between**2


def _listwise_kl(
    scores: torch.Tensor, teacher: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
) -> torch.Tensor:
    group = positive | negative
    there = group.any(dim=-1)
    ours = scores - torch.where(there, masked_logsumexp(scores, group), 0.0)[:, None]
    theirs = teacher - torch.where(there, masked_logsumexp(teacher, group), 0.0)[:, None]
    return masked_sum(theirs.masked_fill(~group, 0.0).exp() * (theirs - ours), group)
