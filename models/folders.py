"""Model folders and hub ids: finding one, saying what it is or why it cannot be used, before loading."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from models.lm.folder import read_config, weight_files
from models.protocols import ModelInfo
from models.store import sha256_of_files
from schemas.errors import ModelError

__all__ = ["describe_folder", "read_config", "read_training", "resolve", "weight_files"]

_SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(reference: str, *, weights: bool = True) -> tuple[Path, str]:
    """The folder a reference means, fetched if it is a hub id that is not in the hub's cache yet.

    Args:
        reference: A folder, or a hub id with an optional revision (`org/name@revision`).
        weights: Whether its weights are wanted, or only configuration and tokenizer.

    Returns:
        The folder, and the hub's commit where it came from there (else an empty string).

    Raises:
        ModelError: No such folder, and the hub has no such model or cannot be reached.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder, ""
    repository, _, revision = reference.partition("@")
    if reference.startswith((".", "/", "~")) or repository.count("/") > 1 or not repository:
        raise ModelError(
            f"there is no folder {reference}; pass an existing model folder or a hub id (org/name)"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        raise ModelError("hub models need huggingface-hub; run: pip install 'tamis[models]'") from error

    def fetch(patterns: list[str], local: bool) -> Path:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=patterns, local_files_only=local
            )
        )

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        got = fetch([*_SETTINGS, "*.safetensors"] if weights else _SETTINGS, offline)
        if weights and not any(got.glob("*.safetensors")):
            got = fetch([*_SETTINGS, "pytorch_model*.bin"], offline)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set and it is not cached" if offline else type(error).__name__
        raise ModelError(
            f"'{reference}' is no folder here, and the hub did not give it ({why}); pass a folder"
        ) from error
    commit = got.name if _COMMIT.fullmatch(got.name) else ""
    return got, commit


def describe_folder(kind: str, name: str, folder: Path, commit: str = "", **extra: object) -> ModelInfo:
    """What manifests record of a folder: its weights' sha256, or the hub commit it was fetched at.

    A folder that tamis trained also says what it was trained on (`train.json`). Where a scorer's revision is a commit the hash
    stands beside it, so that a judge is known from a ranker that is the same weights by another way.

    Raises:
        ModelError: It lacks its configuration or its weights.
    """
    config = read_config(folder)
    weights = weight_files(folder)
    trained = read_training(folder)
    digest = sha256_of_files(weights)[:16] if not commit or kind == "scorer" else ""
    if commit and digest:
        extra["weights"] = digest
    return ModelInfo(
        name=name,
        kind=kind,
        revision=commit or digest,
        source=str(folder) if not commit else name.removeprefix("hf:"),
        licence=str((trained.get("model") or {}).get("licence") or ""),
        training_data=str(trained.get("training_data") or ""),
        extra={"architecture": (config.get("architectures") or [config.get("model_type", "")])[0], **extra},
    )


def read_training(folder: Path) -> dict[str, Any]:
    """The record of the training that made a folder (`train.json`); empty where there is none."""
    try:
        record = json.loads((folder / "train.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
