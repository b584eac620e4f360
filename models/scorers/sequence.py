"""Any transformers sequence classifier as a toxicity scorer; the engine beneath `detoxify:` and `hf:`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models.batching import FloatArray, IntArray, max_by_owner, run_batches, slices
from models.protocols import ModelInfo
from models.scorers.numbers import refuse_nan, sigmoid, softmax
from models.store import quiet_transformers
from schemas.errors import ModelError

if TYPE_CHECKING:
    import torch

# Padded tokens a batch. On a core more only leaves the cache (measured: 4096 is fastest for hidden sizes 384
# and 768); an accelerator wants to be filled.
CPU_BUDGET, ACCELERATOR_BUDGET = 4096, 65_536
_OVERLAP_SHARE = 8  # windows of an over-long text share an eighth of the limit
_BATCH_CHARACTERS = 4_000_000
_MAX_POSITIONS = 10**6  # tokenizers without a limit say 10**30
# Families whose positions begin behind the padding index.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "data2vec-text")


@dataclass(frozen=True)
class Head:
    """How a classifier's logits become labels.

    Attributes:
        labels: Names of what is returned, the headline one first.
        columns: The logits they come from.
        activation: `sigmoid` of each, or `softmax` over all logits of which the columns are then taken.
    """

    labels: tuple[str, ...]
    columns: tuple[int, ...]
    activation: Literal["sigmoid", "softmax"]


class SequenceScorer:
    """Scores texts with a transformers sequence classifier.

    Args:
        folder: As `save_pretrained` writes it: config, weights, a fast tokenizer.
        info: What manifests record of it.
        head: Which labels to return.
        device: `auto` (CUDA if there is one) or a torch device.
        dtype: `float32`, `bfloat16` or `auto` (bfloat16 where the hardware multiplies it).
        threads: torch threads of this process.
        token_budget: Most padded tokens in a batch; by default 4096 on a CPU, 65536 elsewhere.

    Raises:
        ModelError: The folder cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        info: ModelInfo,
        head: Head,
        *,
        device: str = "auto",
        dtype: str = "float32",
        threads: int = 1,
        token_budget: int | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from models.lm.loading import pick_device, pick_dtype

        torch.set_num_threads(threads)
        self.info, self.labels, self._head = info, head.labels, head
        self._device = pick_device(device)
        with quiet_transformers(), one_line(info.name, folder):
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self.model, loading = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                local_files_only=True,
                dtype=pick_dtype(dtype, self._device),
                output_loading_info=True,
            )
        # transformers fills weights that are missing with random numbers, and only warns.
        missing = [key for key in sorted(loading["missing_keys"]) if not key.endswith("position_ids")]
        if missing:
            raise ModelError(
                f"{info.name}: {folder} has no weights for {missing[0]}; it is no trained classifier"
            )
        if not self.tokenizer.is_fast:
            raise ModelError(f"{info.name} has no fast tokenizer; save a tokenizer.json beside its weights")
        if self.tokenizer.pad_token_id is None:
            raise ModelError(f"{info.name} has no padding token; set pad_token in its tokenizer_config.json")
        align_weights(self.model)
        widen_output(self.model, self.model.config.num_labels)
        self.model.to(self._device).eval()
        self.limit = position_limit(self.model.config, self.tokenizer)
        self._budget = token_budget or default_budget(self._device)
        self._lock = threading.Lock()  # truncation is state of a fast tokenizer

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score texts of any length.

        Args:
            texts: n texts. Those over the model's limit are scored in overlapping windows; the maximum is
                taken.

        Returns:
            float32 of shape (n, labels). An empty or blank text scores 0.

        Raises:
            ModelError: A score is not a number.
        """
        out = np.zeros((len(texts), len(self.labels)), np.float32)
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            full = [i for i in range(part.start, part.stop) if texts[i].strip()]
            if full:
                out[full] = self._score([texts[i] for i in full])
        return refuse_nan(out, self.info.name)

    def _score(self, texts: Sequence[str]) -> FloatArray:
        sequences, owner = tokenize_windows(self.tokenizer, texts, self.limit, self._lock)
        logits = run_batches(
            sequences,
            self._logits,
            budget=self._budget,
            limit=self.limit,
            width=self.model.config.num_labels,
        )
        if self._head.activation == "sigmoid":
            scores = sigmoid(logits[:, list(self._head.columns)])
        else:
            scores = softmax(logits)[:, list(self._head.columns)]
        return max_by_owner(scores, owner, len(texts))

    def _logits(self, sequences: list[Sequence[int]], length: int) -> FloatArray:
        import torch

        ids, mask = pad(sequences, length, self.tokenizer.pad_token_id, self._device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[:, : self.model.config.num_labels].float().cpu().numpy()  # type: ignore[no-any-return]


def default_budget(device: torch.device) -> int:
    """Padded tokens a batch where none were asked for."""
    return CPU_BUDGET if device.type == "cpu" else ACCELERATOR_BUDGET


@contextlib.contextmanager
def one_line(name: str, folder: Path) -> Iterator[None]:
    """Say in one line that a folder could not be loaded, whatever library found out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(f"{name} cannot be loaded from {folder}: {why}") from error


def position_limit(config: Any, tokenizer: Any) -> int:
    """Longest sequence, special tokens included, that model and tokenizer both allow."""
    limits = [tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if config.model_type in _OFFSET_POSITIONS:
            positions -= config.pad_token_id + 1
        limits.append(positions)
    limit = min(limits)
    return int(limit) if limit < _MAX_POSITIONS else 512


def tokenize_windows(
    tokenizer: Any, texts: Sequence[str], limit: int, lock: threading.Lock, *, overlap: int | None = None
) -> tuple[list[Sequence[int]], IntArray]:
    """Tokenise texts, those over the limit into windows.

    Args:
        tokenizer: A fast tokenizer.
        texts: n texts.
        limit: Longest window, special tokens included.
        lock: Held meanwhile.
        overlap: Tokens that neighbouring windows share; by default an eighth of the limit.

    Returns:
        The windows' token ids, special tokens included, and the index of the text each comes from.
    """
    if overlap is None:
        overlap = limit // _OVERLAP_SHARE
    # The tokenizer's last window may be short; it never lacks what the text ends with.
    with lock:
        encoded = tokenizer(
            list(texts),
            truncation=True,
            max_length=limit,
            stride=min(overlap, max(0, limit - tokenizer.num_special_tokens_to_add() - 1)),
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
    owner = np.asarray(encoded["overflow_to_sample_mapping"], np.int64)
    return list(encoded["input_ids"]), owner


def pad(
    sequences: Sequence[Sequence[int]], length: int, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to a length: ids and mask, int64, both (rows, length)."""
    import torch

    ids = np.full((len(sequences), length), pad_id, np.int64)
    mask = np.zeros((len(sequences), length), np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def align_weights(model: torch.nn.Module) -> None:
    """Give every weight memory of its own: views into a file are unaligned, and take other kernels."""
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def widen_output(model: torch.nn.Module, labels: int) -> None:
    """Give a narrow output layer sixteen rows, of which the first `labels` count.

    A product with a narrow matrix rounds by the row's position in the batch (one column: always; a few: where
    the inner size is small), so that a text's score would depend on its neighbours in its last bit.
    """
    import torch

    if labels >= 16:
        return
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer.out_features == labels
    ]
    if not layers:
        return
    name, narrow = layers[-1]
    wide = torch.nn.Linear(narrow.in_features, 16, bias=narrow.bias is not None, dtype=narrow.weight.dtype)
    with torch.no_grad():
        wide.weight.zero_()[:labels] = narrow.weight
        if narrow.bias is not None:
            wide.bias.zero_()[:labels] = narrow.bias
    model.set_submodule(name, wide)
