"""Sentence encoders: `minilm` (embedded) and any `sentence-transformers` folder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.batching import FloatArray, run_batches, slices
from models.protocols import ModelInfo
from models.scorers.sequence import default_budget, one_line, pad, position_limit, tokenize_windows
from models.store import quiet_transformers
from schemas.errors import ModelError

_BATCH_CHARACTERS = 4_000_000


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

    Raises:
        ModelError: The folder cannot be loaded.
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
    ) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from models.lm.loading import pick_device, pick_dtype

        torch.set_num_threads(threads)
        self.info = info
        self._device = pick_device(device)
        with quiet_transformers(), one_line(info.name, folder):
            self.model = SentenceTransformer(
                str(folder),
                device=str(self._device),
                local_files_only=True,
                model_kwargs={"dtype": pick_dtype(dtype, self._device)},
            )
        self.model.eval()
        self.tokenizer = self.model.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(f"{info.name} has no fast tokenizer; save a tokenizer.json beside its weights")
        self.dimension = int(self.model.get_embedding_dimension() or 0)
        first: Any = self.model[0]
        allowed = position_limit(first.auto_model.config, self.tokenizer)
        self.limit = min(allowed, self.model.max_seq_length or allowed)
        self._budget = token_budget or default_budget(self._device)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts of any length.

        Args:
            texts: n texts. One over the model's limit is embedded in consecutive windows, whose vectors are
                averaged by their tokens, so that its end counts too.

        Returns:
            float32 of shape (n, dimension), each of unit length, in the order of `texts`.

        Raises:
            ModelError: A vector is not finite, or null.
        """
        out = np.zeros((len(texts), self.dimension), np.float32)
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            out[part] = self._encode(texts[part])
        return out

    def _encode(self, texts: Sequence[str]) -> FloatArray:
        sequences, owner = tokenize_windows(self.tokenizer, texts, self.limit, self._lock, overlap=0)
        vectors = run_batches(
            sequences, self._embed, budget=self._budget, limit=self.limit, width=self.dimension
        )
        vectors = _unit(vectors, self.info.name)
        if len(sequences) == len(texts):
            return vectors
        tokens = np.fromiter(map(len, sequences), np.float32, len(sequences))
        first = np.searchsorted(owner, np.arange(len(texts)))
        out = vectors[first]
        # Only where there are several: a vector brought to unit length twice is another in its last bit.
        several = np.flatnonzero(np.bincount(owner, minlength=len(texts)) > 1)
        sums = np.add.reduceat(vectors * tokens[:, None], first, axis=0)
        out[several] = _unit(sums[several], self.info.name)
        return out

    def _embed(self, sequences: list[Sequence[int]], length: int) -> FloatArray:
        import torch

        ids, mask = pad(sequences, length, self.tokenizer.pad_token_id, self._device)
        features = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(ids)
        with torch.inference_mode():
            vectors: FloatArray = self.model(features)["sentence_embedding"].float().cpu().numpy()
        return vectors


def _unit(vectors: FloatArray, name: str) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0))
    if bad.any():
        raise ModelError(
            f"{name}: the vector of text {np.flatnonzero(bad)[0]} is null or not finite; try dtype=float32"
        )
    return (vectors / norms).astype(np.float32, copy=False)
