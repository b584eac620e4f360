"""A toxicity classifier, from labelled texts to the saved folder: what is learned, calibrated, measured and saved.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models import store
from models.training.calibration import Calibration, fit_calibration, fold, label_figures
from models.training.classifier import (
    ClassifierTrainer,
    LabelCollator,
    compute_logits,
    last_layer,
    load_encoder,
    save_detoxify_checkpoint,
)
from models.training.classifier_card import scorer_card
from models.training.classifier_settings import ClassifierSettings
from models.training.encoder_session import EncoderSession, Prepared
from models.training.labelled import (
    CALIBRATE,
    TEST,
    TRAIN,
    LabelledExamples,
    LabelledSource,
    label_names,
    read_examples,
)
from models.training.shards import ShardListing

CHECKPOINT = "detoxify.ckpt"
_WEIGHT_RANGE = (0.1, 10.0)


@dataclass
class ClassifierSession(EncoderSession):
    """Trains a multi-label sequence classifier.

    Attributes:
        sources: The labelled sets.
        listings: Their shards.
    """

    settings: ClassifierSettings
    sources: Sequence[LabelledSource] = ()
    listings: Sequence[ShardListing] = ()
    labels: tuple[str, ...] = field(init=False)

    kind = "scorer"

    def __post_init__(self) -> None:
        self.labels = label_names(self.sources)

    def read(self) -> Prepared:
        """Read the labelled sets."""
        examples = read_examples(
            self.sources,
            self.listings,
            self.tokenizer,
            max_length=self.settings.max_length,
            eval_fraction=self.settings.eval_fraction,
        )
        return Prepared(
            examples,
            examples.lengths,
            examples.numbers(TRAIN),
            examples.numbers(CALIBRATE, TEST),
            examples.counts,
        )

    def make_model(self) -> Any:
        """The encoder with a new head, one logit a label."""
        from transformers import AutoModelForSequenceClassification

        return load_encoder(
            self.base,
            AutoModelForSequenceClassification,
            self.labels,
            problem_type="multi_label_classification",
        )

    def make_trainer(self, model: Any, args: Any, prepared: Prepared, **options: Any) -> ClassifierTrainer:
        """The trainer, with the weights of the positives."""
        if self._method != "none":
            last_layer(model)  # what cannot be calibrated is said before training, not after
        return ClassifierTrainer(
            model,
            args,
            collator=LabelCollator(prepared.examples, self.tokenizer.pad_token_id, self.settings.max_length),
            positive_weights=positive_weights(prepared.examples) if self.settings.balance else None,
            **options,
        )

    def finish(self, model: Any, prepared: Prepared, folder: Path, output: Path) -> dict[str, Any]:
        """Calibrate on one half of what was held out, measure on the other, save with the calibration folded in."""
        examples: LabelledExamples = prepared.examples
        logits = np.full(examples.targets.shape, np.nan, np.float32)
        held_out = prepared.held_out
        if len(held_out):
            logits[held_out] = np.stack(
                compute_logits(model, [examples.ids[n] for n in held_out], self.tokenizer.pad_token_id)
            )
        fitted_on = examples.numbers(CALIBRATE)
        calibration = fit_calibration(logits[fitted_on], examples.targets[fitted_on], method=self._method)
        if self._method != "none":
            fold(last_layer(model), calibration)
        with store.quiet_transformers():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        figures: dict[str, Any] = {
            "calibration": {
                "method": self._method,
                "temperature": round(calibration.temperature, 6),
                "shift": {k: round(v, 6) for k, v in zip(self.labels, calibration.shift, strict=True)},
                "examples": calibration.examples,
            },
            "labels": list(self.labels),
            "test": self._test(examples, logits, calibration),
        }
        if self.settings.detoxify:
            save_detoxify_checkpoint(
                model,
                self.tokenizer,
                self.labels,
                folder / CHECKPOINT,
                model_type=str(output.resolve()),
                training_data=self.training_data,
            )
            digest = hashlib.sha256((folder / CHECKPOINT).read_bytes()).hexdigest()
            figures["detoxify"] = {"file": CHECKPOINT, "sha256": digest}
        for line in test_lines(figures["test"]):
            self.say(line)
        return figures

    def describe(self, prepared: Prepared) -> list[str]:
        """Counts of rows, and how often each label is on."""
        counts, examples = prepared.counts, prepared.examples
        lines = [
            f"data      {counts['rows']:,} rows in {len(self.sources)} sets -> {len(prepared.train):,} examples an "
            f"epoch, {len(prepared.held_out):,} held out; left out: {counts['empty']:,} empty, "
            f"{counts['unlabelled']:,} unlabelled; {counts['cut']:,} cut at {self.settings.max_length} tokens"
        ]
        for column, label in enumerate(self.labels):
            known = examples.targets[prepared.train, column]
            known = known[~np.isnan(known)]
            lines.append(f"label     {label}: {np.mean(known >= 0.5):.1%} of {len(known):,}")
        return lines

    def card(self, record: dict[str, Any]) -> str:
        """The model card."""
        return scorer_card(record)

    @property
    def _method(self) -> str:
        if self.settings.calibration != "auto":
            return self.settings.calibration
        return "shift" if self.settings.balance else "temperature"

    def _test(
        self, examples: LabelledExamples, logits: np.ndarray, calibration: Calibration
    ) -> dict[str, dict[str, Any]]:
        """Figures on the test half: of all sets together, and of each."""
        test = examples.numbers(TEST)
        after = calibration.apply(logits)
        parts = {"all": test}
        if len(self.sources) > 1:
            for number, source in enumerate(self.sources):
                parts[source.title] = test[examples.source[test] == number]
        return {
            part: {
                label: label_figures(
                    logits[numbers, column],
                    after[numbers, column],
                    examples.targets[numbers, column],
                    seed=self.settings.seed,
                )
                for column, label in enumerate(self.labels)
            }
            for part, numbers in parts.items()
        }


def positive_weights(examples: LabelledExamples) -> list[float]:
    """Negatives for each positive of every label among the examples of an epoch, within a factor of ten."""
    targets = examples.targets[examples.numbers(TRAIN)]
    on = np.nansum(targets, axis=0)
    off = (~np.isnan(targets)).sum(axis=0) - on
    weights: list[float] = np.clip(off / np.maximum(on, 1e-9), *_WEIGHT_RANGE).tolist()
    return weights


def test_lines(test: dict[str, dict[str, Any]]) -> list[str]:
    """The figures of a test as lines."""
    lines = []
    for part, labels in test.items():
        for label, row in labels.items():
            if not row["n"]:
                continue
            auc, f1 = ("-" if row[k]["value"] is None else f"{row[k]['value']:.3f}" for k in ("auc", "f1"))
            lines.append(
                f"test      {part}, {label}: AUC {auc}, F1 {f1}, calibration error {row['ece_before']['value']:.3f} -> "
                f"{row['ece']['value']:.3f} ({row['n']:,} texts, {row['base_rate']['value']:.0%} positive)"
            )
    return lines
