"""What can be said of a model folder without loading its weights: is it whole, what is it, which adapter fits."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.protocols import ModelInfo
from schemas.errors import ModelError

ADAPTERS = Path(__file__).parent.parent / "adapters"
MANIFEST = "model.json"  # written by models.store beside what it converted
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
TRAINED_IN = "_tamis"  # a job keeps the models it trains in this folder of its output
_LFS = b"version https://git-lfs"


def describe_folder(folder: str | Path, name: str = "", adapter: str | Path | None = None) -> ModelInfo:
    """Describe a causal language model's folder, or say in one line why it cannot be used.

    Reads the configuration and hashes the weight files (a folder from tamis's own cache has that on record).

    Args:
        folder: As `save_pretrained` writes it: config.json, a tokenizer, weights.
        name: What to call it; by default `hf:<folder>`.
        adapter: Name or folder of a LoRA adapter (see `find_adapter`).

    Returns:
        Name (with `+adapter`), revision, source and licence; `extra` says architecture and adapter.

    Raises:
        ModelError: No such folder, no configuration, no tokenizer, no weights, or an adapter that is not one.
    """
    path = Path(folder)
    config = read_config(path)
    weights = weight_files(path)
    if not any((path / file).is_file() for file in TOKENIZERS):
        raise ModelError(f"{path} holds no tokenizer ({TOKENIZERS[0]}); save the tokenizer beside the model")
    record = _record(path)
    revision = str(record.get("revision") or _sha256(weights))[:16]
    name = name or f"hf:{_label(path)}"
    extra: dict[str, Any] = {"architecture": (config.get("architectures") or [config.get("model_type")])[0]}
    if adapter is not None:
        adapter_path = find_adapter(adapter)
        revised = adapter_revision(adapter_path)
        label = str(adapter) if adapter_path.parent == ADAPTERS else _label(adapter_path)
        extra |= {"adapter": label, "adapter_revision": revised}
        name = f"{name}+{label}"
        revision = hashlib.sha256(f"{revision}+{revised}".encode()).hexdigest()[:16]
    return ModelInfo(
        name=name,
        kind="lm",
        revision=revision,
        source=str(record.get("source") or path),
        licence=str(record.get("licence") or ""),
        training_data=str(record.get("training_data") or ""),
        extra={**record.get("extra", {}), **extra},
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ModelError: No folder, no file, not JSON.
    """
    if not path.is_dir():
        raise ModelError(f"No model folder at {path}")
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        hint = "; it is an adapter: pass it as adapter=" if (path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{path} holds no config.json, so it is no model folder{hint}") from None
    except ValueError as error:
        raise ModelError(f"{path / 'config.json'} is not JSON ({error})") from error
    return config


def weight_files(path: Path, patterns: tuple[str, ...] = WEIGHTS) -> list[Path]:
    """The weight files of a folder, sorted; those of the first pattern that has any.

    Raises:
        ModelError: None there, one is empty, or one is a git-lfs pointer; an index names one that is missing.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        files = [f for f in found if patterns is ADAPTER_WEIGHTS or not f.name.startswith("adapter_")]
        if files:
            break
    if not files:
        raise ModelError(f"{path} holds no weights ({' or '.join(patterns)})")
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
        if start == _LFS:
            raise ModelError(f"{file} is a git-lfs pointer, not weights; run: git lfs pull")
        if not start:
            raise ModelError(f"{file} is empty; copy the model again")
    index = (
        path
        / f"{'model' if files[0].suffix == '.safetensors' else 'pytorch_model'}{files[0].suffix}.index.json"
    )
    if patterns is WEIGHTS and index.is_file():
        named = sorted(set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values()))
        missing = [shard for shard in named if not (path / shard).is_file()]
        if missing:
            raise ModelError(
                f"{path} lacks {missing[0]} ({len(missing)} of {len(named)} weight files missing)"
            )
    return files


def find_adapter(adapter: str | Path) -> Path:
    """Folder of a LoRA adapter.

    Args:
        adapter: Name of one shipped with tamis (`detox`), or a path.

    Raises:
        ModelError: Neither; or the folder is not a PEFT adapter.
    """
    shipped = ADAPTERS / str(adapter)
    path = shipped if "/" not in str(adapter) and shipped.is_dir() else Path(adapter)
    if not (path / "adapter_config.json").is_file():
        names = sorted(file.parent.name for file in ADAPTERS.glob("*/adapter_config.json"))
        known = f"; shipped ones are {', '.join(names)}" if names else ""
        raise ModelError(f"No adapter '{adapter}': {path} holds no adapter_config.json{known}")
    weight_files(path, ADAPTER_WEIGHTS)
    return path


def adapter_revision(folder: Path) -> str:
    """Sixteen hexadecimal digits that change with an adapter's weights.

    Raises:
        ModelError: It has none.
    """
    return _sha256(weight_files(folder, ADAPTER_WEIGHTS))[:16]


def _label(path: Path) -> str:
    """What records call a folder: its path, or for a model a job trained for itself its name, wherever the job lies."""
    return path.name if path.parent.name == TRAINED_IN else str(path)


def _record(path: Path) -> dict[str, Any]:
    """What the model cache wrote of a folder it made; empty for any other folder."""
    try:
        record: dict[str, Any] = json.loads((path / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if record.get("kind") == "lm" else {}


def _sha256(files: list[Path]) -> str:
    """One sha256 over the contents of files, in order."""
    stats = [file.stat() for file in files]
    return _sha256_of(tuple((str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)))


@lru_cache(maxsize=64)
def _sha256_of(files: tuple[tuple[str, int, int], ...]) -> str:
    state = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    return state.hexdigest()
