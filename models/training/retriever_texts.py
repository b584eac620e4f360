"""Texts of groups as the trainer takes them: tokens for an encoder, vectors for a head.

Import this module late: it needs torch and sentence-transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.encoder_folder import Kind
from models.training.loading import BaseModel
from models.training.retriever_batches import QueryFeatures, TokenTable, VectorFeatures
from models.training.retriever_data import GroupData
from models.training.retriever_model import longest_input
from models.training.retriever_settings import RetrieverSettings
from schemas.errors import ModelError
from schemas.fingerprint import config_hash

_TEXTS = 4096  # texts tokenised together, or embedded between two saved parts
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GroupTexts:
    """Tokens of the queries (a row each) and of the documents, prompts included; None where documents have vectors."""

    queries: TokenTable
    documents: TokenTable | None
    prompt_lengths: dict[Kind, int]


@dataclass(frozen=True)
class GroupVectors:
    """Vectors of the queries (a row each) and of the documents: float32 (rows, d), (documents, d).

    Queries that are trained as text have none, nor has what is not embedded yet.
    """

    queries: FloatArray | None
    documents: FloatArray | None

    def features(self, texts: GroupTexts | None, pad: int, chunk: int) -> VectorFeatures | QueryFeatures:
        """As the collator takes them: the queries as `texts`, or as vectors."""
        assert self.documents is not None
        if texts is not None:
            return QueryFeatures(texts.queries, self.documents, pad, chunk)
        assert self.queries is not None
        return VectorFeatures(self.queries, self.documents)


def tokenize_groups(
    groups: GroupData, encoder: Any, settings: RetrieverSettings, prompts: dict[str, str]
) -> GroupTexts:
    """Tokenise queries, and documents that are trained as text, behind their prompts, cut at the settings' lengths.

    Raises:
        ModelError: A length is more than the model can see, or no more than its prompt.
    """
    limit = longest_input(encoder)
    tables, lengths = {}, {}
    sides: dict[Kind, tuple[Sequence[str | None], int, str]] = {
        "query": (groups.queries, settings.query_length, "--query-length"),
        "document": (groups.documents, settings.passage_length, "--passage-length"),
    }
    if settings.documents_have_vectors:
        del sides["document"]
    for kind, (texts, longest, option) in sides.items():
        if longest > limit:
            raise ModelError(f"{option} {longest} is more than the model can see ({limit})")
        prompt = prompts[kind]
        taken = len(encoder.tokenizer(prompt)["input_ids"]) if prompt else 0
        if taken >= longest:
            raise ModelError(
                f"the prompt of a {kind} takes {taken} tokens: {option} {longest} leaves no room for text"
            )
        tables[kind] = _tokenize(encoder.tokenizer, texts, longest, prompt)
        pools = [m for m in encoder if hasattr(m, "include_prompt")]
        if prompt and any(not m.include_prompt for m in pools):
            lengths[kind] = taken - 1  # the last special token stands behind the text
    return GroupTexts(tables["query"], tables.get("document"), lengths)


def _tokenize(tokenizer: Any, texts: Sequence[str | None], longest: int, prompt: str) -> TokenTable:
    sequences: list[Sequence[int]] = []
    for start in range(0, len(texts), _TEXTS):
        part = [prompt + (t or "") for t in texts[start : start + _TEXTS]]
        sequences += tokenizer(
            part,
            truncation=True,
            max_length=longest,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
    return TokenTable.of(sequences, len(tokenizer))


def embed_groups(
    groups: GroupData,
    encoder: Any,
    base: BaseModel,
    prompts: dict[str, str],
    cache: Path,
    *,
    kinds: Sequence[Kind],
    device: str,
    say: Callable[[str], None],
) -> GroupVectors:
    """Embed the groups' texts once; parts that are there already are read.

    Args:
        groups: With texts.
        encoder: A `sentence-transformers` model.
        base: What it was loaded from.
        prompts: Before queries and documents.
        cache: Folder the parts are kept in, so that a killed run goes on.
        kinds: What to embed.
        device: auto, cpu or cuda.
        say: Called with a line for people.

    Raises:
        ModelError: The model gives vectors that are not finite.
    """
    import torch

    place = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    encoder.to(place)
    made: dict[str, FloatArray] = {}
    for kind, texts in (("query", groups.queries), ("document", groups.documents)):
        if kind not in kinds:
            continue
        ask = encoder.encode_query if kind == "query" else encoder.encode_document
        parts = []
        for start in range(0, len(texts), _TEXTS):
            part = [t or "" for t in texts[start : start + _TEXTS]]
            key = config_hash({"base": base.revision, "prompt": prompts[kind], "texts": part})
            path = cache / f"{kind}-{start // _TEXTS:05d}-{key[-12:]}.npy"
            if path.is_file():
                parts.append(np.load(path))
                continue
            say(f"embed     {kind} {start:,} to {start + len(part):,} of {len(texts):,}")
            vectors = ask(part, prompt=prompts[kind], show_progress_bar=False, convert_to_numpy=True)
            vectors = np.asarray(vectors, np.float32)
            if not np.isfinite(vectors).all():
                raise ModelError(f"{base.name} gives vectors that are not finite")
            _save(path, vectors)
            parts.append(vectors)
        made[kind] = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    encoder.to("cpu")
    return GroupVectors(made.get("query"), made.get("document"))


def _save(path: Path, vectors: FloatArray) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, vectors)
    temporary.replace(path)
