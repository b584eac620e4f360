"""The retriever's trainer: the loss of planned batches of groups, and what its progress lines say.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from models.losses.retrieval import BatchLoss, batch_loss
from models.losses.settings import LossSettings
from models.losses.targets import GroupIds
from models.training.planned import PlannedTrainer
from models.training.retriever_model import HeadRetriever, QueryRetriever


class RetrieverTrainer(PlannedTrainer):
    """Trains what makes vectors of queries and documents (`TextRetriever`, `HeadRetriever`).

    The loss is summed over the queries that have a positive and a negative, and divided by their number in the whole step,
    accumulation and devices included: a query without is in no mean.

    Args:
        model: Gives vectors of a batch's `queries` and `documents`.
        args: Trainer arguments.
        loss: Which loss.
        cosine: Compare by cosine; else by inner product.
        in_batch: Documents of other queries are negatives.
        head_rate: Peak learning rate of the documents' head beside an encoder of queries.
        **options: As `PlannedTrainer`.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        loss: LossSettings,
        cosine: bool,
        in_batch: bool = True,
        head_rate: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(model, args, **options)
        self.loss, self.cosine, self.in_batch, self.head_rate = loss, cosine, in_batch, head_rate
        if isinstance(model, HeadRetriever):
            self.unit = "vectors"
        self._seen: list[BatchLoss] = []
        self.last_live: dict[str, float] = {}

    def create_optimizer(self, *args: Any) -> Any:
        """As the library makes it; a new head beside a trained encoder has a rate of its own."""
        made = super().create_optimizer(*args)
        head = getattr(self.model, "document_head", None) if isinstance(self.model, QueryRetriever) else None
        own = {id(p) for p in head.parameters()} if head is not None else set()
        for group in list(made.param_groups):
            moved = [p for p in group["params"] if id(p) in own]
            if moved:
                group["params"] = [p for p in group["params"] if id(p) not in own]
                made.add_param_group({**group, "params": moved, "lr": self.head_rate})
        return made

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """Usable queries."""
        usable: torch.Tensor = batch["usable"]
        return usable

    def count_tokens(self, batch: dict[str, Any]) -> int:
        """Tokens of queries and documents, padding left out; of vectors alone, their number."""
        sides = (batch["queries"], batch["documents"])
        if isinstance(sides[0], torch.Tensor):
            return sum(len(side) for side in sides)
        texts = [side for side in sides if not isinstance(side, torch.Tensor)]
        return sum(int(mask.sum()) for side in texts for _, mask in side)

    def summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """The loss summed over usable queries."""
        queries, documents = model(inputs["queries"], inputs["documents"])
        found = batch_loss(
            queries,
            documents,
            GroupIds(**inputs["groups"]),
            self.loss,
            cosine=self.cosine,
            in_batch=self.in_batch,
        )
        if model.training:
            self._seen.append(replace(found, total=found.total.detach()))
        return found.total, found.usable, (queries, documents)

    def live_figures(self) -> dict[str, float]:
        """Mean scores of positives and negatives, and the share of queries left out, since last asked."""
        seen, self._seen = self._seen, []
        if not seen:
            return {}
        usable = torch.stack([s.usable for s in seen]).double().cpu()
        weights = usable / usable.sum().clamp(min=1)
        scores = [
            torch.stack([getattr(s, n) for s in seen]).double().cpu()
            for n in ("positive_score", "negative_score")
        ]
        self.last_live = {
            "positive_score": float((weights * scores[0]).sum()),
            "negative_score": float((weights * scores[1]).sum()),
            "excluded": 1 - float(usable.sum()) / sum(s.queries for s in seen),
        }
        return self.last_live
