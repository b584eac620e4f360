"""Sentence encoders: `minilm` (embedded) and any `sentence-transformers` or transformers folder."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.batching import MIN_ROWS, FloatArray, IntArray, run_batches, slices
from models.encoder_folder import POOLINGS, EncoderSettings, Kind, read_settings
from models.encoder_text import Pieces, cut_pieces, prompt_length
from models.protocols import ModelInfo
from models.scorers.sequence import align_weights, default_budget, one_line, pad, position_limit
from models.store import quiet_transformers
from schemas.errors import ModelError

Long = Literal["truncate", "mean"]
_BATCH_CHARACTERS = 4_000_000
# Chains that are computed here, in our own batches; any other is left to the library as a whole.
_KNOWN_MODULES = {"Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout"}


@dataclass(frozen=True)
class Embedded:
    """Vectors of n texts, and what was done to get them.

    Attributes:
        vectors: float32 of shape (n, dimension); a row that is not finite says that the model overflowed.
        tokens: int64 (n,): tokens of each text whole, special ones and the prompt's included; 0 where the
            library does not say.
        windows: int64 (n,): windows that were embedded; more than one only with `long="mean"`.
        truncated: bool (n,): whether tokens were left out.
        norms: float32 (n,): length of the vector as the model gave it, before any normalisation (weighted by
            tokens over the windows).
    """

    vectors: FloatArray
    tokens: IntArray
    windows: IntArray
    truncated: npt.NDArray[np.bool_]
    norms: FloatArray


class SentenceEncoder:
    """Embeds texts with a `sentence-transformers` model.

    Args:
        folder: A `sentence-transformers` folder (modules.json), or a plain transformers one (mean pooling).
        info: What manifests record of it.
        device: `auto` (CUDA if there is one) or a torch device.
        dtype: `float32`, `bfloat16` or `auto` (bfloat16 where the hardware multiplies it: cosines then move
            by up to 0.003).
        threads: torch threads of this process.
        token_budget: Most padded tokens in a batch; by default 4096 on a CPU, 65536 elsewhere.
        pooling: How token vectors become one, instead of what the folder says.

    Raises:
        ModelError: The folder cannot be loaded, or there is no such pooling.
    """

    def __init__(
        self,
        folder: Path,
        info: ModelInfo,
        *,
        device: str = "auto",
        dtype: str = "float32",
        threads: int = 1,
        token_budget: int | None = None,
        pooling: str | None = None,
    ) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from models.lm.loading import pick_device, pick_dtype

        torch.set_num_threads(threads)
        self.info = info
        # What tells its numbers from those of the same weights used otherwise.
        self.variant = f"pooling={pooling or ''};dtype={dtype}"
        self.settings: EncoderSettings = read_settings(folder)
        self._device = pick_device(device)
        with quiet_transformers(), one_line(info.name, folder):
            self.model = SentenceTransformer(
                str(folder),
                device=str(self._device),
                local_files_only=True,
                model_kwargs={"dtype": pick_dtype(dtype, self._device)},
            )
        if pooling is not None:
            _set_pooling(self.model, pooling, info.name)
        self.model.eval()
        align_weights(self.model)
        self.tokenizer = self.model.tokenizer
        self.dimension = int(self.model.get_embedding_dimension() or 0)
        self._chain = list(self.model)
        first: Any = self._chain[0]
        self._by_library = not (
            {type(m).__name__ for m in self._chain} <= _KNOWN_MODULES
            and "message" not in getattr(first, "modality_config", {})
        )
        # Measured: one text alone gives the bits it gives in company, for there are eight tokens at least. A dense layer
        # behind the pooling multiplies one row a text.
        self._min_rows = MIN_ROWS if any(type(m).__name__ == "Dense" for m in self._chain) else 1
        self._prompt_in_pool = all(getattr(m, "include_prompt", True) for m in self._chain)
        # We normalise ourselves, to know how long the vectors were.
        if type(self._chain[-1]).__name__ == "Normalize":
            self._chain.pop()
        self.normalizes = self.settings.normalizes
        if self._by_library:
            most = self.model.max_seq_length or 0
            self.limit = int(most) if math.isfinite(most) else 0
        elif not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(f"{info.name} has no fast tokenizer; save a tokenizer.json beside its weights")
        else:
            config = getattr(first, "auto_model", None) or first.model
            allowed = position_limit(config.config, self.tokenizer)
            self.limit = min(allowed, self.model.max_seq_length or allowed)
        self._budget = token_budget or default_budget(self._device)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts of any length, with no prompt.

        Args:
            texts: n texts. One over the model's limit is embedded in consecutive windows, whose vectors are
                averaged by their tokens, so that its end counts too.

        Returns:
            float32 of shape (n, dimension), each of unit length, in the order of `texts`.

        Raises:
            ModelError: A vector is not finite, or null.
        """
        vectors = self.embed(texts, normalize=True).vectors
        lengths = np.einsum("ij,ij->i", vectors, vectors)
        bad = ~(np.isfinite(lengths) & (lengths > 0))
        if bad.any():
            raise ModelError(
                f"{self.info.name}: the vector of text {np.flatnonzero(bad)[0]} is null or not finite; "
                "try dtype=float32"
            )
        return vectors

    def embed(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        kind: Kind = "document",
        long: Long = "mean",
        normalize: bool | None = None,
        dimensions: int | None = None,
    ) -> Embedded:
        """Embed texts, and say what was done.

        Args:
            texts: n texts.
            prompt: Put before every text, and before every window of a long one.
            kind: What they are; only models that route queries and documents apart use it.
            long: A text over the limit is embedded in consecutive windows, averaged by their tokens (`mean`), or
                cut at the limit (`truncate`, what `sentence-transformers` does).
            normalize: Whether to give vectors unit length; None as the model's own configuration says.
            dimensions: Keep the first so many numbers of each vector (Matryoshka models), before normalising.

        Returns:
            Vectors in the order of `texts`. On a CPU a vector does not depend, in any bit, on the texts beside it.

        Raises:
            ModelError: The prompt leaves no room for text, or `dimensions` exceeds the model's.
        """
        if dimensions is not None and not 0 < dimensions <= self.dimension:
            raise ModelError(f"{self.info.name} has {self.dimension} dimensions, not {dimensions}")
        unit = self.normalizes if normalize is None else normalize
        parts = [
            self._embed(texts[part], prompt, kind, long, unit, dimensions)
            for part in slices([len(t) for t in texts], _BATCH_CHARACTERS)
        ]
        if not parts:
            none = np.zeros(0, np.int64)
            empty = np.zeros((0, dimensions or self.dimension), np.float32)
            return Embedded(empty, none, none, np.zeros(0, bool), np.zeros(0, np.float32))
        columns = zip(*((p.vectors, p.tokens, p.windows, p.truncated, p.norms) for p in parts), strict=True)
        return Embedded(*(c[0] if len(c) == 1 else np.concatenate(c) for c in columns))

    def _embed(
        self,
        texts: Sequence[str],
        prompt: str,
        kind: Kind,
        long: Long,
        unit: bool,
        dimensions: int | None,
    ) -> Embedded:
        if self._by_library:
            return self._ask_library(texts, prompt, kind, unit, dimensions)
        pieces = cut_pieces(
            self.tokenizer, texts, self.limit, self._lock, prompt=prompt, whole=long == "mean"
        )
        skip = 0 if self._prompt_in_pool or not prompt else prompt_length(self.tokenizer, prompt, self._lock)
        vectors = run_batches(
            pieces.sequences,
            lambda sequences, length: self._forward(sequences, length, skip),
            budget=self._budget,
            limit=self.limit,
            width=self.dimension,
            min_rows=self._min_rows,
        )
        return _combine(pieces, vectors[:, :dimensions] if dimensions else vectors, len(texts), unit)

    def _forward(self, sequences: list[Sequence[int]], length: int, skip: int) -> FloatArray:
        import torch

        ids, mask = pad(sequences, length, self.tokenizer.pad_token_id, self._device)
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(ids)
        if skip:
            features["prompt_length"] = skip
        with torch.inference_mode():
            for module in self._chain:
                features = module(features)
            vectors: FloatArray = features["sentence_embedding"].float().cpu().numpy()
        return vectors

    def _ask_library(
        self, texts: Sequence[str], prompt: str, kind: Kind, unit: bool, dimensions: int | None
    ) -> Embedded:
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        with self._lock:
            given = encode(list(texts), prompt=prompt, show_progress_bar=False, convert_to_numpy=True)
        vectors = np.asarray(given, np.float32).reshape(len(texts), -1)[:, :dimensions]
        norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
        unknown = np.zeros(len(texts), np.int64)
        return Embedded(
            _to_unit(vectors) if unit else vectors, unknown, unknown + 1, np.zeros(len(texts), bool), norms
        )


def _combine(pieces: Pieces, vectors: FloatArray, n: int, unit: bool) -> Embedded:
    """One vector a text: that of its window, or the mean of its windows weighted by their tokens."""
    norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
    if unit:
        vectors = _to_unit(vectors)
    windows = np.bincount(pieces.owner, minlength=n).astype(np.int64)
    out, lengths = vectors, norms
    if len(pieces.sequences) != n:
        weights = np.fromiter(map(len, pieces.sequences), np.float32, len(pieces.sequences))
        first = np.searchsorted(pieces.owner, np.arange(n))
        out, lengths = vectors[first], norms[first]
        # Only where there are several: a vector brought to unit length twice is another in its last bit.
        several = np.flatnonzero(windows > 1)
        total = np.add.reduceat(weights, first)[several, None]
        mean = np.add.reduceat(vectors * weights[:, None], first, axis=0)[several] / total
        out[several] = _to_unit(mean) if unit else mean
        lengths[several] = np.add.reduceat(norms * weights, first)[several] / total[:, 0]
    return Embedded(out, pieces.tokens, windows, pieces.truncated, lengths)


def _to_unit(vectors: FloatArray) -> FloatArray:
    """Rows of unit length; null rows stay null, rows that are not finite stay so."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (vectors / np.where(norms == 0, 1, norms)).astype(np.float32, copy=False)


def _set_pooling(model: Any, mode: str, name: str) -> None:
    if mode not in POOLINGS:
        raise ModelError(f"no pooling '{mode}'; choose one of: {', '.join(POOLINGS)}")
    for key, module in model.named_children():
        if type(module).__name__ == "Pooling":
            size = getattr(module, "embedding_dimension", None) or module.word_embedding_dimension
            model.set_submodule(
                key, type(module)(size, mode, include_prompt=getattr(module, "include_prompt", True))
            )
            return
    raise ModelError(f"{name} has no pooling that could be set to '{mode}'")
