"""What the training of a retriever will do: its stages, their steps, what they read; said before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from models.training.groups import NO_CAP, DrawPolicy
from models.training.planned import clock
from models.training.retriever_batches import GroupCollator, GroupPlan
from models.training.retriever_data import GroupData
from models.training.retriever_settings import RetrieverSettings
from models.training.running import processes, warmup_steps
from schemas.errors import InputError

if TYPE_CHECKING:
    from models.training.retriever_texts import GroupTexts

_SAMPLED = 8  # batches whose tokens stand for all


@dataclass(frozen=True)
class StagePlan:
    """What one stage does.

    Attributes:
        name: Of the stage.
        number: Its place in the groups.
        groups: How many there are.
        steps: Optimiser steps.
        steps_per_epoch: Of one epoch.
        warmup: Steps of warm-up.
        rate: Peak learning rate.
        tokens: Tokens of one epoch, about; of a head, vectors.
        documents: Distinct documents a step, about.
    """

    name: str
    number: int
    groups: int
    steps: int
    steps_per_epoch: int
    warmup: int
    rate: float
    tokens: int
    documents: float


@dataclass(frozen=True)
class RetrieverPlan:
    """What a run does: its stages, and the seconds it takes (None where not measured)."""

    stages: tuple[StagePlan, ...]
    seconds: float | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(s.steps for s in self.stages)


@dataclass(frozen=True)
class PreparedGroups:
    """The data of a run.

    Attributes:
        groups: What was read.
        policy: How groups are drawn.
        cosine: What vectors are compared by.
        texts: Tokens; None for a head.
    """

    groups: GroupData
    policy: DrawPolicy
    cosine: bool
    texts: GroupTexts | None


def plan_stages(settings: RetrieverSettings, prepared: PreparedGroups) -> RetrieverPlan:
    """Plan the stages."""
    groups = prepared.groups
    stages = []
    for name in settings.stages or groups.stages:
        number = groups.stages.index(name)
        rows = groups.rows(number)
        batches = math.ceil(len(rows) / settings.queries_per_pass)
        per_epoch = math.ceil(batches / (settings.accumulate * processes()))
        steps = settings.max_steps or max(1, math.ceil(settings.passes(name) * per_epoch))
        tokens, documents = _tokens(settings, prepared, name, rows)
        stages.append(
            StagePlan(
                name,
                number,
                len(rows),
                steps,
                per_epoch,
                warmup_steps(settings.warmup, steps),
                settings.rate(name),
                tokens,
                documents,
            )
        )
    return RetrieverPlan(tuple(stages))


def describe_plan(settings: RetrieverSettings, prepared: PreparedGroups, plan: RetrieverPlan) -> list[str]:
    """The plan in a few lines."""
    groups, policy = prepared.groups, prepared.policy
    rows = settings.queries_per_pass * settings.accumulate * processes()
    what = {"full": "all weights", "lora": f"LoRA r {settings.lora_r}"}.get(
        settings.train, f"{settings.head} head"
    )
    if settings.documents != "shared":
        kept = {"fixed": "as they are", "head": f"behind a {settings.head} head of their own"}
        what += f", of the queries alone; documents {kept[settings.documents]}"
    loss = settings.loss_settings(cosine=prepared.cosine)
    lines = [
        f"data      {len(groups.query_ids):,} groups, {len(groups.document_ids):,} documents; a group draws "
        f"{describe_draw(policy, settings.all_documents)}",
        f"loss      {loss.name}, {'cosine' if prepared.cosine else 'inner product'} x {loss.scale:g}; {what}",
    ]
    for s in plan.stages:
        epochs = s.steps / s.steps_per_epoch
        unit = "vectors" if settings.train == "head" else "tokens"
        lines.append(
            f"stage     {s.name}: {s.groups:,} groups, {s.steps:,} steps of {rows} queries and about {s.documents:.0f} "
            f"documents ({epochs:.2f} epochs, about {s.tokens:,} {unit} each), learning rate {s.rate:g}"
        )
    if plan.seconds is not None:
        lines.append(f"time      about {clock(plan.seconds)}")
    return lines


def describe_draw(policy: DrawPolicy, all_documents: bool) -> str:
    """What an epoch takes of a group."""
    if not all_documents:
        return (
            f"{policy.most_positives} positives at most ({policy.positives}), {policy.group_size} documents"
        )
    most = (
        "all its positives"
        if policy.max_positives == NO_CAP
        else f"{policy.most_positives} positives at most"
    )
    return f"{most} ({policy.positives}), against every document"


class _NoFeatures:
    """Makes nothing: for plans, which look at the draw alone."""

    def __call__(self, rows: Any, documents: Any) -> tuple[dict[str, Any], Any]:
        return {}, documents


def check_stages(settings: RetrieverSettings, groups: GroupData) -> None:
    """Refuse stages the groups do not have.

    Raises:
        InputError: One is named, or one is named twice.
    """
    named = {
        "--stages": settings.stages,
        "--epochs": settings.epochs,
        "--learning-rate": settings.learning_rate,
    }
    for option, names in named.items():
        for name in names:
            if name and name not in groups.stages:
                raise InputError(
                    f"{option}: the groups have no stage '{name}' (they have {', '.join(groups.stages)})"
                )
    if len(set(settings.stages)) < len(settings.stages):
        raise InputError("--stages names a stage twice; pass more --epochs instead")


def check_texts(groups: GroupData, *, documents: bool = True) -> None:
    """Refuse groups that hold ids without texts.

    Args:
        groups: What was read.
        documents: Whether the documents' texts are needed too.

    Raises:
        InputError: They do.
    """
    if any(q is None for q in groups.queries) or (documents and any(d is None for d in groups.documents)):
        raise InputError(
            "the groups hold ids without texts: pass --corpus and --queries (or --vectors where documents keep theirs, and "
            "to train a head --query-vectors)"
        )


def _tokens(
    settings: RetrieverSettings, prepared: PreparedGroups, stage: str, rows: Any
) -> tuple[int, float]:
    """Tokens of an epoch and distinct documents of a batch, from a few of its batches."""
    batches = GroupPlan(rows, settings.queries_per_pass, settings.seed, stage).batches(0)
    features: Any = _NoFeatures()
    collate = GroupCollator(
        prepared.groups, prepared.policy, settings.seed, features, all_documents=settings.all_documents
    )
    sampled = batches[:: max(1, len(batches) // _SAMPLED)][:_SAMPLED]
    tokens, documents, queries = 0, 0, 0
    for batch in sampled:
        made = collate(batch)["groups"]["documents"].numpy()
        documents, queries = documents + len(made), queries + len(batch)
        if prepared.texts is None:
            tokens += len(batch) + len(made)
        else:
            own = np.fromiter((row.number for row in batch), np.int64, len(batch))
            tokens += int(prepared.texts.queries.lengths[own].sum())
            if prepared.texts.documents is not None:
                tokens += int(prepared.texts.documents.lengths[made].sum())
    each = max(1, queries)
    return round(tokens / each * len(rows)), documents / each * min(
        settings.queries_per_pass, len(rows)
    ) * settings.accumulate
