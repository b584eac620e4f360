"""The linear first stage: TF-IDF over words and five calibrated linear SVMs, averaged (alt-profanity-check).

The payload is two joblib pickles of scikit-learn objects. They are read once, here, after their sha256 was
checked; what is kept is arrays (safetensors) and the vocabulary (JSON), so that scoring needs neither pickle
nor scikit-learn:

    linear.safetensors   idf (V,), coef (5, V), intercept (5,), slope (5,), offset (5,), all float64
    vocabulary.json      V words, in index order
"""

from __future__ import annotations

import json
from pathlib import Path

from models.store import Package
from schemas.errors import ModelError

_MODEL = "profanity_check/data/model.joblib"
_VECTORIZER = "profanity_check/data/vectorizer.joblib"

# What the scorer reimplements; a vectorizer set otherwise would be scored wrongly, so it is refused.
_EXPECTED = {
    "analyzer": "word",
    "binary": False,
    "lowercase": True,
    "ngram_range": (1, 1),
    "norm": "l2",
    "preprocessor": None,
    "strip_accents": None,
    "sublinear_tf": False,
    "token_pattern": r"(?u)\b\w\w+\b",
    "tokenizer": None,
    "use_idf": True,
}

PACKAGE = Package(
    name="linear",
    kind="scorer",
    distribution="alt-profanity-check",
    version="1.9.1",
    payload={
        _MODEL: "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
        _VECTORIZER: "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
    },
    licence="MIT",
    training_data="davidson+jigsaw-2018",  # its authors name both; so it is no independent judge of either's pupils
    download_mb=1,
    disk_mb=1,
    summary="linear profanity model over words, the cheap first stage",
    extra={"labels": ["toxicity"]},
)


def convert(payload: Path, target: Path) -> None:
    """Read the two scikit-learn objects and save their numbers.

    Raises:
        ImportError: scikit-learn is not installed.
        ModelError: The objects are not what the scorer reimplements.
    """
    import joblib
    import numpy as np
    import sklearn  # noqa: F401
    from safetensors.numpy import save_file

    vectorizer = joblib.load(payload / _VECTORIZER)
    parameters = vectorizer.get_params()
    odd = {key: parameters.get(key) for key, value in _EXPECTED.items() if parameters.get(key) != value}
    folds = joblib.load(payload / _MODEL).calibrated_classifiers_
    if odd or any(fold.method != "sigmoid" or list(fold.classes) != [0, 1] for fold in folds):
        raise ModelError(
            f"the linear model is not the one this version of tamis can convert ({odd or 'calibration'})"
        )

    words = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.__getitem__)
    (target / "vocabulary.json").write_text(json.dumps(words, ensure_ascii=False), "utf-8")
    save_file(
        {
            "idf": np.asarray(vectorizer.idf_, np.float64),
            "coef": np.stack([fold.estimator.coef_[0] for fold in folds]).astype(np.float64),
            "intercept": np.array([fold.estimator.intercept_[0] for fold in folds], np.float64),
            "slope": np.array([fold.calibrators[0].a_ for fold in folds], np.float64),
            "offset": np.array([fold.calibrators[0].b_ for fold in folds], np.float64),
        },
        target / "linear.safetensors",
    )
