"""Acceptability fitted on whole and broken sentences."""

from __future__ import annotations

import numpy as np
import pytest

from models.metrics.acceptability import (
    FEATURES,
    Acceptability,
    auc,
    fit_acceptability,
    surprisal_features,
)
from schemas.errors import ModelError


def sentences(n: int, peak: float, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        nats = rng.exponential(2.0, rng.integers(5, 20))
        nats[rng.integers(1, len(nats) - 1)] += peak
        out.append(nats.astype(np.float32))
    return out


def test_it_learns_what_sets_broken_sentences_apart(tmp_path):
    whole, broken = surprisal_features(sentences(300, 0, 0)), surprisal_features(sentences(300, 9, 1))
    held_whole, held_broken = (
        surprisal_features(sentences(200, 0, 2)),
        surprisal_features(sentences(200, 9, 3)),
    )
    fitted = fit_acceptability(
        whole, broken, held_whole=held_whole, held_broken=held_broken, of={"model": "x"}
    )
    assert fitted.quality["auc"] > 0.9 and fitted.quality["whole_passed"] == pytest.approx(0.9, abs=0.01)
    assert fitted.quality["broken_refused"] > 0.7 and fitted.quality["whole"] == 200
    assert fitted.score(held_whole).mean() > 0.6 > 0.4 > fitted.score(held_broken).mean()
    fitted.save(tmp_path / "a.json")
    again = Acceptability.load(tmp_path / "a.json")
    assert again == fitted and np.array_equal(again.score(held_whole), fitted.score(held_whole))


def test_where_there_is_nothing_to_learn_it_says_so():
    whole, broken = surprisal_features(sentences(300, 0, 0)), surprisal_features(sentences(300, 0, 1))
    held = surprisal_features(sentences(300, 0, 2)), surprisal_features(sentences(300, 0, 3))
    fitted = fit_acceptability(whole, broken, held_whole=held[0], held_broken=held[1])
    assert fitted.quality["auc"] == pytest.approx(0.5, abs=0.07)


def test_features_of_short_and_empty_texts_are_numbers():
    features = surprisal_features(
        [np.zeros(0), np.array([3.0]), np.array([3.0, 1.0]), np.array([3.0, 2.0, 1.0])]
    )
    assert features.shape == (4, 2 * len(FEATURES)) and np.isfinite(features).all()


def test_too_few_sentences_and_no_file(tmp_path):
    few = surprisal_features(sentences(5, 0, 0))
    with pytest.raises(ModelError, match="too few"):
        fit_acceptability(few, few)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ModelError, match="fit it again"):
        Acceptability.load(tmp_path / "x.json")


def test_auc_counts_ties_half():
    assert auc([1, 1], [0, 0]) == 1 and auc([0.5], [0.5]) == 0.5 and auc([0, 1], [0.5]) == 0.5
