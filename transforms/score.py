"""Scoring: put a scorer's labels beside every row, and change nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from models.protocols import ToxicityScorer
from schemas import flight
from transforms.shards.steps import StepContext


def score_batch(
    batch: pa.RecordBatch, text_column: str, scorer: ToxicityScorer, attribute: str
) -> pa.RecordBatch:
    """Score the text of every row.

    Args:
        batch: n rows in flight.
        text_column: Column to score; null text gets a null score.
        scorer: Any scorer.
        attribute: Name of the attribute the scores go to: struct<label: float32, ...>.

    Returns:
        The batch with the attribute set.
    """
    text = batch.column(text_column)
    valid = text.is_valid().to_numpy(zero_copy_only=False)
    if text.null_count:
        scores = np.zeros((len(text), len(scorer.labels)), np.float32)
        scores[valid] = scorer.score(text.drop_null().to_pylist())
    else:
        scores = scorer.score(text.to_pylist())
    fields = [pa.array(np.ascontiguousarray(scores[:, i]), pa.float32()) for i in range(len(scorer.labels))]
    mask = pa.array(~valid) if text.null_count else None
    values = pa.StructArray.from_arrays(fields, names=list(scorer.labels), mask=mask)
    return flight.set_attribute(batch, attribute, values)


@dataclass(frozen=True)
class ScoreTexts:
    """Step: `score_batch` with a scorer found by name.

    Attributes:
        scorer: Its name (`tamis models list`).
        attribute: Where the scores go.
        options: Options of the scorer, as pairs.
    """

    scorer: str = "lexicon"
    attribute: str = "score"
    options: tuple[tuple[str, str], ...] = ()
    label: str = "ScoreTexts"

    def setup(self, context: StepContext) -> None:
        """Load the scorer."""
        self._scorer()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Score a batch."""
        return score_batch(batch, context.text_column, self._scorer(), self.attribute)

    def _scorer(self) -> ToxicityScorer:
        from models.registry import load

        return load("scorer", self.scorer, **dict(self.options))
