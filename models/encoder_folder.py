"""What a sentence encoder's folder says of itself, read without loading a weight.

    modules.json                          the chain: transformer, pooling, dense layers, normalisation
    config_sentence_transformers.json     prompts by name, the default one, the similarity it was trained for
    sentence_bert_config.json             its own limit of tokens
    <n>_Pooling/config.json               how token vectors become one

    router_config.json                    a router in front: a chain for queries and one for documents

A folder without `modules.json` is a plain transformers model: mean pooling, no normalisation, no prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models import store
from models.folders import describe_folder, resolve
from models.lm.folder import read_config, weight_files
from models.protocols import ModelInfo
from models.store import sha256_of_files
from schemas.errors import ModelError

Kind = Literal["query", "document"]
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
# As sentence-transformers looks for them. It takes the first name there is, and since its version 6 every model has
# an empty `document`, which hides a `passage` prompt; here the first that is not empty is taken.
PROMPT_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}


@dataclass(frozen=True)
class EncoderSettings:
    """How a model wants to be used.

    Attributes:
        modules: Classes of its chain, by their last name (`Transformer`, `Pooling`, `Normalize`); behind a `Router` that
            stands in front, those of the documents' route.
        pooling: How token vectors become one, `+` between several; empty where the chain has no pooling.
        normalizes: Whether its vectors have unit length.
        prompts: What is put before a text, by name.
        default_prompt: Name of the prompt used where no other fits.
        similarity: `cosine`, `dot`, `euclidean` or `manhattan`.
        dimension: Of its vectors, where its files say; else 0.
    """

    modules: tuple[str, ...] = ("Transformer", "Pooling")
    pooling: str = "mean"
    normalizes: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"
    dimension: int = 0

    def prompt(self, kind: Kind, name: str | None = None, prefix: str | None = None) -> str:
        """The text put before every query or document.

        Args:
            kind: What the texts are.
            name: A prompt of the model, by name; None takes the one meant for `kind`, if there is any.
            prefix: The text itself; it wins over names.

        Raises:
            ModelError: The model has no prompt of that name.
        """
        if prefix is not None:
            return prefix
        if name is not None:
            if name not in self.prompts:
                known = ", ".join(self.prompts) or "none"
                raise ModelError(f"the model has no prompt '{name}' (it has: {known}); pass --prefix TEXT")
            return self.prompts[name]
        for candidate in PROMPT_NAMES[kind]:
            if self.prompts.get(candidate):
                return self.prompts[candidate]
        # As in sentence-transformers: an explicit empty prompt keeps the default one away.
        if any(candidate in self.prompts for candidate in PROMPT_NAMES[kind]):
            return ""
        return self.prompts.get(self.default_prompt or "", "")


def read_settings(folder: Path) -> EncoderSettings:
    """Read the settings of an encoder's folder.

    Raises:
        ModelError: One of its JSON files cannot be read.
    """
    head = _json(folder / "config_sentence_transformers.json") or {}
    prompts = {str(k): str(v) for k, v in (head.get("prompts") or {}).items()}
    common: dict[str, Any] = {
        "prompts": prompts,
        "default_prompt": head.get("default_prompt_name"),
        "similarity": head.get("similarity_fn_name") or "cosine",
    }
    chain = _chain(folder)
    if not chain:
        dimension = int((_json(folder / "config.json") or {}).get("hidden_size") or 0)
        return EncoderSettings(dimension=dimension, **common)
    modules = tuple(str(m["type"]).rpartition(".")[2] for m in chain)
    pooling, dimension = "", 0
    for name, module in zip(modules, chain, strict=True):
        config = _json(folder / module["path"] / "config.json") or {}
        if name == "Transformer":
            dimension = int(config.get("hidden_size") or 0)
        elif name == "Pooling":
            pooling = _pooling(config)
            size = config.get("embedding_dimension", config.get("word_embedding_dimension"))
            dimension = int(size or 0) * (1 + pooling.count("+"))
        elif name == "StaticEmbedding":
            dimension = _width(folder / module["path"] / "model.safetensors")
        elif name == "Dense":
            dimension = int(config.get("out_features") or dimension)
    return EncoderSettings(modules, pooling, "Normalize" in modules, dimension=dimension, **common)


def encoder_name(name: str) -> str:
    """An encoder as the registry takes it: `hf:` stands before a folder of this machine."""
    return f"hf:{name}" if Path(name).is_dir() else name


def find_folder(name: str) -> Path:
    """The folder of an encoder by name.

    Raises:
        ModelError: It cannot be had.
    """
    family, _, reference = name.partition(":")
    return resolve(reference)[0] if family == "hf" and reference else store.path(store.canonical(name))


def describe_encoder(name: str, folder: Path, commit: str = "") -> ModelInfo:
    """What manifests record of an encoder's folder.

    Raises:
        ModelError: It lacks its configuration or its weights.
    """
    settings = read_settings(folder)
    extra = {"pooling": settings.pooling, "similarity": settings.similarity, "dimension": settings.dimension}
    chain = _chain(folder)
    if not chain or (folder / "config.json").is_file():
        return describe_folder("encoder", name, folder, commit, **extra)
    if settings.modules[0] == "Router":
        return _info(name, folder, commit, sorted(folder.glob("*/*.safetensors")), "Router", extra)
    # Older folders keep the transformer in 0_Transformer/, and a static embedding has no config.json at all.
    inner = folder / chain[0]["path"]
    weights = weight_files(inner)
    if settings.modules[0] == "Transformer":
        read_config(inner)
    return _info(name, folder, commit, weights, settings.modules[0], extra)


def _info(
    name: str, folder: Path, commit: str, weights: list[Path], architecture: str, extra: dict[str, Any]
) -> ModelInfo:
    if not weights:
        raise ModelError(f"{folder} holds no weights (*.safetensors)")
    return ModelInfo(
        name=name,
        kind="encoder",
        revision=commit or sha256_of_files(weights)[:16],
        source=str(folder) if not commit else name.removeprefix("hf:"),
        extra={"architecture": architecture, **extra},
    )


def _chain(folder: Path) -> list[dict[str, Any]]:
    """The modules as `modules.json` lists them; those of the documents' route behind a router that stands in front."""
    listed: list[dict[str, Any]] = _json(folder / "modules.json") or []
    if not listed or not str(listed[0]["type"]).endswith("Router"):
        return listed
    told = _json(folder / listed[0]["path"] / "router_config.json") or {}
    routes = told.get("structure") or {}
    route = "document" if "document" in routes else (told.get("parameters") or {}).get("default_route")
    inner = [{"path": p, "type": (told.get("types") or {}).get(p, "")} for p in routes.get(route, [])]
    return [listed[0], *inner, *listed[1:]]


def _pooling(config: Mapping[str, Any]) -> str:
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        return mode
    if isinstance(mode, list):
        return "+".join(map(str, mode))
    # The layout before sentence-transformers 6: one flag a mode.
    flags = {
        "cls": "pooling_mode_cls_token",
        "max": "pooling_mode_max_tokens",
        "mean": "pooling_mode_mean_tokens",
        "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
        "weightedmean": "pooling_mode_weightedmean_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    return "+".join(name for name, flag in flags.items() if config.get(flag)) or "mean"


def _width(path: Path) -> int:
    """Columns of the first matrix of a safetensors file, from its header."""
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - no mapping
    return next((int(shape[1]) for shape in shapes if len(shape) == 2), 0)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); copy the model again") from error
