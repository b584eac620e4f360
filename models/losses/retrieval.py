"""The loss of a batch of groups, from the vectors of its queries and documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.losses.gather import gather_documents
from models.losses.objectives import GroupScores, query_losses
from models.losses.pooling import masked_mean
from models.losses.settings import LossSettings
from models.losses.targets import GroupIds, make_targets


@dataclass(frozen=True)
class BatchLoss:
    """What a batch costs.

    Attributes:
        total: float (): the loss summed over the usable queries.
        usable: int64 (): how many there are.
        queries: How many queries the batch has.
        positive_score: float (): mean over usable queries of the mean score of their positives, without the scale.
        negative_score: The same of their negatives.
    """

    total: torch.Tensor
    usable: torch.Tensor
    queries: int
    positive_score: torch.Tensor
    negative_score: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The mean over usable queries; 0 where there is none."""
        return self.total / self.usable.clamp(min=1)


def batch_loss(
    queries: torch.Tensor,
    documents: torch.Tensor,
    groups: GroupIds,
    settings: LossSettings,
    *,
    cosine: bool,
    in_batch: bool = True,
    across_devices: bool = True,
) -> BatchLoss:
    """Score the queries against the documents of the batch and pool the loss.

    Args:
        queries: float (b, d).
        documents: float (m, d), in the order of `groups.documents`.
        groups: Who is whose positive.
        settings: The loss.
        cosine: Divide vectors by their length; else scores are inner products.
        in_batch: Documents of other queries are negatives.
        across_devices: Documents of other processes are too.

    Scores and losses are float32 whatever the vectors are, and under autocast too: a softmax over hundreds of scores in
    bfloat16 is coarse, and an inner product without normalisation overflows float16.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, documents = _precise(queries), _precise(documents)
        if cosine:
            queries = torch.nn.functional.normalize(queries, dim=-1)
            documents = torch.nn.functional.normalize(documents, dim=-1)
        if in_batch and across_devices:
            documents, numbers = gather_documents(documents, groups.documents)
            if numbers is not groups.documents:
                groups = GroupIds(
                    numbers,
                    groups.positives,
                    groups.negatives,
                    groups.masked,
                    groups.positive_teacher,
                    groups.negative_teacher,
                )
        targets = make_targets(groups, in_batch=in_batch)
        scores = queries @ documents.T
        scored = GroupScores(
            scores * settings.scale, targets.positive, targets.negative, targets.first, targets.teacher
        )
        losses = query_losses(scored, settings)
        usable = scored.usable
        with torch.no_grad():
            plain = scores.detach()
            means = [masked_mean(plain, side)[usable] for side in (targets.positive, targets.negative)]
            positive, negative = (m.mean() if len(m) else plain.new_zeros(()) for m in means)
        return BatchLoss(losses.sum(), usable.sum(), len(queries), positive, negative)


def _precise(vectors: torch.Tensor) -> torch.Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()
