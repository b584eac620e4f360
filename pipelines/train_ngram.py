"""`tamis train ngram`: fit a character n-gram scorer to labelled texts, in a minute on one core.

A judge for what a neural scorer ranked: other features, and other data where it is fitted to other sets. The folder is
found as scorer `ngram:DIR`; a part of the texts is held out, to calibrate the scores and to say how good they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.train_folder import (
    PLAN,
    RECORD,
    SUCCESS,
    check_output,
    clear,
    local_folder,
    locked,
    read_record,
    write_record,
)
from schemas.errors import InputError
from schemas.fingerprint import config_hash

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from models.scorers.ngram import NgramScorer
    from models.training.labelled import LabelledSource
    from models.training.shards import ShardListing


class TrainNgramConfig(BaseModel):
    """Everything `tamis train ngram` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: tuple[str, ...] = Field(
        min_length=1,
        description="Labelled sets: PATH, or PATH,key=value,... (text, labels, label, positive, weight).",
    )
    output: str = Field(description="Folder for the model, on this machine.")
    text_column: str = Field("text", description="The texts.")
    label: str = Field("", description="Column of 0/1 or probabilities.")
    label_column: str = Field("", description="Or: column of class names.")
    positive: tuple[str, ...] = Field((), description="And the class names that mean toxic.")
    training_data: str = Field(
        "", description="Tag of the data; default: names and fingerprints of the sets."
    )
    inverse_penalty: float = Field(8.0, gt=0, description="Larger fits more closely.")
    least_texts: int = Field(3, ge=1, description="N-grams in fewer texts are not used.")
    balance: bool = Field(True, description="Make toxic texts count as much as the others together.")
    eval_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share held out by a hash of the text: half calibrates, half tests."
    )
    allow_poisoned: bool = Field(False, description="Train on a folder that was poisoned on purpose.")
    overwrite: bool = Field(False, description="Replace another run's model in the output folder.")
    quiet: bool = Field(False, description="Say nothing.")

    def sources(self) -> list[LabelledSource]:
        """The labelled sets.

        Raises:
            TamisError: One is described badly, or has more than one label.
        """
        from models.training.labelled import LabelledSource

        shared = {
            "text_column": self.text_column,
            "labels": (self.label,) if self.label else (),
            "label_column": self.label_column,
            "positive": self.positive,
        }
        found = [LabelledSource.parse(text, **shared) for text in self.data]
        for source in found:
            if len(source.names) > 1:
                raise InputError(
                    f"{source.data}: an n-gram scorer has one label, not {', '.join(source.names)}"
                )
        return found


@dataclass
class _Texts:
    """Texts with their labels, weights and sides, and how many rows were left out."""

    texts: list[str]
    labels: list[float]
    weights: list[float]
    sides: list[int]
    left_out: int = 0

    def side(self, wanted: int) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Texts and labels of one side."""
        import numpy as np

        rows = [i for i, side in enumerate(self.sides) if side == wanted]
        return [self.texts[i] for i in rows], np.array([self.labels[i] for i in rows], np.float64)


def run(config: TrainNgramConfig) -> dict[str, Any]:
    """Fit, or find the work done; returns what `train.json` holds.

    Raises:
        InputError: The data cannot be used.
        ModelError: A library is missing.
        OutputError: The output folder holds something else.
    """
    from models.training.labelled import training_tag
    from models.training.shards import list_shards, shard_fingerprint

    sources = config.sources()
    listings = [list_shards(source.data, allow_poisoned=config.allow_poisoned) for source in sources]
    prints = [[shard_fingerprint(shard, one.options) for shard in one.shards] for one in listings]
    tags = [training_tag(source.title, found) for source, found in zip(sources, prints, strict=True)]
    training_data = config.training_data or "+".join(dict.fromkeys(tags))
    deciding = {"inverse_penalty", "least_texts", "balance", "eval_fraction"}
    identity = config_hash(
        {
            "job": "train-ngram",
            "settings": config.model_dump(include=deciding),
            "sources": [{**s.describe(), "shards": found} for s, found in zip(sources, prints, strict=True)],
            "training_data": training_data,
        }
    )
    output = local_folder(config.output)
    done = check_output(output, identity, overwrite=config.overwrite)
    if done is not None:
        _say(config, f"{output} holds this model already; nothing to do")
        return done
    # Fitted before anything is written: data that cannot be used leave no trace in the folder.
    scorer = _fit(config, sources, listings, training_data)
    described = {
        "config_hash": identity,
        "data": {"sources": [s.describe() for s in sources], "shards": prints},
    }
    record = {**scorer.record, **described}
    with locked(output):
        if (read_record(output / PLAN) or {}).get("config_hash") != identity:
            clear(output)
        write_record(output / PLAN, {"config_hash": identity, "config": config.model_dump()})
        scorer.save(output)
        write_record(output / RECORD, record)
        (output / SUCCESS).write_text(f"{identity}\n")
    auc = (record["results"].get("auc") or {}).get("value")
    _say(config, f"saved ngram:{output}" + (f", AUC {auc:.3f} on held-out texts" if auc is not None else ""))
    return record


def read_texts(
    sources: Sequence[LabelledSource], listings: Sequence[ShardListing], eval_fraction: float
) -> _Texts:
    """Read labelled sets; rows without a text or a label are left out and counted.

    Raises:
        InputError: A shard, column or label cannot be read.
    """
    import math

    from models.training.labelled import read_targets, side_of, split_key, text_values
    from models.training.shards import ShardReader

    out = _Texts([], [], [], [])
    for source, listing in zip(sources, listings, strict=True):
        for batch in ShardReader(listing, source.columns):
            texts = text_values(batch, source.text_column, source.data)
            for text, label in zip(texts, read_targets(batch, source)[:, 0].tolist(), strict=True):
                if not text or not text.strip() or math.isnan(label):
                    out.left_out += 1
                    continue
                out.texts.append(text)
                out.labels.append(label)
                out.weights.append(source.weight)
                out.sides.append(side_of(split_key(text), eval_fraction))
    return out


def _fit(
    config: TrainNgramConfig,
    sources: Sequence[LabelledSource],
    listings: Sequence[ShardListing],
    training_data: str,
) -> NgramScorer:
    import dataclasses

    from models.scorers.ngram import NgramScorer, NgramSettings, describe, fit_ngram
    from models.training.calibration import fit_calibration, label_figures
    from models.training.labelled import CALIBRATE, TEST, TRAIN

    read = read_texts(sources, listings, config.eval_fraction)
    _say(config, f"{len(read.texts):,} labelled texts, {read.left_out:,} rows without text or label left out")
    texts, labels = read.side(TRAIN)
    weights = [w for w, side in zip(read.weights, read.sides, strict=True) if side == TRAIN]
    settings = NgramSettings(config.inverse_penalty, config.least_texts, config.balance)
    scorer = fit_ngram(texts, labels, weights, training_data=training_data, settings=settings)
    aside, truth = read.side(CALIBRATE)
    if len(set((truth >= 0.5).tolist())) == 2:
        # Balancing has moved the base rate: scale and shift both.
        found = fit_calibration(scorer.logits(aside)[:, None], truth[:, None], method="shift")
        fitted = dataclasses.replace(scorer.weights, slope=1 / found.temperature, offset=found.shift[0])
    else:
        fitted = scorer.weights
    test, wanted = read.side(TEST)
    results: dict[str, Any] = {}
    final = NgramScorer(fitted, describe(fitted, training_data, "ngram"), scorer.record)
    if test:
        results = label_figures(scorer.logits(test), final.logits(test), wanted)
    record = {
        "kind": "ngram scorer",
        **scorer.record,
        "left_out": read.left_out,
        "calibrated_on": len(aside),
        "training_data": training_data,
        "results": results,
    }
    return NgramScorer(fitted, final.info, record)


def _say(config: TrainNgramConfig, line: str) -> None:
    if not config.quiet:
        print(line, file=sys.stderr, flush=True)
