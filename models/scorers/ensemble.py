"""`max:A,B,...` and `mean:A,B,...`: several scorers as one, because each has blind spots of its own.

A classifier taught on hate misses plain insults, one taught on insults misses hate without a bad word, and both may
wave through a curse in a harmless frame that any word list finds. As a ranker the largest score of several is the
careful choice: a text passes only where none of them objects. What one learnt from, all count as having learnt from: the tag is the
union, so that a judge must be independent of every member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from models.protocols import FloatArray, ModelInfo, ToxicityScorer
from models.scorers.judging import training_tags
from schemas.errors import ModelError
from schemas.fingerprint import fingerprint

COMBINE: dict[str, Callable[[FloatArray], FloatArray]] = {
    "max": lambda scores: scores.max(axis=1),
    "mean": lambda scores: scores.mean(axis=1),
}


class EnsembleScorer:
    """The largest, or the mean, of several scorers' headline scores.

    Args:
        members: Two scorers or more.
        info: Of the whole (`describe`).
        combine: `max` or `mean`.
    """

    labels = ("toxicity",)

    def __init__(self, members: Sequence[ToxicityScorer], info: ModelInfo, combine: str) -> None:
        self.members, self.info, self._combine = tuple(members), info, COMBINE[combine]

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score n texts: float32 of shape (n, 1), in order."""
        if not texts:
            return np.empty((0, 1), np.float32)
        scores = np.stack([member.score(texts)[:, 0] for member in self.members], axis=1)
        return self._combine(scores).astype(np.float32)[:, None]


def member_names(name: str) -> tuple[str, list[str]]:
    """The way of combining, and the members' names: `max:A,B` -> (`max`, [A, B]).

    Raises:
        ModelError: Fewer than two members, one named twice, or an ensemble in an ensemble.
    """
    combine, _, rest = name.partition(":")
    members = [part.strip() for part in rest.split(",") if part.strip()]
    if len(members) < 2 or len(set(members)) < len(members):
        raise ModelError(f"{name}: name two or more different scorers, as in {combine}:jigsaw-bilstm,lexicon")
    inner = next((m for m in members if m.partition(":")[0] in COMBINE), None)
    if inner:
        raise ModelError(f"{name}: {inner} is an ensemble itself; name its members instead")
    return combine, members


def describe(name: str, members: Sequence[ModelInfo]) -> ModelInfo:
    """The record of an ensemble: revision of all members together, the union of what they learnt from."""
    tags = sorted(frozenset().union(*(training_tags(m) for m in members)))
    return ModelInfo(
        name=name,
        kind="scorer",
        revision=fingerprint(*(m.tag for m in members))[:16],
        source="; ".join(m.source for m in members),
        licence="; ".join(dict.fromkeys(m.licence for m in members if m.licence)),
        training_data="+".join(tags),
        extra={"members": [m.tag for m in members]},
    )
