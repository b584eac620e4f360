"""The judge is never the ranker: a scorer that chose what a model was trained on would flatter that model.

A corpus cleaned by picking, for every passage, the rewrite that one scorer likes best is clean by that scorer's lights;
measuring with the same scorer, or with one that learnt from the same labels, counts its blind spots as success (metric
leakage). So what judges is compared with what ranked, by weights and by training data, before anything is measured.

What ranked is found through lineage (`models.lineage`): a trained model's `train.json` records the data it was trained
on, and the manifest of a tamis output the scorers that made it, back through every output made from another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from models.lineage import GATE
from models.protocols import ModelInfo
from schemas.errors import TamisError

ALLOW = "--allow-shared-judge"
ENSEMBLES = ("max", "mean")
_NO_DATA = re.compile(r"none\b")


@dataclass(frozen=True)
class Verdict:
    """What was found of a judge.

    Attributes:
        judge: Its tag (`name@revision`).
        rankers: Tags of the rankers it was compared with.
        shared: What it shares with them, one line each; empty = it is independent.
    """

    judge: str
    rankers: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What a page must say; empty where the judge is independent."""
        if not self.shared:
            return ""
        return (
            f"The judge is not independent: {'; '.join(self.shared)}. It was allowed by {ALLOW}. "
            "Figures judged by what ranked the training data are flattered; do not quote them without saying so."
        )

    def as_dict(self) -> dict[str, Any]:
        """For results."""
        return {"judge": self.judge, "rankers": list(self.rankers), "shared": list(self.shared)}


def check_judge(judge: ModelInfo, rankers: Iterable[ModelInfo], allow_shared: bool = False) -> Verdict:
    """Compare a judge with what ranked (or gated) the data.

    Args:
        judge: The scorer that will judge.
        rankers: Scorers that decided what the data came to be; others than scorers are left out. One that only was the
            first stage of a gate (role `gate`) must not be the judge itself, but may have learnt from the same data.
        allow_shared: Go on all the same; `Verdict.note` then says it.

    Raises:
        TamisError: They are one model, or learnt from the same data.
    """
    scorers = list({(r.tag, r.extra.get("role") == GATE): r for r in rankers if r.kind == "scorer"}.values())
    shared = tuple(dict.fromkeys(reason for r in scorers for reason in _shared(judge, r)))
    if shared and not allow_shared:
        raise TamisError(
            f"the judge must not be the ranker: {'; '.join(shared)}. Pass another --judge (`tamis train ngram` makes "
            f"one from labelled text), or {ALLOW} to judge with it all the same"
        )
    return Verdict(judge.tag, tuple(dict.fromkeys(r.tag for r in scorers)), shared)


def training_tags(info: ModelInfo) -> frozenset[str]:
    """The data sets a model learnt from: its training-data tag taken apart at `+`, in lower case; word lists have none."""
    tags = (tag.strip().lower() for tag in info.training_data.split("+"))
    return frozenset(tag for tag in tags if tag and not _NO_DATA.match(tag))


def _shared(judge: ModelInfo, ranker: ModelInfo) -> list[str]:
    """What a judge has in common with a ranker; the strongest reason only."""
    gate = ranker.extra.get("role") == GATE
    did = "was the gate of the training data" if gate else "ranked the training data"
    if judge.name == ranker.name and judge.revision == ranker.revision:
        return [f"{judge.name} {did}"]
    theirs = _parts(ranker)
    for part in _parts(judge):
        for other in theirs:
            which = "which" if other.name == ranker.name else f"which is part of {ranker.name}, which"
            if part.weights and part.weights == other.weights:
                if part.name == other.name:
                    return [f"{part.name} is part of {ranker.name}, which {did}"]
                return [f"{part.name} has the weights of {other.name}, {which} {did}"]
            if part.name == other.name:
                return [f"{part.name} {did} (at another revision)"]
    # A gate hides from a judge like itself what it let pass, but it chose nothing by what it had learnt to like.
    common = sorted(training_tags(judge) & training_tags(ranker)) if not gate else []
    if common:
        return [f"{judge.name} learnt from {', '.join(common)}, as did {ranker.name}, which {did}"]
    return []


class _Part(NamedTuple):
    name: str
    weights: str  # hash of the weights, or else the revision; empty where neither is known


def _parts(info: ModelInfo) -> list[_Part]:
    """The scorers a scorer consists of: itself, or an ensemble's members."""
    members = [str(tag).rpartition("@") for tag in info.extra.get("members", ())]
    if members:  # a folder's name may hold an @, a revision holds none
        return [_Part(name, revision) for name, _, revision in members]
    combine, _, rest = info.name.partition(":")
    if combine in ENSEMBLES:  # a record that does not name them yet
        return [_Part(name.strip(), "") for name in rest.split(",")]
    return [_Part(info.name, str(info.extra.get("weights") or info.revision))]
