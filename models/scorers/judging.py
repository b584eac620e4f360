"""The judge is never the ranker: a scorer that chose what a model was trained on would flatter that model.

A corpus cleaned by picking, for every passage, the rewrite that one scorer likes best is clean by that scorer's lights;
measuring with the same scorer, or with one that learnt from the same labels, counts its blind spots as success (metric
leakage). So what judges is compared with what ranked, by weights and by training data, before anything is measured.

What ranked is found through lineage: a trained model's `train.json` records the data it was trained on, and the
manifest of a tamis output records the scorers that made it, back through every output that was made from another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.protocols import ModelInfo
from schemas.errors import TamisError

RECORD, MANIFEST = "train.json", "manifest.json"
ALLOW = "--allow-shared-judge"
_DEPTH = 20  # generations of outputs and models; a loop of folders must end
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
        rankers: Scorers that decided what the data came to be; others than scorers are left out.
        allow_shared: Go on all the same; `Verdict.note` then says it.

    Raises:
        TamisError: They are one model, or learnt from the same data.
    """
    scorers = list({r.tag: r for r in rankers if r.kind == "scorer"}.values())
    shared = tuple(dict.fromkeys(reason for r in scorers for reason in _shared(judge, r)))
    if shared and not allow_shared:
        raise TamisError(
            f"the judge must not be the ranker: {'; '.join(shared)}. Pass another --judge (`tamis train ngram` makes "
            f"one from labelled text), or {ALLOW} to judge with it all the same"
        )
    return Verdict(judge.tag, tuple(r.tag for r in scorers), shared)


def training_tags(info: ModelInfo) -> frozenset[str]:
    """The data sets a model learnt from: its training-data tag taken apart at `+`, in lower case; word lists have none."""
    tags = (tag.strip().lower() for tag in info.training_data.split("+"))
    return frozenset(tag for tag in tags if tag and not _NO_DATA.match(tag))


def lineage_rankers(folders: Iterable[str | Path]) -> tuple[ModelInfo, ...]:
    """The scorers behind some models or corpora, each once.

    Args:
        folders: Folders of models or adapters that tamis trained, or of outputs of tamis; what has no record (a
            downloaded model) has no rankers that could be known.

    Returns:
        What the records say of each scorer.
    """
    found: dict[str, ModelInfo] = {}
    for folder in folders:
        for info in _of_folder(Path(folder), _DEPTH):
            found.setdefault(info.tag, info)
    return tuple(found.values())


def _shared(judge: ModelInfo, ranker: ModelInfo) -> list[str]:
    """What a judge has in common with a ranker; the strongest reason only."""
    if judge.revision and judge.revision == ranker.revision:
        same = judge.name if judge.name == ranker.name else f"{judge.name} has the weights of {ranker.name}"
        return [
            f"{same} ranked the training data"
            if same == judge.name
            else f"{same}, which ranked the training data"
        ]
    if judge.name == ranker.name:
        return [f"{judge.name} ranked the training data (at another revision)"]
    members = set(_members(judge)) & set(_members(ranker))
    if members:
        return [f"{min(members)} is part of {ranker.name}, which ranked the training data"]
    common = sorted(training_tags(judge) & training_tags(ranker))
    if common:
        return [
            f"{judge.name} learnt from {', '.join(common)}, as did {ranker.name}, which ranked the training data"
        ]
    return []


def _members(info: ModelInfo) -> Sequence[str]:
    """Tags of the scorers a scorer consists of: itself, or an ensemble's members."""
    return [str(tag) for tag in info.extra.get("members", ())] or [info.tag]


def _of_folder(folder: Path, depth: int) -> list[ModelInfo]:
    if depth <= 0:
        return []
    manifest = _read(folder / MANIFEST)
    if manifest is not None:
        return _of_manifest(manifest)
    record = _read(folder / RECORD)
    if record is None:
        return []
    data = _mapping(record.get("data"))
    found = _of_manifest(_mapping(data.get("lineage")))
    source = str(data.get("source") or "")
    # Records written before lineage named models: the output itself may still be there.
    if not found and source and "://" not in source:
        found = _of_folder(Path(source), depth - 1)
    base = str(_mapping(record.get("model")).get("name") or "").removeprefix("hf:")
    return found + (_of_folder(Path(base), depth - 1) if base else [])


def _of_manifest(manifest: Mapping[str, Any]) -> list[ModelInfo]:
    """Scorers of an output and of all the outputs it was made from."""
    found: list[ModelInfo] = []
    for _ in range(_DEPTH):
        found += [_info(m) for m in manifest.get("models") or () if _mapping(m).get("kind") == "scorer"]
        manifest = _mapping(manifest.get("lineage"))
    return found


def _info(model: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(
        name=str(model.get("name") or ""),
        kind="scorer",
        revision=str(model.get("revision") or ""),
        training_data=str(model.get("training_data") or ""),
    )


def brief(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What lineage keeps of a manifest's models: enough to tell whether a judge is independent of them."""
    return [
        {key: str(m.get(key) or "") for key in ("name", "kind", "revision", "training_data")} for m in models
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
