"""Is it a sentence? Logistic regression over word classes, fitted on whole sentences and on the same ones broken.

Knows which function words, endings and marks follow each other, and nothing of what words mean: frequent words stand for
themselves, others for their ending. What it looks at is runs of one to three such classes with the sentence's ends
marked, and immediate repetitions. So a hole (`you are an .`), a mask, a cut end or a phrase said twice is seen for next
to no cost; two plausible words swapped most often are not. Text of other languages than it was fitted on looks broken.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from models.batching import FloatArray
from models.metrics.acceptability import PASS, auc
from models.protocols import ModelInfo
from models.scorers.numbers import sigmoid
from schemas.errors import ModelError
from schemas.fingerprint import fingerprint

SHIPPED = Path(__file__).with_name("fluency_en.safetensors")
BITS = 17  # hash buckets: 131,072, a quarter of a megabyte
FREQUENT = 60  # sentences a word has to stand in to stand for itself, of 12,000
_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]+|_+")
_ENDINGS = (
    "ing", "ed", "ly", "tion", "ness", "ful", "ous", "able", "ive", "est", "er", "al", "ic", "'s", "s", "y",
)  # fmt: skip
_ORDERS = (1, 2, 3)
_REPEATED = (1, 2, 3, 4)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FluencyWeights:
    """A fitted model.

    Attributes:
        words: Words that stand for themselves.
        coef: Of each bucket, float16 (1 << BITS,).
        intercept: Log-odds without evidence.
        threshold: Score from which a text counts as acceptable.
        quality: What was measured on sentences it was not fitted on.
        training_data: Tag of the sentences.
    """

    words: tuple[str, ...]
    coef: npt.NDArray[np.float16]
    intercept: float
    threshold: float
    quality: dict[str, Any]
    training_data: str = ""


class FluencyScorer:
    """Scores how acceptable texts are; one label, `acceptable`.

    Args:
        weights: The fitted model.
        source: Where it came from.
    """

    labels = ("acceptable",)

    def __init__(self, weights: FluencyWeights, source: str = "tamis") -> None:
        self.weights = weights
        self._words = frozenset(weights.words)
        self._coef = weights.coef.astype(np.float64)
        revision = fingerprint(weights.coef.tobytes(), *weights.words, repr(weights.intercept))[:16]
        self.info = ModelInfo(
            "fluency",
            "scorer",
            revision,
            source,
            "Apache-2.0",
            weights.training_data,
            {"labels": ["acceptable"]},
        )

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Probability that each of n texts is whole: float32 (n, 1); 0 for a text without letters or digits."""
        empty = np.array([not any(c.isalnum() for c in t) for t in texts], bool)
        return np.where(empty[:, None], np.float32(0), sigmoid(self.logits(texts)[:, None]))

    def logits(self, texts: Sequence[str]) -> Array:
        """Log-odds of n texts, float64."""
        out = np.empty(len(texts))
        for i, text in enumerate(texts):
            buckets, values = _buckets(text, self._words)
            out[i] = self._coef[buckets] @ values + self.weights.intercept
        return out

    def save(self, path: Path) -> None:
        """Write to a file."""
        from safetensors.numpy import save_file

        w = self.weights
        record = {
            "words": list(w.words),
            "intercept": w.intercept,
            "threshold": w.threshold,
            "quality": w.quality,
            "training_data": w.training_data,
        }
        save_file({"coef": w.coef}, path, metadata={"fluency": json.dumps(record, ensure_ascii=False)})
        path.chmod(0o644)  # safetensors writes for its owner only


def load_fluency_scorer(path: Path = SHIPPED) -> FluencyScorer:
    """Read what `FluencyScorer.save` wrote; by default the model of English that comes with tamis.

    Raises:
        ModelError: The file is not one.
    """
    return _load(path, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=4)
def _load(path: Path, stamp: int) -> FluencyScorer:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            record = json.loads(stored.metadata()["fluency"])
            coef = stored.get_tensor("coef")
        weights = FluencyWeights(
            tuple(record["words"]),
            coef,
            float(record["intercept"]),
            float(record["threshold"]),
            dict(record["quality"]),
            str(record["training_data"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is no fluency model ({error}); fit it again") from error
    return FluencyScorer(weights, str(path) if path != SHIPPED else "tamis")


def fit_fluency(
    whole: Sequence[str],
    broken: Sequence[str],
    *,
    held_whole: Sequence[str],
    held_broken: Sequence[str],
    inverse_penalty: float = 8.0,
    training_data: str = "",
) -> FluencyScorer:
    """Fit to whole and broken sentences; both kinds weigh the same.

    Args:
        whole: Whole sentences.
        broken: Broken ones.
        held_whole: Whole sentences for the threshold (which passes nine in ten) and the quality.
        held_broken: Broken ones for the quality.
        inverse_penalty: C of the L2 penalty.
        training_data: Tag of the sentences.

    Raises:
        ModelError: Too few sentences, or scipy is not installed.
    """
    try:
        from scipy.optimize import minimize
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise ModelError("fitting needs scipy; run: pip install 'tamis[models]'") from error

    if min(map(len, (whole, broken, held_whole, held_broken))) < 20:
        raise ModelError("too few sentences to fit fluency to; give some hundreds of each kind")
    counts = Counter(w for text in whole for w in set(_tokens(text)) if w[0].isalnum())
    least = max(3, FREQUENT * len(whole) // 12_000)
    words = tuple(sorted(w for w, n in counts.items() if n >= least))
    known = frozenset(words)
    rows = [_buckets(text, known) for text in (*whole, *broken)]
    matrix = csr_matrix(
        (
            np.concatenate([v for _, v in rows]),
            np.concatenate([b for b, _ in rows]),
            np.cumsum([0, *(len(b) for b, _ in rows)]),
        ),
        shape=(len(rows), 1 << BITS),
    )
    transposed = matrix.T.tocsr()
    wanted = np.repeat([1.0, 0.0], [len(whole), len(broken)])
    share = len(rows) / 2 / np.where(wanted == 1, len(whole), len(broken))

    def loss(point: Array) -> tuple[float, Array]:
        logits = matrix @ point[:-1] + point[-1]
        each = share * (np.logaddexp(0, logits) - wanted * logits)
        slope = inverse_penalty * share * (1 / (1 + np.exp(-np.clip(logits, -500, 500))) - wanted)
        gradient = np.append(transposed @ slope + point[:-1], slope.sum())
        return float(inverse_penalty * each.sum() + 0.5 * point[:-1] @ point[:-1]), gradient

    found = minimize(
        loss, np.zeros((1 << BITS) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-3}
    )
    fitted = FluencyScorer(
        FluencyWeights(words, found.x[:-1].astype(np.float16), float(found.x[-1]), 0.5, {}, training_data)
    )
    good, bad = fitted.score(held_whole)[:, 0], fitted.score(held_broken)[:, 0]
    threshold = float(np.quantile(good, 1 - PASS))
    quality = {
        "auc": round(auc(good, bad), 4),
        "whole_passed": round(float((good >= threshold).mean()), 4),
        "broken_refused": round(float((bad < threshold).mean()), 4),
        "whole": len(good),
        "broken": len(bad),
    }
    w = fitted.weights
    return FluencyScorer(FluencyWeights(w.words, w.coef, w.intercept, threshold, quality, training_data))


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower().replace("’", "'"))


def _buckets(text: str, words: frozenset[str]) -> tuple[npt.NDArray[np.int64], Array]:
    """Hashed features of a text and their values, which have unit length together."""
    tokens = _tokens(text)
    classes = ["<", *(_class(t, words) for t in tokens), ">"]
    features = [f"{n}:{' '.join(classes[i : i + n])}" for n in _ORDERS for i in range(len(classes) - n + 1)]
    plain = [t for t in tokens if t[0].isalnum()]
    for n in _REPEATED:
        again = sum(plain[i : i + n] == plain[i + n : i + 2 * n] for i in range(len(plain) - 2 * n + 1))
        features += [f"r{n}"] * again
    counts = Counter(
        xxhash.xxh3_64_intdigest(f.encode("utf-8", "surrogatepass")) >> (64 - BITS) for f in features
    )
    values = np.fromiter(counts.values(), np.float64, len(counts))
    return np.fromiter(counts.keys(), np.int64, len(counts)), values / np.sqrt(values @ values)


def _class(token: str, words: frozenset[str]) -> str:
    if token in words:
        return token
    if not token[0].isalnum():
        return token[:3]
    if token[0].isdigit():
        return "0"
    return next((f"-{e}" for e in _ENDINGS if token.endswith(e) and len(token) > len(e) + 1), "-")
