"""chrF and BLEU against references people wrote, by sacrebleu, with any number of references a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.metrics.bootstrap import DRAWS, Interval
from schemas.errors import ModelError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Overlap:
    """What n outputs share with their references.

    Attributes:
        chrf: Sentence chrF (chrF2, best reference) of each row in [0, 100]; NaN where there is no reference.
        bleu: Corpus BLEU over the rows with a reference, with its interval.
        signature: sacrebleu's signatures, so that others can compute the same.
    """

    chrf: Array
    bleu: Interval
    signature: str


def overlap(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, seed: int = 0, draws: int = DRAWS
) -> Overlap | None:
    """Compare outputs with references; None where no row has one.

    Args:
        outputs: n texts.
        references: For each the texts people wrote; none is allowed.
        seed: Of the bootstrap.
        draws: How many resamples.

    Raises:
        ModelError: sacrebleu is not installed.
    """
    rows = [i for i, r in enumerate(references) if r]
    if not rows:
        return None
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ModuleNotFoundError as error:
        raise ModelError("chrF and BLEU need sacrebleu; run: pip install 'tamis[eval]'") from error
    chrf, bleu = CHRF(), BLEU(force=True)
    each = np.full(len(outputs), np.nan)
    for i in rows:
        each[i] = chrf.sentence_score(outputs[i], list(references[i])).score
    hypotheses = [outputs[i] for i in rows]
    most = max(len(references[i]) for i in rows)
    # sacrebleu wants streams of one length: a row with fewer references has None in the later ones.
    streams: list[Any] = [
        [references[i][k] if k < len(references[i]) else None for i in rows] for k in range(most)
    ]
    score = bleu.corpus_score(hypotheses, streams)
    drawn = _draws(bleu, hypotheses, streams, seed, draws)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(score.score)
    interval = Interval(value, min(float(low), value), max(float(high), value), len(rows))
    return Overlap(each, interval, f"{bleu.get_signature()} {chrf.get_signature()}")


def _draws(bleu: Any, hypotheses: list[str], streams: list[Any], seed: int, draws: int) -> Array:
    """BLEU of resampled rows: its counts add up, so each row is counted once and draws are sums of counts."""
    from models.metrics.bootstrap import resampled_sums

    counts = np.empty((len(hypotheses), 10))
    for i, hypothesis in enumerate(hypotheses):
        own = [s[i] for s in streams if s[i] is not None]
        one = bleu.corpus_score([hypothesis], [[r] for r in own])
        counts[i] = [*one.counts, *one.totals, one.sys_len, one.ref_len]
    sums = resampled_sums(counts, seed, draws)
    found, whole = np.maximum(sums[:, :4], 1e-9), np.maximum(sums[:, 4:8], 1e-9)
    precision = np.exp(np.log(found / whole).mean(axis=1))
    length = np.exp(np.minimum(0.0, 1 - sums[:, 9] / np.maximum(sums[:, 8], 1e-9)))
    return np.asarray(100 * precision * length)
