"""`hf:<folder>` as a tagger: a token classifier that says which characters of a text are toxic.

Tokens' probabilities are laid over the characters, a word's is the mean of its characters', and words from a threshold
on are toxic; neighbours with nothing but space between them are one span. The threshold was tuned when the tagger was
trained (`tagger_threshold` in config.json).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.batching import FloatArray, fill_rows, slices, token_budget_batches
from models.folders import read_config
from models.protocols import ModelInfo
from models.scorers.numbers import refuse_nan, softmax
from models.scorers.sequence import (
    align_weights,
    default_budget,
    one_line,
    pad,
    position_limit,
    widen_output,
)
from models.store import quiet_transformers
from schemas.errors import ModelError

TOXIC = "TOXIC"
THRESHOLD = "tagger_threshold"
_DEFAULT_THRESHOLD = 0.5
_BATCH_CHARACTERS = 4_000_000
_OVERLAP_SHARE = 8
# A word: no space and no punctuation that ends one, but with what disguises one inside it (`st*pid`, `@ss`, `id!ot`).
_WORD = re.compile(r"""[^\s.,;:!?"“”„«»()\[\]{}<>…/\\|]+(?:[!.|](?=\w)[^\s.,;:!?"“”„«»()\[\]{}<>…/\\|]+)*""")


class TaggedSpan(NamedTuple):
    """Toxic characters [start, end) of a text, and the highest probability of a word in them."""

    start: int
    end: int
    score: float


class TaggerOutput(NamedTuple):
    """Which of a token classifier's outputs is the toxic one, and from which probability on a word is toxic."""

    column: int
    threshold: float


def read_output(folder: Path, name: str) -> TaggerOutput:
    """What a folder's configuration says.

    Raises:
        ModelError: It is no token classifier, or has no toxic class.
    """
    config = read_config(folder)
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith("ForTokenClassification"):
        raise ModelError(f"{name} is a {architecture or 'model of no kind'}, not a token classifier")
    names = {int(k): str(v).casefold() for k, v in (config.get("id2label") or {}).items()}
    found = [
        i
        for i, label in names.items()
        if label.removeprefix("b-").removeprefix("i-") in ("toxic", "toxicity")
    ]
    if len(found) != 1:
        raise ModelError(
            f"{name} has no one class called {TOXIC} (classes: {', '.join(names.values()) or 'none'})"
        )
    return TaggerOutput(found[0], float(config.get(THRESHOLD, _DEFAULT_THRESHOLD)))


class SpanTagger:
    """Finds toxic spans with a transformers token classifier.

    Args:
        folder: As `tamis train spans` writes it.
        info: What manifests record of it.
        device: `auto` (CUDA if there is one) or a torch device.
        dtype: `float32`, `bfloat16` or `auto`.
        threads: torch threads of this process.
        token_budget: Most padded tokens in a batch; by default 4096 on a CPU, 65536 elsewhere.

    Raises:
        ModelError: The folder cannot be loaded, or is no tagger.
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
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        from models.lm.loading import pick_device, pick_dtype

        torch.set_num_threads(threads)
        self.info = info
        self._output = read_output(folder, info.name)
        self._device = pick_device(device)
        with quiet_transformers(), one_line(info.name, folder):
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model, loading = AutoModelForTokenClassification.from_pretrained(
                str(folder),
                local_files_only=True,
                dtype=pick_dtype(dtype, self._device),
                output_loading_info=True,
            )
        missing = [key for key in sorted(loading["missing_keys"]) if not key.endswith("position_ids")]
        if missing:
            raise ModelError(
                f"{info.name}: {folder} has no weights for {missing[0]}; it is no trained tagger"
            )
        if not self.tokenizer.is_fast:
            raise ModelError(f"{info.name} has no fast tokenizer; save a tokenizer.json beside its weights")
        align_weights(model)
        self._labels = int(model.config.num_labels)
        widen_output(model, self._labels)
        self.model = model.to(self._device).eval()
        self.limit = position_limit(model.config, self.tokenizer)
        self._budget = token_budget or default_budget(self._device)
        self._lock = threading.Lock()  # truncation is state of a fast tokenizer

    @property
    def threshold(self) -> float:
        """Probability from which a word is toxic."""
        return self._output.threshold

    def find(self, texts: Sequence[str], threshold: float | None = None) -> list[list[TaggedSpan]]:
        """The toxic spans of texts of any length.

        Args:
            texts: n texts.
            threshold: Instead of the tuned one.

        Returns:
            For each text its spans, ascending and disjoint.

        Raises:
            ModelError: A probability is not a number.
        """
        limit = self.threshold if threshold is None else threshold
        return [
            decode_spans(text, p, limit)
            for text, p in zip(texts, self.character_probabilities(texts), strict=True)
        ]

    def character_probabilities(self, texts: Sequence[str]) -> list[FloatArray]:
        """The probability of each character to be toxic; 0 where no token covers it (spaces).

        Returns:
            For each text float32 of shape (its length,).

        Raises:
            ModelError: A probability is not a number.
        """
        out: list[FloatArray] = []
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            out += self._probabilities(texts[part])
        return out

    def _probabilities(self, texts: Sequence[str]) -> list[FloatArray]:
        out = [np.zeros(len(text), np.float32) for text in texts]
        filled = [i for i, text in enumerate(texts) if text.strip()]
        if not filled:
            return out
        with self._lock:
            windows = encode_windows(self.tokenizer, [texts[i] for i in filled], self.limit)
        ids = [window.ids for window in windows]
        for window, logits in zip(windows, self._logits(ids), strict=True):
            p = refuse_nan(softmax(logits)[:, [self._output.column]], self.info.name)[:, 0]
            lay_over(out[filled[window.owner]], window.offsets, p)
        return out

    def _logits(self, sequences: list[Sequence[int]]) -> list[FloatArray]:
        import torch

        out: list[Any] = [None] * len(sequences)
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        for batch in token_budget_batches(lengths, self._budget, limit=self.limit):
            rows = fill_rows(batch.rows)
            ids, mask = pad(
                [sequences[i] for i in rows], batch.length, self.tokenizer.pad_token_id, self._device
            )
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            values = logits[: len(batch.rows), :, : self._labels].float().cpu().numpy()
            for i, own in zip(batch.rows, values, strict=True):
                out[i] = own[: lengths[i]]
        return out


class TokenWindow(NamedTuple):
    """A window of a text: the text's number, token ids, and each token's characters (empty: a special token)."""

    owner: int
    ids: list[int]
    offsets: list[tuple[int, int]]


def encode_windows(
    tokenizer: Any, texts: Sequence[str], limit: int, *, overlap: int | None = None
) -> list[TokenWindow]:
    """Tokenise texts with their tokens' character offsets, those over the limit into windows.

    Args:
        tokenizer: A fast tokenizer.
        texts: n texts.
        limit: Longest window, special tokens included.
        overlap: Tokens neighbouring windows share; by default an eighth of the limit.
    """
    share = limit // _OVERLAP_SHARE if overlap is None else overlap
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=limit,
        stride=min(share, max(0, limit - tokenizer.num_special_tokens_to_add() - 1)),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    owners = encoded["overflow_to_sample_mapping"]
    return [
        TokenWindow(int(owner), list(ids), [tuple(o) for o in offsets])
        for owner, ids, offsets in zip(owners, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def lay_over(characters: FloatArray, offsets: Sequence[tuple[int, int]], values: FloatArray) -> None:
    """Put tokens' values on their characters, in place; where windows overlap the greater one stays."""
    for (start, end), value in zip(offsets, values, strict=True):
        if end > start:
            np.maximum(characters[start:end], value, out=characters[start:end])


def word_scores(text: str, characters: FloatArray) -> list[TaggedSpan]:
    """The words of a text, each with the mean of its characters' probabilities."""
    sums = np.concatenate([[0.0], np.cumsum(characters, dtype=np.float64)])
    return [
        TaggedSpan(start, end, float((sums[end] - sums[start]) / (end - start)))
        for start, end in (match.span() for match in _WORD.finditer(text))
    ]


def decode_spans(text: str, characters: FloatArray, threshold: float) -> list[TaggedSpan]:
    """Words from a threshold on; neighbours with nothing but space between them are one span."""
    out: list[TaggedSpan] = []
    for word in word_scores(text, characters):
        if word.score < threshold:
            continue
        if out and not text[out[-1].end : word.start].strip():
            out[-1] = TaggedSpan(out[-1].start, word.end, max(out[-1].score, word.score))
        else:
            out.append(word)
    return out
