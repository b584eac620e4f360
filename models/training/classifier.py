"""Encoders with a classification head: loading one to start from, its trainer, and what is saved of it.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from models import store
from models.folders import read_training
from models.training.collate import Row
from models.training.labelled import LabelledExamples
from models.training.loading import BaseModel, call_by_hub_id, refuse_missing, resolve_model
from models.training.planned import PlannedTrainer
from schemas.errors import ModelError

_WIDTH = 8
_EVAL_TOKENS = 8192  # padded tokens a batch when nothing is learned


def resolve_encoder(name: str) -> BaseModel:
    """Find an encoder to start from: an embedded one (`minilm`), a folder, or `hf:ID`.

    Raises:
        ModelError: It is not there, or is no encoder.
    """
    if store.canonical(name) in store.EMBEDDED and not Path(name).is_dir():
        package = store.package(name)
        if package.kind != "encoder":
            raise ModelError(f"'{name}' is a {package.kind}, not an encoder; pass minilm, a folder or hf:ID")
        return BaseModel(package.name, str(store.path(name)), package.revision, package.licence)
    try:
        return resolve_model(name)
    except ModelError as error:
        raise ModelError(str(error).replace("smollm2", "minilm")) from error


def join_tags(base: BaseModel, tags: Sequence[str]) -> str:
    """The training-data tag of a model trained on some sets: what its base was trained on by tamis counts too."""
    inherited = str(read_training(Path(base.source)).get("training_data") or "").split("+")
    return "+".join(dict.fromkeys(tag for tag in (*inherited, *tags) if tag))


def load_encoder(base: BaseModel, auto: Any, labels: Sequence[str], **config: Any) -> Any:
    """Load an encoder with a new head, drawn from torch's generator.

    Args:
        base: What to load.
        auto: `transformers.AutoModelForSequenceClassification` or `...ForTokenClassification`.
        labels: Names of the head's outputs.
        **config: Further settings of the configuration (`problem_type`).

    Raises:
        ModelError: It cannot be loaded, its kind has no such head, or weights of the encoder are missing.
    """
    try:
        with store.quiet_transformers(), quiet_report():
            model, loading = auto.from_pretrained(
                base.source,
                dtype=torch.float32,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                ignore_mismatched_sizes=True,  # a classifier may be trained on for other labels
                output_loading_info=True,
                **config,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{base.name} cannot be loaded as a classifier ({why})") from error
    # The encoder is the part under the prefix; what lies beside it is the head.
    encoder = f"{model.base_model_prefix}." if model.base_model is not model else ""
    refuse_missing(
        loading, base, may_be_new=lambda key: is_pooler(key) or not (encoder and key.startswith(encoder))
    )
    call_by_hub_id(model, base)
    return model


def is_pooler(key: str) -> bool:
    """Whether a tensor belongs to an encoder's pooler, which many are saved without."""
    return "pooler" in key.split(".")


@contextlib.contextmanager
def quiet_report() -> Iterator[None]:
    """Keep back transformers' report that the head is new: it is meant to be."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def load_fast_tokenizer(base: BaseModel) -> Any:
    """The encoder's tokenizer.

    Raises:
        ModelError: It cannot be loaded, is not a fast one, or cannot pad.
    """
    from models.training.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    if not tokenizer.is_fast:
        raise ModelError(f"{base.name} has no fast tokenizer; save a tokenizer.json beside its weights")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{base.name} has no padding token; set pad_token in its tokenizer_config.json")
    return tokenizer


def last_layer(model: Any) -> Any:
    """The linear layer that makes the logits.

    Raises:
        ModelError: There is none, or it has no bias to hold an offset.
    """
    labels = model.config.num_labels
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels]
    if not layers or layers[-1].bias is None:
        raise ModelError(
            f"{type(model).__name__} has no linear output layer to calibrate; pass --calibration none"
        )
    return layers[-1]


@dataclass(frozen=True)
class LabelCollator:
    """Pads examples and stacks their targets; picklable.

    Attributes:
        examples: Where tokens and targets are.
        pad: Padding token id.
        limit: Widest batch.
    """

    examples: LabelledExamples
    pad: int
    limit: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Tensors of b rows of one example each: `input_ids`, `attention_mask` int64 (b, t), `labels` float32 (b, l)."""
        numbers = [row[0].number for row in rows]
        ids, mask = pad_ids([self.examples.ids[n] for n in numbers], self.pad, self.limit)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.from_numpy(self.examples.targets[numbers]),
        }


class ClassifierTrainer(PlannedTrainer):
    """Trains a multi-label classifier: binary cross entropy over the labels that are known.

    Args:
        model: A sequence classifier.
        args: Trainer arguments.
        positive_weights: What each label's positives count, (labels,); None: 1.
        **options: As `PlannedTrainer`.
    """

    def __init__(
        self, model: Any, args: Any, *, positive_weights: Sequence[float] | None = None, **options: Any
    ) -> None:
        super().__init__(model, args, **options)
        self._weights = None if positive_weights is None else torch.tensor(positive_weights)

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """Labels that are known."""
        known: torch.Tensor = ~batch["labels"].isnan()
        return known.sum()

    def count_tokens(self, batch: dict[str, Any]) -> int:
        """Tokens, padding left out."""
        return int(batch["attention_mask"].sum())

    def summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Binary cross entropy (nats) summed over known labels."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        targets = inputs["labels"]
        known = ~targets.isnan()
        logits = outputs.logits.float()
        weights = None if self._weights is None else self._weights.to(logits.device)
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num(), reduction="none", pos_weight=weights
        )
        return each[known].sum(), known.sum(), outputs


def pad_ids(sequences: Sequence[Any], pad: int, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to the longest: ids and mask, int64, both (b, t).

    With a limit the width is rounded up to a multiple of eight within it: a CPU compiles its bfloat16 products, and keeps
    them, for every width it meets.
    """
    width = max(map(len, sequences))
    width = max(width, min(-(-width // _WIDTH) * _WIDTH, limit))
    ids = np.full((len(sequences), width), pad, np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def compute_logits(model: Any, sequences: Sequence[Any], pad: int) -> list[np.ndarray]:
    """Logits of token sequences in evaluation mode, float32: (labels,) each, or (tokens, labels) of a tagger."""
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    out: list[Any] = [None] * len(sequences)
    was_training = model.training
    model.eval()
    start = 0
    with torch.inference_mode():
        while start < len(order):
            size = max(1, _EVAL_TOKENS // max(1, len(sequences[order[start]])))
            rows = order[start : start + size]
            ids, mask = pad_ids([sequences[i] for i in rows], pad)
            logits = (
                model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu().numpy()
            )
            for i, values in zip(rows, logits, strict=True):
                out[i] = values[: len(sequences[i])] if values.ndim == 2 else values
            start += size
    model.train(was_training)
    return out


def save_detoxify_checkpoint(
    model: Any, tokenizer: Any, labels: Sequence[str], path: Path, *, model_type: str, training_data: str
) -> None:
    """Save as Detoxify's own training does: a pickle of `config` and `state_dict`, plain data and tensors only.

    Args:
        model: A sequence classifier.
        tokenizer: Its tokenizer.
        labels: Names of its outputs, in order.
        path: File to write.
        model_type: Where Detoxify looks for config.json and tokenizer: a folder, or a hub id.
        training_data: Tag of the data.
    """
    names = {"model_name": type(model).__name__, "tokenizer_name": type(tokenizer).__name__}
    arguments = {"model_type": model_type, **names, "num_classes": len(labels)}
    record = {
        "config": {
            "name": f"tamis {training_data}",
            "arch": {"type": "model", "args": arguments},
            "dataset": {"type": "tamis", "args": {"classes": list(labels)}},
            "training_data": training_data,
        },
        "state_dict": {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()},
    }
    torch.save(record, path)
