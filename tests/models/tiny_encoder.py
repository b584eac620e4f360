"""Tiny random sentence encoders with real tokenizers, saved as `sentence-transformers` saves them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.models.tiny_classifier import save_settings

PROMPTS = {"query": "a query : ", "passage": "the passage : "}


def save_encoder(
    folder: Path,
    *,
    limit: int = 32,
    pooling: str = "mean",
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    include_prompt: bool = True,
    similarity: str | None = None,
    dense: int | None = None,
    seed: int = 3,
) -> Path:
    """A random two-layer `sentence-transformers` model."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import AutoConfig, BertModel

    base = save_settings(folder / "base", limit=limit)
    torch.manual_seed(seed)
    model = BertModel(AutoConfig.from_pretrained(base))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(base)
    words = Transformer(str(base), max_seq_length=limit)
    parts = [words, Pooling(32, pooling_mode=pooling, include_prompt=include_prompt)]
    if dense:
        parts.append(Dense(32, dense))
    if normalize:
        parts.append(Normalize())
    SentenceTransformer(
        modules=parts, device="cpu", prompts=prompts or {}, similarity_fn_name=similarity
    ).save(str(folder / "model"))
    return folder / "model"


def old_layout(folder: Path) -> Path:
    """Rewrite a saved encoder's pooling as sentence-transformers before 6 wrote it."""
    path = folder / "1_Pooling" / "config.json"
    config = json.loads(path.read_text())
    mode = config["pooling_mode"]
    names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{name}": key == mode for key, name in names.items()}
    path.write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    return folder
