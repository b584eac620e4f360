"""A tagger of toxic spans, from texts with spans to the saved folder: what is learned, tuned, measured and saved.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import store
from models.metrics.bootstrap import mean_interval
from models.metrics.spans import character_f1, offsets_of
from models.protocols import FloatArray
from models.scorers.numbers import softmax
from models.scorers.tagger import THRESHOLD, TOXIC, decode_spans, encode_windows, lay_over
from models.training.classifier import compute_logits, load_encoder, pad_ids
from models.training.classifier_card import tagger_card
from models.training.classifier_settings import TaggerSettings
from models.training.collate import Row
from models.training.encoder_session import EncoderSession, Prepared
from models.training.labelled import CALIBRATE, TEST, TRAIN
from models.training.planned import PlannedTrainer
from models.training.shards import ShardListing
from models.training.spans import IGNORE, SpanExamples, SpanSource, read_span_examples

LABELS = ("O", TOXIC)
_THRESHOLDS = np.round(np.arange(0.02, 0.981, 0.02), 3)
_COLUMN = 1


@dataclass(frozen=True)
class TokenCollator:
    """Pads windows and their targets; picklable.

    Attributes:
        examples: Where they are.
        pad: Padding token id.
        limit: Widest batch.
    """

    examples: SpanExamples
    pad: int
    limit: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Tensors of b rows of one window each: `input_ids`, `attention_mask`, `labels`, all int64 (b, t)."""
        numbers = [row[0].number for row in rows]
        ids, mask = pad_ids([self.examples.ids[n] for n in numbers], self.pad, self.limit)
        labels = np.full(ids.shape, IGNORE, np.int64)
        for i, n in enumerate(numbers):
            labels[i, : len(self.examples.targets[n])] = self.examples.targets[n]
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.from_numpy(labels)}


class TaggerTrainer(PlannedTrainer):
    """Trains a token classifier: cross entropy over the tokens that stand for characters."""

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """Tokens with a target."""
        carried: torch.Tensor = batch["labels"] != IGNORE
        return carried.sum()

    def count_tokens(self, batch: dict[str, Any]) -> int:
        """Tokens, padding left out."""
        return int(batch["attention_mask"].sum())

    def summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Cross entropy (nats) summed over tokens."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        labels = inputs["labels"]
        total = torch.nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return total, (labels != IGNORE).sum(), outputs


@dataclass
class TaggerSession(EncoderSession):
    """Trains a span tagger.

    Attributes:
        source: The texts with spans.
        listing: Their shards.
    """

    settings: TaggerSettings
    source: SpanSource | None = None
    listing: ShardListing | None = None

    kind = "tagger"

    def read(self) -> Prepared:
        """Read the texts."""
        assert self.source is not None and self.listing is not None
        examples = read_span_examples(
            self.source,
            self.listing,
            self.tokenizer,
            max_length=self.settings.max_length,
            eval_fraction=self.settings.eval_fraction,
        )
        return Prepared(
            examples,
            examples.lengths,
            examples.windows(TRAIN),
            examples.windows(CALIBRATE, TEST),
            examples.counts,
        )

    def make_model(self) -> Any:
        """The encoder with a new head of two classes."""
        from transformers import AutoModelForTokenClassification

        return load_encoder(self.base, AutoModelForTokenClassification, LABELS)

    def make_trainer(self, model: Any, args: Any, prepared: Prepared, **options: Any) -> TaggerTrainer:
        """The trainer."""
        collator = TokenCollator(prepared.examples, self.tokenizer.pad_token_id, self.settings.max_length)
        return TaggerTrainer(model, args, collator=collator, **options)

    def finish(self, model: Any, prepared: Prepared, folder: Path, output: Path) -> dict[str, Any]:
        """Tune the threshold on one half of what was held out, measure on the other, save with the threshold."""
        examples: SpanExamples = prepared.examples
        held_out = examples.text_numbers(CALIBRATE, TEST)
        maps = self._characters(model, [examples.texts[n] for n in held_out])
        characters = dict(zip(held_out.tolist(), maps, strict=True))
        tuned_on, test = examples.text_numbers(CALIBRATE).tolist(), examples.text_numbers(TEST).tolist()
        threshold = tune_threshold(
            [examples.texts[n] for n in tuned_on],
            [characters[n] for n in tuned_on],
            [examples.gold[n] for n in tuned_on],
        )
        setattr(model.config, THRESHOLD, threshold)
        with store.quiet_transformers():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        figures = span_figures(
            [offsets_of(decode_spans(examples.texts[n], characters[n], threshold)) for n in test],
            [examples.gold[n] for n in test],
        )
        if figures.get("character F1"):
            row = figures["character F1"]
            self.say(
                f"test      character F1 {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}) on "
                f"{figures['texts']:,} texts, threshold {threshold:g}"
            )
        return {"decoding": {"threshold": threshold, "texts": len(tuned_on)}, "test": figures}

    def describe(self, prepared: Prepared) -> list[str]:
        """Counts of rows, windows and toxic tokens."""
        counts = prepared.counts
        return [
            f"data      {counts['rows']:,} rows -> {counts['texts']:,} texts in {counts['windows']:,} windows, "
            f"{len(prepared.held_out):,} held out; {counts['without_spans']:,} without spans, {counts['empty']:,} empty",
            f"label     {counts['toxic_tokens'] / max(1, counts['tokens']):.1%} of the tokens are toxic",
        ]

    def card(self, record: dict[str, Any]) -> str:
        """The model card."""
        return tagger_card(record)

    def _characters(self, model: Any, texts: Sequence[str]) -> list[FloatArray]:
        """Each character's probability to be toxic, as `SpanTagger` computes it."""
        out = [np.zeros(len(text), np.float32) for text in texts]
        limit = min(self.tokenizer.model_max_length, model.config.max_position_embeddings)
        windows = encode_windows(self.tokenizer, list(texts), limit) if len(texts) else []
        logits = compute_logits(model, [w.ids for w in windows], self.tokenizer.pad_token_id)
        for window, values in zip(windows, logits, strict=True):
            lay_over(out[window.owner], window.offsets, softmax(values)[:, _COLUMN])
        return out


def tune_threshold(
    texts: Sequence[str], characters: Sequence[FloatArray], gold: Sequence[frozenset[int]]
) -> float:
    """The threshold with the best mean character F1; 0.5 where there are no texts, the middle one of equals.

    Args:
        texts: n texts.
        characters: Their characters' probabilities.
        gold: Their toxic characters.
    """
    if not texts:
        return 0.5
    scores = np.array(
        [
            np.mean(
                [
                    character_f1(offsets_of(decode_spans(text, p, float(t))), own)
                    for text, p, own in zip(texts, characters, gold, strict=True)
                ]
            )
            for t in _THRESHOLDS
        ]
    )
    # One threshold's luck on a few hundred texts is noise: neighbours have a say.
    smooth = np.convolve(np.pad(scores, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    best = np.flatnonzero(smooth >= smooth.max() - 1e-9)
    return float(_THRESHOLDS[best[len(best) // 2]])


def span_figures(predicted: Sequence[set[int]], gold: Sequence[frozenset[int]]) -> dict[str, Any]:
    """The task's score with its interval, and precision and recall over all characters.

    Args:
        predicted: Each text's predicted characters.
        gold: Its toxic ones.
    """
    if not gold:
        return {"texts": 0}
    each = [character_f1(p, g) for p, g in zip(predicted, gold, strict=True)]
    interval = mean_interval(each)
    shared = sum(len(p & g) for p, g in zip(predicted, gold, strict=True))
    return {
        "texts": len(gold),
        "without_spans": sum(not g for g in gold),
        "character F1": {
            "value": round(interval.mean, 4),
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
        },
        "precision": round(shared / max(1, sum(map(len, predicted))), 4),
        "recall": round(shared / max(1, sum(map(len, gold))), 4),
    }
