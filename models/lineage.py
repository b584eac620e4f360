"""Where data and models come from: the outputs of tamis behind a path, and the scorers behind a model or a corpus.

A manifest names the models that made an output, each with its role; a model's `train.json` names the data it was
trained on; and both say what these were made from in turn. So what decided about a text is found generations on, be
the output named by its folder, by the `data` folder in it, by one of its shards or by a pattern.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from models.protocols import ModelInfo

RECORD, MANIFEST = "train.json", "manifest.json"
DATA, OURS = "data", "_tamis"
# The role of a stage that only says what the next one is shown: it ranks no candidate and accepts none.
GATE = "gate"
_DEPTH = 20  # generations of outputs and models; a loop of folders must end
_PATTERN = re.compile(r"[*?\[]")
_KEPT = ("name", "kind", "revision", "training_data")


@dataclass(frozen=True)
class OutputAbove:
    """An output of tamis that some files belong to.

    Attributes:
        root: Its folder.
        manifest: What its manifest says; None where it was never finished.
    """

    root: str
    manifest: Mapping[str, Any] | None


def outputs_above(fs: Any, paths: Iterable[str]) -> list[OutputAbove]:
    """The outputs whose shards some files or folders are: those that lie in the `data` folder of one.

    Args:
        fs: Their filesystem.
        paths: Paths on it, without protocol.

    Returns:
        Each output once, in the order of the paths.
    """
    known: dict[str, OutputAbove | None] = {}
    for path in paths:
        parts = path.rstrip("/").split("/")
        for i in range(len(parts) - 1, 0, -1):
            if parts[i] == DATA:
                root = "/".join(parts[:i])
                if root not in known:
                    known[root] = _output(fs, root)
                if known[root] is not None:
                    break
    return [found for found in known.values() if found is not None]


def merged(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What lineage records of an input that consists of several outputs' shards: their jobs, runs and models."""
    if len(manifests) == 1:
        return dict(manifests[0])
    names = {key: ", ".join(dict.fromkeys(str(m.get(key)) for m in manifests)) for key in ("job", "run_id")}
    models = [model for m in manifests for model in _generations(m)]
    distinct = {json.dumps(model, sort_keys=True): model for model in models}
    return {**names, "poisoned": any(m.get("poisoned") for m in manifests), "models": list(distinct.values())}


def brief(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What lineage keeps of a manifest's models: enough to tell whether a judge is independent of them."""
    return [
        {key: str(model.get(key) or "") for key in _KEPT} | _more(model, manifest)
        for model in manifest.get("models") or ()
        if isinstance(model, Mapping)
    ]


def lineage_rankers(
    places: Iterable[str | Path], options: Mapping[str, Any] | None = None
) -> tuple[ModelInfo, ...]:
    """The scorers behind some models or corpora, each once.

    Args:
        places: Models or adapters that tamis trained; outputs of tamis, or what lies in their `data`: folders, files
            and patterns. What has no record (a downloaded model, a file of one's own) has no rankers that could be known.
        options: fsspec options of places that are URLs.

    Returns:
        What the records say of each scorer; `extra` holds its role (`gate`, `ranker`), an ensemble's members, and the
        hash of the weights where the revision is a hub's.
    """
    found: dict[str, ModelInfo] = {}
    for place in places:
        for info in _of_place(str(place), dict(options or {}), _DEPTH):
            if info.tag not in found or found[info.tag].extra.get("role") == GATE:
                found[info.tag] = info
    return tuple(found.values())


def _output(fs: Any, root: str) -> OutputAbove | None:
    try:
        finished = fs.exists(f"{root}/_SUCCESS")
        if not finished and not fs.exists(f"{root}/{OURS}"):
            return None
    except OSError:  # one may read a prefix of a bucket and not what stands above it
        return None
    if not finished:
        return OutputAbove(root, None)
    manifest = _read(fs, f"{root}/{MANIFEST}")
    return OutputAbove(root, manifest) if manifest is not None and "job" in manifest else None


def _of_place(place: str, options: dict[str, Any], depth: int) -> list[ModelInfo]:
    if depth <= 0 or not place:
        return []
    try:
        fs, path = fsspec.core.url_to_fs(place, **options)
    except (ImportError, OSError, TypeError, ValueError):
        return []
    pattern = _PATTERN.search(path)
    if pattern is not None and not fs.exists(path):
        paths = sorted(fs.glob(path)) or [path[: pattern.start()].rpartition("/")[0]]
    else:
        paths = [path.rstrip("/")]
    found: list[ModelInfo] = []
    for at in paths:
        manifest = _read(fs, f"{at}/{MANIFEST}")
        if manifest is not None:
            found += _of_manifest(manifest)
        elif (record := _read(fs, f"{at}/{RECORD}")) is not None:
            found += _of_record(record, options, depth)
    for above in outputs_above(fs, paths):
        found += _of_manifest(above.manifest or {})
    return found


def _of_record(record: Mapping[str, Any], options: dict[str, Any], depth: int) -> list[ModelInfo]:
    """Scorers behind a trained model: of its data, and of what it was trained on top of."""
    data, model = _mapping(record.get("data")), _mapping(record.get("model"))
    found = _of_manifest(_mapping(data.get("lineage")))
    source = str(data.get("source") or "")
    # Records written before lineage named models: the output itself may still be there.
    if not found and source and "://" not in source:
        found = _of_place(source, options, depth - 1)
    for below in (model, _mapping(model.get("on_adapter"))):
        place = str(below.get("source") or below.get("name") or "").removeprefix("hf:")
        found = found + _of_place(place, options, depth - 1)
    return found


def _of_manifest(manifest: Mapping[str, Any]) -> list[ModelInfo]:
    """Scorers of an output and of all the outputs it was made from."""
    return [
        ModelInfo(
            name=model["name"],
            kind="scorer",
            revision=model["revision"],
            training_data=model["training_data"],
            extra={key: value for key, value in model.items() if key not in _KEPT},
        )
        for model in _generations(manifest)
        if model["kind"] == "scorer"
    ]


def _generations(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for _ in range(_DEPTH):
        found += brief(manifest)
        manifest = _mapping(manifest.get("lineage"))
    return found


def _more(model: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Role, members and weights of a model, as far as they are known."""
    extra = {**_mapping(model.get("extra")), **model}
    found: dict[str, Any] = {}
    if role := extra.get("role") or _role(str(model.get("name")), _mapping(manifest.get("config"))):
        found["role"] = str(role)
    if isinstance(members := extra.get("members"), list | tuple):
        found["members"] = [str(member) for member in members]
    if weights := extra.get("weights"):
        found["weights"] = str(weights)
    return found


def _role(name: str, config: Mapping[str, Any]) -> str:
    """The role of a scorer in an output whose manifest does not say it yet: of a cascade's first stage, that it was one."""
    scorer = str(config.get("scorer") or "")
    if not scorer or name != config.get("linear"):
        return ""
    return "" if name in re.split(r"[:,]", scorer) else GATE


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read(fs: Any, path: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(fs.cat_file(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
