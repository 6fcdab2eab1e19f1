"""The linear probe against scikit-learn, and sets on which it has little to go by."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emotion_toolbox.probes import STRENGTHS, choose_strength, fit_probe


def noisy_classes(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.normal(3, 7, (count, 20)) + 4 * np.eye(classes, 20)[labels]
    return features.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_probe_is_scikit_learns_in_one_layer(classes):
    x, y = noisy_classes(210, classes)
    unseen = noisy_classes(50, classes, seed=1)[0]
    weight, bias, note = fit_probe(x, y, classes, "accuracy")
    strength = float(note.split()[2].rstrip(","))
    regression = LogisticRegression(C=strength, max_iter=2000, tol=1e-6)
    reference = make_pipeline(StandardScaler(), regression).fit(x.astype(np.float64), y)
    found = softmax(unseen @ weight.T + bias, axis=1)
    np.testing.assert_allclose(found, reference.predict_proba(unseen), atol=5e-3)
    assert weight.shape == (classes, 20) and weight.dtype == bias.dtype == np.float32


@pytest.mark.parametrize(
    ("monitor", "scoring"),
    [("macro_f1", "f1_macro"), ("accuracy", "accuracy"), ("loss", "neg_log_loss")],
)
def test_the_strength_is_the_best_by_the_criterion_of_the_run(monitor, scoring):
    x, y = noisy_classes(120, 3)
    x = StandardScaler().fit_transform(x)
    scores = [
        cross_val_score(
            LogisticRegression(C=c, max_iter=500, tol=1e-3), x, y, cv=5, scoring=scoring
        ).mean()
        for c in STRENGTHS
    ]
    strength, how = choose_strength(x, y, monitor)
    assert strength == STRENGTHS[int(np.argmax(scores))] and "5-fold" in how


def test_a_class_smaller_than_the_folds_makes_fewer_of_them():
    x, y = noisy_classes(60, 3)
    few = np.r_[np.flatnonzero(y != 2), np.flatnonzero(y == 2)[:3]]
    assert "3-fold" in choose_strength(x[few], y[few], "macro_f1")[1]


@pytest.mark.parametrize("classes", [2, 3])
def test_one_image_a_class_is_enough_to_begin(classes):
    x, y = noisy_classes(classes, classes)
    weight, bias, note = fit_probe(x, y, classes, "macro_f1")
    assert "too few images" in note and np.isfinite(weight).all() and np.isfinite(bias).all()
    assert ((x @ weight.T + bias).argmax(1) == y).all()


def test_features_that_are_constant_leave_the_frequencies():
    y = np.array([0] * 30 + [1] * 10 + [2] * 20)
    weight, bias, _ = fit_probe(np.full((60, 20), 5, np.float32), y, 3, "macro_f1")
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
    found = softmax(np.full((1, 20), 5) @ weight.T + bias)[0]
    np.testing.assert_allclose(found, [0.5, 1 / 6, 1 / 3], atol=0.02)


def test_a_class_without_images_is_the_least_likely():
    x, y = noisy_classes(60, 3)
    weight, bias, _ = fit_probe(x, y, 5, "macro_f1")
    assert softmax(x @ weight.T + bias, axis=1)[:, 3:].max() < 1e-6
    weight, bias, _ = fit_probe(x, np.zeros_like(y), 2, "macro_f1")  # or all of one class
    assert ((x @ weight.T + bias).argmax(1) == 0).all()
