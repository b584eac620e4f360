"""What is trained of a retriever: the encoder of both sides or of the queries alone, LoRA inside it, or heads over vectors.

Import this module late: it needs torch and sentence-transformers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from models import store
from models.encoder_folder import Kind
from models.losses.cached import encode_chunks
from models.scorers.sequence import position_limit
from models.training.classifier import is_pooler
from models.training.loading import BaseModel, LoraSettings, add_lora, call_by_hub_id, refuse_missing
from models.training.retriever_settings import Documents
from schemas.errors import ModelError

Chunks = Sequence[tuple[torch.Tensor, torch.Tensor]]


def load_sentence_encoder(base: BaseModel) -> Any:
    """The `sentence-transformers` model to start from, in float32 on the CPU.

    Raises:
        ModelError: It cannot be loaded, weights of it are missing, or it has no fast tokenizer.
    """
    from sentence_transformers import SentenceTransformer

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        with store.quiet_transformers(), _loading_told() as told:
            encoder = SentenceTransformer(base.source, device="cpu", model_kwargs={"dtype": torch.float32})
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{base.name} cannot be loaded as a sentence encoder ({why})") from error
    for loading in told:
        refuse_missing(loading, base, may_be_new=is_pooler)
    if not getattr(encoder.tokenizer, "is_fast", False):
        raise ModelError(f"{base.name} has no fast tokenizer; save a tokenizer.json beside its weights")
    found = _transformer_in(encoder)
    if found is not None:
        call_by_hub_id(found, base)
    return encoder


@contextlib.contextmanager
def _loading_told() -> Iterator[list[dict[str, Any]]]:
    """Within the context, what transformers tells of every model it loads: `sentence-transformers` throws it away."""
    told: list[dict[str, Any]] = []
    owner: Any = PreTrainedModel
    plain = owner.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        if options.get("output_loading_info"):
            return plain.__func__(cls, *args, **options)
        model, loading = plain.__func__(cls, *args, output_loading_info=True, **options)
        told.append(loading)
        return model

    owner.from_pretrained = classmethod(from_pretrained)
    try:
        yield told
    finally:
        owner.from_pretrained = plain


def transformer_of(encoder: Any) -> Any:
    """The transformers model inside a `sentence-transformers` chain.

    Raises:
        ModelError: There is none (a static embedding, say).
    """
    found = _transformer_in(encoder)
    if found is None:
        raise ModelError(f"{type(encoder[0]).__name__} is no transformer to train; pass --train head")
    return found


def _transformer_in(encoder: Any) -> Any:
    first = encoder[0]
    return getattr(first, "auto_model", None) or getattr(first, "model", None)


def longest_input(encoder: Any) -> int:
    """Most tokens the encoder's positions allow."""
    return int(position_limit(transformer_of(encoder).config, encoder.tokenizer))


class TextRetriever(nn.Module):
    """An encoder as training runs it: chunks of queries and documents in, vectors out.

    Args:
        encoder: A `sentence-transformers` model.
        cached: Encode every chunk again for its gradient, and keep only vectors in between.
        prompt_lengths: Tokens of the prompts, where the model's pooling leaves them out.
    """

    def __init__(
        self, encoder: Any, *, cached: bool = False, prompt_lengths: dict[Kind, int] | None = None
    ) -> None:
        super().__init__()
        self.chain = nn.ModuleList(list(encoder))
        self.cached = cached
        self.prompt_lengths = prompt_lengths or {}
        for name, parameter in self.named_parameters():
            if ".pooler." in name:  # BERT's own, which no pooling of ours reads: it never gets a gradient
                parameter.requires_grad_(False)

    def forward(self, queries: Chunks, documents: Chunks) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of queries and documents, float (b, d) and (m, d), in the order of their chunks."""
        return self.encode(queries, "query"), self.encode(documents, "document")

    def encode(self, chunks: Chunks, kind: Kind) -> torch.Tensor:
        """Vectors of the texts of some chunks (ids and mask, int64 (n, t))."""
        return encode_chunks(lambda ids, mask: self._one(ids, mask, kind), list(chunks), cached=self.cached)

    def _one(self, ids: torch.Tensor, mask: torch.Tensor, kind: Kind) -> torch.Tensor:
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.prompt_lengths.get(kind):
            features["prompt_length"] = self.prompt_lengths[kind]
        for module in self.chain:
            routed = "task" in getattr(module, "forward_kwargs", ())
            features = module(features, task=kind) if routed else module(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors


class QueryRetriever(TextRetriever):
    """An encoder of queries, trained against documents whose vectors are there.

    Args:
        encoder: A `sentence-transformers` model: the queries' side.
        head: Maps the documents' vectors; None leaves them as they are.
        cached: As `TextRetriever`.
        prompt_lengths: As `TextRetriever`.
    """

    def __init__(
        self,
        encoder: Any,
        head: Head | None = None,
        *,
        cached: bool = False,
        prompt_lengths: dict[Kind, int] | None = None,
    ) -> None:
        super().__init__(encoder, cached=cached, prompt_lengths=prompt_lengths)
        self.document_head = head

    def forward(self, queries: Chunks, documents: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of queries (from chunks) and of documents (from float (m, d)): float (b, d) and (m, d)."""
        encoded = self.encode(queries, "query")
        if self.document_head is None:
            return encoded, documents
        with torch.autocast(documents.device.type, enabled=False):  # small steps away from the identity
            return encoded, self.document_head(documents)


def add_adapter(encoder: Any, settings: LoraSettings) -> Any:
    """Put LoRA into an encoder's transformer; all else is frozen.

    Returns:
        The PEFT model around the transformer. Its layers stand in the encoder's own transformer, in place.

    Raises:
        ModelError: No module of the names given.
    """
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    return add_lora(transformer_of(encoder), settings, task="FEATURE_EXTRACTION")


class Head(nn.Module):
    """A map of vectors that begins as the identity: x + W x, or x + W2 relu(W1 x + b1) + b2.

    Args:
        dimension: Of the vectors.
        width: Hidden units; 0 makes it linear.
    """

    def __init__(self, dimension: int, width: int = 0) -> None:
        super().__init__()
        self.dimension, self.width = dimension, width
        self.inner = nn.Linear(dimension, width) if width else None
        self.outer = nn.Linear(width or dimension, dimension, bias=bool(width))
        nn.init.zeros_(self.outer.weight)
        if width:
            nn.init.zeros_(self.outer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors float (n, d) to vectors float (n, d)."""
        hidden = torch.relu(self.inner(x)) if self.inner is not None else x
        out: torch.Tensor = x + self.outer(hidden)
        return out

    def layers(self) -> list[Any]:
        """The same map as plain `sentence-transformers` layers, which load with no code of ours.

        A dense layer has no way around it, so the identity is folded in: I + W where the head is linear; through a ReLU it
        passes as relu(x) - relu(-x), two more blocks of the inner matrix.
        """
        from sentence_transformers.sentence_transformer.modules import Dense

        d, eye = self.dimension, torch.eye(self.dimension)
        outer = self.outer.weight.detach().cpu()
        if self.inner is None:
            return [Dense(d, d, bias=False, activation_function=nn.Identity(), init_weight=eye + outer)]
        inner, bias = self.inner.weight.detach().cpu(), self.inner.bias.detach().cpu()
        wide = self.width + 2 * d
        first = Dense(
            d,
            wide,
            activation_function=nn.ReLU(),
            init_weight=torch.cat([inner, eye, -eye]),
            init_bias=torch.cat([bias, torch.zeros(2 * d)]),
        )
        second = Dense(
            wide,
            d,
            activation_function=nn.Identity(),
            init_weight=torch.cat([outer, eye, -eye], dim=1),
            init_bias=self.outer.bias.detach().cpu().clone(),
        )
        return [first, second]


class HeadRetriever(nn.Module):
    """A head over vectors that are there.

    Args:
        dimension: Of the vectors.
        width: Hidden units; 0: linear.
        documents: shared: mapped by the same head. fixed: left as they are. head: mapped by one of their own.
    """

    def __init__(self, dimension: int, *, width: int = 0, documents: Documents = "shared") -> None:
        super().__init__()
        self.head = Head(dimension, width)
        self.documents = documents
        self.document_head = Head(dimension, width) if documents == "head" else None

    def forward(self, queries: torch.Tensor, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of queries and documents, float (b, d) and (m, d)."""
        head = self.side("document")
        return self.head(queries), documents if head is None else head(documents)

    def side(self, kind: Kind) -> Head | None:
        """What maps one side; None where it stays as it is."""
        if kind == "query" or self.documents == "shared":
            return self.head
        return self.document_head

    def map(self, vectors: np.ndarray, kind: Kind) -> np.ndarray:
        """Vectors float32 (n, d) of one side as the trained model gives them, not normalised."""
        head = self.side(kind)
        if head is None:
            return vectors
        with torch.no_grad():
            mapped: np.ndarray = head(torch.from_numpy(vectors)).numpy()
        return mapped


def save_encoder(
    encoder: Any,
    folder: Path,
    *,
    prompts: dict[str, str],
    cosine: bool,
    model: Any = None,
    base: Any = None,
) -> None:
    """Save so that `SentenceTransformer(folder)` loads it.

    Args:
        encoder: The `sentence-transformers` model, trained or (with a `HeadRetriever`) as it was.
        folder: Where.
        prompts: `query` and `document`: what is put before a text.
        cosine: What the vectors are compared by; else inner products.
        model: What was trained. A `HeadRetriever`'s heads go behind the encoder, behind a router where the sides
            differ; a `QueryRetriever` makes the encoder the queries' route.
        base: With a `QueryRetriever`: the encoder as it was, the documents' route.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    end = [Normalize()] if cosine else []

    def behind(head: Head | None) -> list[Any]:
        return [] if head is None else [*head.layers(), *end]

    parts = list(encoder)
    if isinstance(model, HeadRetriever):
        if model.documents == "shared":
            parts += behind(model.head)
        else:
            # A route needs a module; vectors that are normalised already pass unchanged.
            kept = behind(model.document_head) or end or [_identity(model.head.dimension)]
            parts.append(Router({"query": behind(model.head), "document": kept}, default_route="document"))
    elif isinstance(model, QueryRetriever):
        routes = {"query": parts, "document": [*base, *behind(model.document_head)]}
        parts = [Router(routes, default_route="document")]
    model = SentenceTransformer(
        modules=parts, device="cpu", prompts=prompts, similarity_fn_name="cosine" if cosine else "dot"
    )
    with store.quiet_transformers():
        model.save(str(folder), create_model_card=False)


def _identity(dimension: int) -> Any:
    from sentence_transformers.sentence_transformer.modules import Dense

    return Dense(
        dimension, dimension, bias=False, activation_function=nn.Identity(), init_weight=torch.eye(dimension)
    )
