"""Calibration is right on average, changes no order, and lives in the last layer; figures are those of the textbook."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.training.calibration import (
    Calibration,
    area_under_curve,
    expected_calibration_error,
    fit_calibration,
    fold,
    label_figures,
)


def draw(temperature, shift, n=4000, seed=0):
    """Logits that are wrong by a temperature and a shift, and truths drawn from the right ones."""
    rng = np.random.default_rng(seed)
    right = rng.normal(0, 2, (n, 2))
    truth = (rng.random((n, 2)) < 1 / (1 + np.exp(-right))).astype(float)
    return (right - np.asarray(shift)) * temperature, truth


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    logits, truth = draw(temperature, (0, 0))
    found = fit_calibration(logits, truth)
    assert found.temperature == pytest.approx(temperature, rel=0.1) and found.shift == (0.0, 0.0)
    after = 1 / (1 + np.exp(-found.apply(logits)[:, 0]))
    assert expected_calibration_error(after, truth[:, 0]) < 0.03


def test_shifts_are_found_label_by_label():
    logits, truth = draw(2.0, (1.0, -0.5))
    found = fit_calibration(logits, truth, method="shift")
    np.testing.assert_allclose([found.temperature, *found.shift], [2.0, 1.0, -0.5], atol=0.2)


def test_unknown_labels_have_no_say():
    logits, truth = draw(2.0, (0, 0))
    half = truth.copy()
    half[::2, 0] = np.nan
    wrong = logits.copy()
    wrong[::2, 0] = 1e3  # whatever stands there
    assert fit_calibration(wrong, half).temperature == pytest.approx(
        fit_calibration(logits, half).temperature, rel=1e-6
    )


@pytest.mark.parametrize("method", ["temperature", "shift", "none"])
def test_nothing_to_fit_on_changes_nothing(method):
    for logits, truth in ((np.zeros((0, 2)), np.zeros((0, 2))), (np.ones((3, 2)), np.full((3, 2), np.nan))):
        found = fit_calibration(logits, truth, method=method)
        assert (found.temperature, found.shift, found.examples) == (1.0, (0.0, 0.0), 0)


def test_texts_told_apart_perfectly_do_not_make_it_certain():
    logits = np.array([[3.0], [-3.0]] * 20)
    found = fit_calibration(logits, (logits > 0).astype(float))
    assert 0.05 <= found.temperature < 1


def test_a_handful_of_texts_changes_little():
    """Six texts that happen to be told apart are no evidence for certainty."""
    logits = np.array([[0.1], [-0.1]] * 3)
    found = fit_calibration(logits, (logits > 0).astype(float), method="shift")
    assert 0.5 < found.temperature <= 1.0 and abs(found.shift[0]) < 0.1


def test_it_is_folded_into_a_layer():
    import torch

    layer = torch.nn.Linear(5, 2)
    x = torch.randn(7, 5)
    calibration = Calibration(1.7, (0.3, -0.2), 9)
    expected = calibration.apply(layer(x).detach().numpy())
    fold(layer, calibration)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60))
def test_the_area_is_the_chance_of_the_right_order(pairs):
    score, truth = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    assume(truth.any() and not truth.all())
    a, b = score[truth][:, None], score[~truth][None]
    assert area_under_curve(score, truth) == pytest.approx(float(((a > b) + 0.5 * (a == b)).mean()))


def test_calibration_error_by_hand():
    assert expected_calibration_error([0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1]) == pytest.approx(0.1)
    assert expected_calibration_error([1.0, 1.0], [1, 0]) == pytest.approx(0.5)
    assert np.isnan(expected_calibration_error([], []))


def test_figures_agree_with_scikit_learn_and_lie_in_their_intervals():
    from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

    logits, truth = draw(2.0, (0, 0), n=400)
    targets = truth[:, 0].copy()
    targets[:10] = np.nan
    row = label_figures(logits[:, 0], logits[:, 0] / 2, targets)
    y, flagged = truth[10:, 0], logits[10:, 0] >= 0
    expected = {
        "auc": roc_auc_score(y, logits[10:, 0]),
        "f1": f1_score(y, flagged),
        "precision": precision_score(y, flagged),
        "recall": recall_score(y, flagged),
        "base_rate": y.mean(),
    }
    for name, value in expected.items():
        assert row[name]["value"] == pytest.approx(value, abs=1e-4)
    assert row["n"] == 390 and row["ece"]["value"] < row["ece_before"]["value"]
    for figure in row.values():
        if isinstance(figure, dict):
            assert figure["low"] <= figure["value"] + 0.02 and figure["value"] <= figure["high"] + 0.02
            assert figure["low"] < figure["high"]


def test_figures_of_one_class_or_none_are_empty_not_wrong():
    row = label_figures([1.0, 2.0], [1.0, 2.0], [1.0, 1.0])
    assert row["auc"]["value"] is None and row["recall"]["value"] == 1.0
    assert label_figures([1.0], [1.0], [np.nan]) == {"n": 0, "positives": 0}
