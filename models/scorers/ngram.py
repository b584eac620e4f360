"""`ngram:FOLDER`: logistic regression over character n-grams, fitted from labelled text in a minute on one core.

It knows letters and nothing else: no words, no embeddings, no pretraining. So it shares neither features nor (where it is
fitted on other labels) data with neural scorers, which is what makes it fit to judge what one of them ranked.

Features are n-grams of 2 to 5 characters inside words (a blank stands before and behind each word), hashed; weighted by
`1 + log(count)` and inverse document frequency, each text scaled to unit length. N-grams are cut, hashed and counted for
a whole batch at once with numpy; fitting needs scipy, scoring does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.batching import FloatArray, slices
from models.protocols import ModelInfo
from models.scorers.numbers import sigmoid
from schemas.errors import ModelError, TamisError
from schemas.fingerprint import fingerprint

ORDERS = (2, 3, 4, 5)
BITS = 22  # hash buckets: 4 million, of which a corpus of tweets uses a tenth
WEIGHTS, RECORD = "ngram.safetensors", "ngram.json"
FORMAT = 1
_SPACE = 32
_BATCH_CHARACTERS = 400_000  # bounds memory: about 100 bytes of index arrays a character
_PRIME, _MIX = np.uint64(0x100000001B3), np.uint64(0xFF51AFD7ED558CCD)

IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NgramSettings:
    """How a model is fitted.

    Attributes:
        inverse_penalty: C of the L2 penalty; larger fits more closely.
        least_texts: N-grams in fewer texts than this are not used.
        balance: Make toxic texts count as much as the others together.
        iterations: Most steps of the solver.
    """

    inverse_penalty: float = 8.0
    least_texts: int = 3
    balance: bool = True
    iterations: int = 200


@dataclass(frozen=True)
class NgramWeights:
    """A fitted model.

    Attributes:
        buckets: Hash buckets in use, ascending, (features,).
        idf: Their inverse document frequencies, (features,).
        coef: Their coefficients, (features,).
        intercept: Log-odds without evidence.
        slope: The log-odds are multiplied by it, then `offset` is added (calibration).
        offset: See `slope`.
    """

    buckets: npt.NDArray[np.int32]
    idf: FloatArray
    coef: FloatArray
    intercept: float
    slope: float = 1.0
    offset: float = 0.0

    @property
    def revision(self) -> str:
        """Hash of the numbers."""
        arrays = (self.buckets, self.idf, self.coef, np.array([self.intercept, self.slope, self.offset]))
        return fingerprint(*(np.ascontiguousarray(a).tobytes() for a in arrays))[:16]


class NgramScorer:
    """A scorer over character n-grams; one label, `toxicity`.

    Args:
        weights: The fitted model.
        info: What manifests record of it.
        record: How it was fitted, and what came of it on held-out texts.
    """

    labels = ("toxicity",)

    def __init__(self, weights: NgramWeights, info: ModelInfo, record: dict[str, Any] | None = None) -> None:
        self.weights, self.info, self.record = weights, info, record or {}
        # From bucket to feature and weight, so that a lookup is an index.
        self._feature = np.full(1 << BITS, -1, np.int32)
        self._feature[weights.buckets] = np.arange(len(weights.buckets), dtype=np.int32)

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score texts of any length: float32 of shape (n, 1); an empty or blank text scores 0."""
        return np.where(_blank(texts)[:, None], np.float32(0), sigmoid(self.logits(texts)[:, None]))

    def logits(self, texts: Sequence[str]) -> Array:
        """Calibrated log-odds of each text, float64 of shape (n,)."""
        weights = self.weights
        out = np.zeros(len(texts))
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            rows, buckets, counts = count_ngrams(texts[part])
            features = self._feature[buckets]
            known = features >= 0
            rows, features = rows[known], features[known]
            values = (1 + np.log(counts[known])) * weights.idf[features].astype(np.float64)
            size = len(texts[part])
            norm = np.sqrt(np.bincount(rows, values * values, minlength=size))
            norm[norm == 0] = 1.0
            raw = (
                np.bincount(rows, values * weights.coef[features], minlength=size) / norm + weights.intercept
            )
            out[part] = raw * weights.slope + weights.offset
        return out

    def save(self, folder: Path) -> None:
        """Write the model to a folder: numbers as safetensors, all else as JSON."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        w = self.weights
        save_file({"buckets": w.buckets, "idf": w.idf, "coef": w.coef}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)
        record = {
            "format": FORMAT,
            "orders": list(ORDERS),
            "bits": BITS,
            "intercept": w.intercept,
            "slope": w.slope,
            "offset": w.offset,
            "training_data": self.info.training_data,
            **self.record,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")


def load_ngram(folder: str | Path, name: str = "") -> NgramScorer:
    """Read a model from its folder.

    Args:
        folder: As `NgramScorer.save` wrote it.
        name: What to call it; default `ngram:<folder>`.

    Raises:
        ModelError: It is no such folder, or another version's.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder)
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
        arrays = load_file(path / WEIGHTS)
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is no n-gram scorer ({Path(str(error.filename or WEIGHTS)).name} is missing); make one with "
            "`tamis train ngram`"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as an n-gram scorer ({error}); train it again") from error
    if (record.get("format"), record.get("orders"), record.get("bits")) != (FORMAT, list(ORDERS), BITS):
        raise ModelError(f"{path} was made by another version of tamis; train it again")
    weights = NgramWeights(
        arrays["buckets"],
        arrays["idf"],
        arrays["coef"],
        float(record["intercept"]),
        float(record["slope"]),
        float(record["offset"]),
    )
    info = describe(weights, str(record.get("training_data", "")), name or f"ngram:{path}", str(path))
    return NgramScorer(weights, info, record)


def describe(weights: NgramWeights, training_data: str, name: str, source: str = "") -> ModelInfo:
    """What manifests record of a model."""
    return ModelInfo(
        name=name,
        kind="scorer",
        revision=weights.revision,
        source=source,
        training_data=training_data,
        extra={"labels": list(NgramScorer.labels), "features": len(weights.buckets)},
    )


def fit_ngram(
    texts: Sequence[str],
    labels: Sequence[float] | npt.NDArray[Any],
    weights: Sequence[float] | None = None,
    *,
    training_data: str = "",
    settings: NgramSettings | None = None,
) -> NgramScorer:
    """Fit to labelled texts; the same input gives the same model.

    Args:
        texts: n texts.
        labels: P(toxic) of each, most often 0 or 1.
        weights: How much each counts; default 1.
        training_data: Tag of the data, by which a judge is kept apart from a ranker.
        settings: How to fit.

    Raises:
        TamisError: Lengths differ, labels outside [0, 1], or only one class; no n-gram is frequent enough.
        ModelError: scipy is not installed.
    """
    try:
        from scipy.optimize import minimize
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise ModelError("fitting needs scipy; run: pip install 'tamis[models]'") from error

    settings = settings or NgramSettings()
    wanted = np.asarray(labels, np.float64)
    share = np.ones(len(wanted)) if weights is None else np.asarray(weights, np.float64)
    if not len(texts) == len(wanted) == len(share):
        raise TamisError(f"{len(texts)} texts, {len(wanted)} labels, {len(share)} weights: give one for each")
    if not len(texts) or not ((wanted >= 0) & (wanted <= 1)).all() or not (share >= 0).all():
        raise TamisError("labels are probabilities in [0, 1], weights 0 or more, and there must be texts")
    positive, negative = float((share * wanted).sum()), float((share * (1 - wanted)).sum())
    if not positive or not negative:
        raise TamisError("a scorer is fitted to toxic and other texts: one of the two is missing")
    if settings.balance:
        factor = (positive + negative) / 2
        share = share * np.where(wanted >= 0.5, factor / positive, factor / negative)

    rows, buckets, counts = count_ngrams(texts)
    frequency = np.bincount(buckets, minlength=1 << BITS)
    used = np.flatnonzero(frequency >= settings.least_texts)
    if not len(used):
        raise TamisError(f"no n-gram stands in {settings.least_texts} texts or more: too few texts to fit to")
    idf = (np.log((1 + len(texts)) / (1 + frequency[used])) + 1).astype(np.float32)
    feature = np.full(1 << BITS, -1, np.int64)
    feature[used] = np.arange(len(used))
    columns = feature[buckets]
    known = columns >= 0
    rows, columns = rows[known], columns[known]
    values = (1 + np.log(counts[known])) * idf[columns].astype(np.float64)
    norm = np.sqrt(np.bincount(rows, values * values, minlength=len(texts)))
    norm[norm == 0] = 1.0
    matrix = csr_matrix((values / norm[rows], (rows, columns)), shape=(len(texts), len(used)))
    transposed = matrix.T.tocsr()

    def loss(point: Array) -> tuple[float, Array]:
        """Penalised weighted log-loss and its gradient; the intercept is not penalised."""
        logits = matrix @ point[:-1] + point[-1]
        each = share * (np.logaddexp(0, logits) - wanted * logits)
        slope = share * (1 / (1 + np.exp(-logits)) - wanted)
        value = settings.inverse_penalty * each.sum() + 0.5 * point[:-1] @ point[:-1]
        gradient = np.append(settings.inverse_penalty * (transposed @ slope) + point[:-1], 0.0)
        gradient[-1] = settings.inverse_penalty * slope.sum()
        return float(value), gradient

    start = np.zeros(len(used) + 1)
    found = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": settings.iterations,
            "maxfun": 2 * settings.iterations,
            "ftol": 1e-9,
            "gtol": 1e-4,
        },
    )
    fitted = NgramWeights(used.astype(np.int32), idf, found.x[:-1].astype(np.float32), float(found.x[-1]))
    record = {"texts": len(texts), "toxic": int((wanted >= 0.5).sum()), "steps": int(found.nit)}
    return NgramScorer(fitted, describe(fitted, training_data, "ngram"), record)


def count_ngrams(texts: Sequence[str]) -> tuple[IntArray, IntArray, IntArray]:
    """Cut texts into hashed n-grams and count them.

    Returns:
        Three int64 arrays of one entry for each (text, bucket): text, bucket, count; sorted by both.
    """
    parts = [
        _count_some(texts[part], part.start) for part in slices([len(t) for t in texts], _BATCH_CHARACTERS)
    ]
    if not parts:
        return (np.empty(0, np.int64),) * 3
    rows, buckets, counts = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(buckets), np.concatenate(counts)


def _count_some(texts: Sequence[str], first: int) -> tuple[IntArray, IntArray, IntArray]:
    padded = [f" {' '.join(text.lower().split())} " for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in padded])
    blank = codes == _SPACE
    before = np.concatenate([[0], np.cumsum(blank)])  # blanks before a place
    keys = []
    with np.errstate(over="ignore"):  # hashes wrap
        for order in ORDERS:
            count = len(codes) - order + 1
            if count <= 0:
                continue
            places = np.arange(count)
            # Inside a word: no blank but at its ends; and two blanks alone are no n-gram.
            whole = before[places + order - 1] == before[places + 1]
            if order == 2:
                whole &= ~(blank[:count] & blank[1 : count + 1])
            places = places[whole]
            hashed = np.full(len(places), np.uint64(order))
            for step in range(order):
                hashed = (hashed ^ codes[places + step]) * _PRIME
            hashed ^= hashed >> np.uint64(33)
            hashed *= _MIX
            buckets = (hashed >> np.uint64(64 - BITS)).astype(np.int64)
            keys.append((owner[places] << BITS) | buckets)
    together = np.concatenate(keys) if keys else np.empty(0, np.int64)
    distinct, counts = np.unique(together, return_counts=True)
    return (distinct >> BITS) + first, distinct & ((1 << BITS) - 1), counts


def _blank(texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    return np.array([not text.strip() for text in texts], bool)
