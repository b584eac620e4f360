"""How far two next-token distributions lie apart, one number a row.

HSPD (Shao et al., ACL 2026, arXiv 2604.19124) calls its default "wsd", a Wasserstein distance. Its code hands each
distribution over as *one* point in a space of as many dimensions as there are tokens, and the distance of two points
is Euclidean: what is computed, and was evaluated, is ||p - q||_2. Here it bears that name, `l2`. Its `js` is the mean
of the two Kullback-Leibler divergences, half of Jeffreys', not Jensen and Shannon's.

All take the distributions p (base) and q (toxic), float32 of shape (rows, vocabulary), and log(q/p), same shape, and
return float32 of shape (rows,), in nats where there is a unit. A row does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def l2(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Euclidean distance ||p - q||_2, in [0, sqrt 2]; the release's "wsd"."""
    return torch.linalg.vector_norm(p - q, dim=-1)


def tvd(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Total variation distance, half of ||p - q||_1, in [0, 1]."""
    return 0.5 * torch.linalg.vector_norm(p - q, ord=1, dim=-1)


def fkl(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum p log(p/q); infinite where q rules out what p allows."""
    return -_expected(p, log_ratio)


def rkl(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """KL(q || p) = sum q log(q/p); infinite where p rules out what q allows."""
    return _expected(q, log_ratio)


def js(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Mean of the two KL divergences (half of Jeffreys' divergence), as the release computes under this name."""
    return 0.5 * (rkl(p, q, log_ratio) + fkl(p, q, log_ratio))


DIVERGENCES: dict[str, Divergence] = {"l2": l2, "tvd": tvd, "js": js, "fkl": fkl, "rkl": rkl}


def _expected(weights: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Sum of weights * log_ratio, where a token of no weight adds nothing (0 * log 0 = 0)."""
    total = (weights * log_ratio).sum(dim=-1)
    if bool(total.isnan().any()):
        total = torch.where(weights == 0, 0.0, weights * log_ratio).sum(dim=-1)
    return total
