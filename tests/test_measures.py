"""The metrics against scikit-learn, SciPy and closed forms; the intervals against a simulation."""

import dataclasses
import json
import re
from collections.abc import Callable
from math import comb

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from emotion_toolbox.measures import (
    TEMPERATURES,
    Estimate,
    Predictions,
    apply_temperature,
    calibrate,
    confusion_metrics,
    fit_temperature,
    gap_standard_error,
    gap_verdict,
    most_confused_pairs,
    paired_test,
    per_class_table,
    reliability_table,
    start_verdict,
)
from emotion_toolbox.tables import MIKELS_CLASSES, POSITIVE_EMOTIONS
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.intervals import evaluate_predictions

Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def predictions(n: int, classes: int, *, skill: float = 1.5, seed: int = 0) -> Arrays:
    """Labels of uneven frequency, and probabilities that lean towards them."""
    rng = np.random.default_rng(seed)
    frequency = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = rng.choice(classes, size=n, p=frequency)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += skill
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


# --- Estimate ----------------------------------------------------------------------------------


def test_estimate_prints_and_serialises() -> None:
    estimate = Estimate(0.8534, 0.82149, 0.8836)
    assert str(estimate) == "0.853 [0.821, 0.884]"
    assert f"{estimate}" == str(estimate)
    assert f"{estimate:.1%}" == "85.3% [82.1%, 88.4%]"
    assert json.loads(json.dumps(estimate.to_json())) == {
        "value": 0.8534,
        "low": 0.82149,
        "high": 0.8836,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = 1.0  # type: ignore[misc]


# --- point values ------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 8, 20])
def test_values_are_those_of_scikit_learn(classes: int) -> None:
    labels, p = predictions(500, classes)
    answers = p.argmax(axis=1)
    result = evaluate_predictions(labels, p, names(classes), resamples=50)
    every = range(classes)
    expected = {
        "accuracy": sk.accuracy_score(labels, answers),
        "macro_f1": sk.f1_score(labels, answers, labels=every, average="macro"),
        "weighted_f1": sk.f1_score(labels, answers, labels=every, average="weighted"),
        "macro_precision": sk.precision_score(
            labels, answers, labels=every, average="macro", zero_division=0
        ),
        "macro_recall": sk.recall_score(labels, answers, labels=every, average="macro"),
        "cohen_kappa": sk.cohen_kappa_score(labels, answers),
    }
    if classes > 2:  # of two classes, the label is always among the two most probable
        expected["top2_accuracy"] = sk.top_k_accuracy_score(labels, p, k=2, labels=every)
    assert {name: result[name].value for name in expected} == pytest.approx(expected, abs=1e-12)
    assert set(result) == {*expected, "ece", "nll"}
    confusion = sk.confusion_matrix(labels, answers, labels=every)
    by_hand = confusion_metrics(confusion)
    assert by_hand == pytest.approx({k: expected[k] for k in by_hand}, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_class_absent_from_the_labels_counts_as_in_scikit_learn() -> None:
    labels = np.array([0, 0, 1, 1])
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]])
    result = evaluate_predictions(labels, p, names(3), resamples=200)
    f1 = sk.f1_score(labels, p.argmax(1), labels=range(3), average="macro", zero_division=0)
    assert result["macro_f1"].value == pytest.approx(f1)
    assert result["macro_recall"].value == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert result["macro_f1"].high <= 2 / 3 + 1e-12


@pytest.mark.filterwarnings("error")
def test_one_class_always_answered_has_kappa_zero_and_no_warning() -> None:
    result = evaluate_predictions([1, 1, 1], np.tile([0.2, 0.8], (3, 1)), names(2), resamples=20)
    assert result["cohen_kappa"] == Estimate(0.0, 0.0, 0.0)
    assert result["accuracy"] == Estimate(1.0, 1.0, 1.0)


def test_polarity_sums_the_positive_classes() -> None:
    positive = {"amusement", "awe", "contentment", "excitement"}
    assert positive == POSITIVE_EMOTIONS
    assert positive < set(MIKELS_CLASSES)
    p = np.zeros((3, 8))
    # Anger is the single most probable, yet the positive classes together weigh more.
    p[0, [MIKELS_CLASSES.index(c) for c in ("anger", "awe", "amusement")]] = 0.4, 0.3, 0.3
    p[1, MIKELS_CLASSES.index("sadness")] = 1
    p[2, MIKELS_CLASSES.index("fear")] = 1
    labels = [MIKELS_CLASSES.index(c) for c in ("contentment", "disgust", "awe")]
    result = evaluate_predictions(labels, p, MIKELS_CLASSES, resamples=20)
    assert result["polarity_accuracy"].value == pytest.approx(2 / 3)
    order = np.random.default_rng(0).permutation(8)
    shuffled = [MIKELS_CLASSES[i] for i in order]
    moved = evaluate_predictions(
        [shuffled.index(MIKELS_CLASSES[i]) for i in labels], p[:, order], shuffled, resamples=20
    )
    assert moved["polarity_accuracy"].value == pytest.approx(2 / 3)


def test_top_two_holds_the_answer_even_where_probabilities_tie() -> None:
    labels = np.array([0, 1, 2, 3])
    result = evaluate_predictions(labels, np.full((4, 4), 0.25), names(4), resamples=20)
    assert result["accuracy"].value == 0.25
    assert result["top2_accuracy"].value == 0.5


# --- intervals ---------------------------------------------------------------------------------


def macro_f1_of(labels: npt.NDArray[np.int64], answers: npt.NDArray[np.int64]) -> float:
    cells = np.bincount(4 * labels + answers, minlength=16).reshape(4, 4)
    return float(confusion_metrics(cells)["macro_f1"])


@pytest.mark.parametrize(
    ("metric", "statistic", "method"),
    [
        ("accuracy", lambda y, a, two, p: np.mean(y == a), "percentile"),
        ("macro_f1", lambda y, a, two, p: macro_f1_of(y, a), "percentile"),
        ("top2_accuracy", lambda y, a, two, p: np.mean(two), "percentile"),
        ("ece", None, "basic"),
        ("nll", None, "percentile"),
    ],
)
def test_intervals_are_those_of_scipy(
    metric: str, statistic: Callable[..., float] | None, method: str
) -> None:
    labels, p = predictions(250, 4, skill=2.0)
    answers = p.argmax(axis=1)
    two = (np.argsort(-p, axis=1)[:, :2] == labels[:, None]).any(axis=1)
    confidence = p.max(axis=1)

    def ece(y: object, a: npt.NDArray[np.int64], t: object, row: npt.NDArray[np.int64]) -> float:
        return guo_error(confidence[row], labels[row] == answers[row])

    def nll(y: object, a: object, t: object, row: npt.NDArray[np.int64]) -> float:
        return float(-np.log(p[row, labels[row]]).mean())

    data = (labels, answers, two, np.arange(len(labels)))
    reference = stats.bootstrap(
        data,
        statistic or {"ece": ece, "nll": nll}[metric],
        paired=True,
        vectorized=False,
        n_resamples=3000,
        method=method,
        rng=np.random.default_rng(1),
    )
    ours = evaluate_predictions(labels, p, names(4), resamples=6000)[metric]
    # Standard error of a 2.5 % quantile of 3000 normal draws: about 0.05 standard deviations.
    tolerance = 0.25 * reference.standard_error
    low, high = reference.confidence_interval
    assert ours.low == pytest.approx(low, abs=tolerance)
    assert ours.high == pytest.approx(high, abs=tolerance)


def test_95_percent_intervals_hold_the_truth_about_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    population = np.array([[0.30, 0.05, 0.05], [0.06, 0.22, 0.02], [0.04, 0.06, 0.20]])
    truth = {k: float(v) for k, v in confusion_metrics(population).items()}
    runs, inside = 250, dict.fromkeys(truth, 0)
    for run in range(runs):
        cell = rng.choice(9, size=400, p=population.ravel())
        labels, p = cell // 3, np.eye(3)[cell % 3]
        result = evaluate_predictions(labels, p, names(3), resamples=300, seed=run)
        for name, value in truth.items():
            inside[name] += result[name].low <= value <= result[name].high
    # Three standard errors of a 95 % share in 250 runs are 4 points.
    assert all(0.90 <= count / runs <= 0.99 for count in inside.values()), inside


def test_intervals_repeat_by_seed_and_narrow_with_the_square_root_of_n() -> None:
    labels, p = predictions(300, 8)
    first = evaluate_predictions(labels, p, MIKELS_CLASSES, seed=3)
    assert first == evaluate_predictions(labels, p, MIKELS_CLASSES, seed=3)
    assert first != evaluate_predictions(labels, p, MIKELS_CLASSES, seed=4)
    large = evaluate_predictions(np.tile(labels, 16), np.tile(p, (16, 1)), MIKELS_CLASSES)
    for name in ("accuracy", "macro_f1", "top2_accuracy", "polarity_accuracy", "ece", "nll"):
        assert large[name].value == pytest.approx(first[name].value)
        width = (first[name].high - first[name].low) / (large[name].high - large[name].low)
        assert 3 < width < 5.5, name


@pytest.mark.parametrize("seed", range(6))
def test_every_interval_holds_its_value(seed: int) -> None:
    """Also the calibration error of a calibrated model, where a percentile interval would not."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(3, 0.8), size=400)
    labels = (p.cumsum(axis=1) < rng.random((400, 1))).sum(axis=1)
    for name, e in evaluate_predictions(labels, p, names(3), resamples=300).items():
        assert 0 <= e.low <= e.value <= e.high, name


def test_many_classes_are_resampled_in_bounded_memory() -> None:
    labels, p = predictions(300, 150)
    result = evaluate_predictions(labels, p, names(150), resamples=400)  # more than one chunk
    assert result["accuracy"].low < result["accuracy"].value < result["accuracy"].high


# --- wrong input -------------------------------------------------------------------------------

GOOD = np.array([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], GOOD, r"inconsistent numbers of samples: \[2, 3"),
        ([0, 1, 1], np.where(GOOD == 0.8, np.nan, GOOD), r"probabilities\[1\] .* not \[0.2, nan\]"),
        ([0, 1, 1], GOOD * 3 - 1, r"probabilities\[1\] must be .*softmax"),
        ([0, 1, 1], GOOD * [[1], [1], [0.9]], r"probabilities\[2\] must be .*sum to 1"),
        ([0, 1, 1], GOOD - [[0, 0], [0.3, -0.3], [0, 0]], r"probabilities\[1\] must be 0 or more"),
    ],
)
def test_wrong_input_is_named(labels: list[int], probabilities: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(labels, np.asarray(probabilities), names(2))


def test_rounded_probabilities_pass() -> None:
    labels, p = predictions(100, 8)
    exact = evaluate_predictions(labels, p, MIKELS_CLASSES, resamples=50)
    rounded = evaluate_predictions(labels, p.round(4), MIKELS_CLASSES, resamples=50)
    assert rounded["accuracy"] == exact["accuracy"]
    half = evaluate_predictions(labels, p.astype(np.float16), MIKELS_CLASSES, resamples=50)
    assert half["accuracy"].value == pytest.approx(exact["accuracy"].value, abs=0.02)


# --- paired test -------------------------------------------------------------------------------


def discordant(ours_only: int, other_only: int, both: int) -> list[npt.NDArray[np.int64]]:
    """True classes and two models' answers with the given numbers of right ones."""
    n = ours_only + other_only + both
    labels = np.zeros(n, dtype=np.int64)
    ours, other = labels.copy(), labels.copy()
    other[:ours_only] = 1
    ours[ours_only : ours_only + other_only] = 1
    return [labels, ours, other]


@pytest.mark.parametrize(("ours_only", "other_only"), [(10, 2), (2, 10), (7, 7), (25, 11), (1, 0)])
def test_paired_p_value_in_closed_form(ours_only: int, other_only: int) -> None:
    result = paired_test(*discordant(ours_only, other_only, 50))
    n, k = ours_only + other_only, min(ours_only, other_only)
    tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (result.ours_only, result.other_only) == (ours_only, other_only)
    assert result.difference.value == pytest.approx((ours_only - other_only) / (n + 50))


def test_paired_interval_is_that_of_resampling_images() -> None:
    labels, ours, other = discordant(40, 22, 138)
    gain = (ours == labels).astype(float) - (other == labels)
    reference = stats.bootstrap(
        (gain,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    )
    difference = paired_test(labels, ours, other, resamples=8000).difference
    tolerance = 0.2 * reference.standard_error
    assert difference.low == pytest.approx(reference.confidence_interval.low, abs=tolerance)
    assert difference.high == pytest.approx(reference.confidence_interval.high, abs=tolerance)


def test_identical_models_and_swapped_models() -> None:
    labels, ours, other = discordant(9, 3, 20)
    same = paired_test(labels, ours, ours)
    assert same.p_value == 1.0
    assert same.difference == Estimate(0.0, 0.0, 0.0)
    forth, back = paired_test(labels, ours, other), paired_test(labels, other, ours)
    assert forth.p_value == back.p_value
    assert forth.difference.value == -back.difference.value
    assert (
        json.loads(json.dumps(dataclasses.asdict(forth)))["difference"]
        == forth.difference.to_json()
    )


def test_paired_test_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="3, 3 and 2 entries"):
        paired_test([0, 1, 1], [0, 1, 1], [0, 1])


# --- calibration -------------------------------------------------------------------------------


def guo_error(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    """Equation 3 of Guo et al. 2017, bin by bin, as written there."""
    error = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_calibration_against_the_paper_and_scikit_learn() -> None:
    labels, p = predictions(700, 5)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    error = evaluate_predictions(labels, p, names(5), resamples=20)["ece"].value
    assert error == pytest.approx(guo_error(confidence, right))
    table = reliability_table(labels, p)
    accuracy, mean_confidence = calibration_curve(right, confidence, n_bins=15)
    filled = table[table["count"] > 0]
    np.testing.assert_allclose(filled["accuracy"], accuracy)
    np.testing.assert_allclose(filled["confidence"], mean_confidence)
    assert table["count"].sum() == 700
    np.testing.assert_allclose(table["lower"][1:], table["upper"][:-1])
    assert (table["lower"].iloc[0], table["upper"].iloc[-1]) == (0.0, 1.0)


def test_calibration_by_hand() -> None:
    p = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    labels = np.array([0, 0, 0, 1, 1, 0])  # 3 of 4 right at 0.9, 1 of 2 right at 0.6

    def error(labels: npt.ArrayLike, p: npt.NDArray[np.float64]) -> float:
        return evaluate_predictions(labels, p, names(2), resamples=20)["ece"].value

    assert error(labels, p) == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.1)
    table = reliability_table(labels, p)
    filled = table[table["count"] > 0]
    assert filled["count"].tolist() == [2, 4] and filled["accuracy"].tolist() == [0.5, 0.75]
    assert (table["accuracy"].isna() == (table["count"] == 0)).all()
    upper = table["upper"][11]  # a bin holds its upper edge
    edge = reliability_table(np.array([0]), np.array([[upper, 1 - upper]]))
    assert edge["count"].to_numpy().nonzero()[0].tolist() == [11]
    certain = np.eye(2)[[0, 1]]
    assert error([0, 1], certain) == 0.0
    assert error([1, 0], certain) == 1.0


def softmax_of(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(torch.from_numpy(logits).softmax(1))


def drawn_from(logits: npt.NDArray[np.float64], seed: int = 0) -> npt.NDArray[np.int64]:
    """Labels that are as frequent as the softmax of `logits` says."""
    below = softmax_of(logits).cumsum(axis=1) < np.random.default_rng(seed).random((len(logits), 1))
    return np.asarray(below.sum(axis=1))


def test_negative_log_likelihood_is_that_of_scikit_learn_and_torch() -> None:
    labels, p = predictions(300, 6)

    def nll(probabilities: npt.NDArray[np.float64]) -> float:
        return evaluate_predictions(labels, probabilities, names(6), resamples=20)["nll"].value

    assert nll(p) == pytest.approx(sk.log_loss(labels, p, labels=range(6)), rel=1e-12)
    with_zeros = np.where(p < 0.05, 0, p)
    with_zeros /= with_zeros.sum(axis=1, keepdims=True)
    assert (with_zeros[np.arange(300), labels] == 0).any()
    assert nll(with_zeros) == pytest.approx(sk.log_loss(labels, with_zeros, labels=range(6)))
    logits = np.random.default_rng(0).normal(size=(300, 6)) * 5
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor(labels))
    assert nll(softmax_of(logits)) == pytest.approx(float(expected))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("classes", [2, 8])
def test_the_temperature_is_the_one_that_the_logits_give(scale: float, classes: int) -> None:
    """Against Newton-like minimisation on the logits themselves, and against what made them."""
    true = np.random.default_rng(1).normal(size=(4000, classes)) * 2
    labels, logits = drawn_from(true), torch.from_numpy(scale * true)
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([inverse], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits * inverse, torch.from_numpy(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    temperature = fit_temperature(labels, softmax_of(scale * true))
    assert temperature == pytest.approx(1 / inverse.item(), rel=1e-3)
    assert temperature == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize("temperature", TEMPERATURES + (1.0, 1.7))
def test_a_temperature_divides_the_logits_and_keeps_the_answers(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(200, 8)) * 10
    labels, p = drawn_from(logits), softmax_of(logits)
    found = calibrate(Predictions(labels, p, loss=0.0), temperature)
    np.testing.assert_allclose(found.probabilities, softmax_of(logits / temperature), rtol=1e-9)
    assert (found.predicted == p.argmax(axis=1)).all() and (found.labels == labels).all()
    divided, truth = torch.from_numpy(logits / temperature), torch.from_numpy(labels)
    losses = torch.nn.functional.cross_entropy(divided, truth, reduction="none")
    smallest = float(np.finfo(np.float64).eps)  # what a probability counts as, at least
    assert found.loss == pytest.approx(float(losses.clamp(max=-np.log(smallest)).mean()))


def test_probabilities_of_zero_stay_probabilities() -> None:
    certain = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    for temperature in TEMPERATURES:
        found = apply_temperature(certain, temperature)
        np.testing.assert_allclose(found, certain, atol=1e-30)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("labels", "probabilities", "expected"),
    [
        ([0, 1], [[0.6, 0.4], [0.3, 0.7]], TEMPERATURES[0]),  # all are right: it would go to 0
        ([1, 0], [[0.6, 0.4], [0.3, 0.7]], TEMPERATURES[1]),  # none is: it would go to infinity
        ([0, 1, 1], [[0.5, 0.5]] * 3, 1.0),  # nothing to be gained
        ([0, 1], [[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([0, 0], [[1.0, 0.0], [0.0, 1.0]], 1.0),  # nor within the range
        ([1], [[0.2, 0.8]], TEMPERATURES[0]),
    ],
)
def test_the_temperature_of_extreme_answers(
    labels: list[int], probabilities: list[list[float]], expected: float
) -> None:
    assert fit_temperature(np.array(labels), np.array(probabilities)) == expected


def test_the_temperature_of_one_answer_for_every_image() -> None:
    """Its odds become those of the labels: log 4 / T = log 2."""
    found = fit_temperature(np.array([0, 0, 1]), np.tile([0.8, 0.2], (3, 1)))
    assert found == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_a_fitted_temperature_never_raises_the_likelihoods_loss(seed: int) -> None:
    """Where some answers are as wrong as can be, too."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(60, 4)) * 10 ** rng.uniform(-1, 2.5)
    labels, p = rng.integers(4, size=60), softmax_of(logits)
    temperature = fit_temperature(labels, p)
    assert TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
    before, after = (
        evaluate_predictions(labels, q, names(4), resamples=20)["nll"].value
        for q in (p, apply_temperature(p, temperature))
    )
    assert after <= before + 1e-12


# --- tables ------------------------------------------------------------------------------------


def test_most_confused_pairs() -> None:
    confusion = np.array([[50, 6, 0], [9, 30, 1], [0, 6, 0]])
    table = most_confused_pairs(confusion, ["awe", "fear", "anger"], top=3)
    expected = pd.DataFrame(
        {
            "true": ["fear", "awe", "anger"],
            "predicted": ["awe", "fear", "fear"],
            "count": [9, 6, 6],
            "share": [9 / 40, 6 / 56, 1.0],
        }
    )
    pd.testing.assert_frame_equal(table, expected)
    assert len(most_confused_pairs(confusion, ["awe", "fear", "anger"], top=50)) == 4
    assert most_confused_pairs(np.diag([3, 4]), ["a", "b"]).empty


def test_per_class_table_even_for_a_class_called_accuracy() -> None:
    classes = ["accuracy", "macro avg", "never seen"]
    labels, answers = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    table = per_class_table(labels, answers, classes)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, answers, labels=range(3), zero_division=0
    )
    assert table.index.tolist() == classes
    np.testing.assert_allclose(table["precision"], precision)
    np.testing.assert_allclose(table["recall"], recall)
    np.testing.assert_allclose(table["f1"], f1)
    assert table["support"].tolist() == support.tolist() == [2, 3, 0]


# --- the train-validation gap ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val", "n", "verdict"),
    [
        (0.95, 0.70, 1000, "Overfitting"),
        (0.80, 0.72, 2000, "Overfitting"),
        (0.80, 0.74, 50, "Healthy as far as one can tell"),  # 6 points, but 50 images
        (0.83, 0.80, 9000, "Healthy: the gap is real but too small"),
        (0.40, 0.42, 900, "Underfitting"),
        (0.90, 0.97, 3000, "Validation is better than training"),
        (1.00, 0.90, 24, "Healthy as far as one can tell"),
        (1.00, 1.00, 6, "Nothing can be concluded"),
        (1.00, 1.00, 60, "Healthy as far as one can tell"),
    ],
)
def test_gap_verdict(train: float, val: float, n: int, verdict: str) -> None:
    text = gap_verdict(train, val, n, classes=2)
    assert verdict in text
    assert f"{train:.1%}" in text
    assert f"{val:.1%}" in text
    assert f"{n:,} images" in text
    fields = {field.name for field in dataclasses.fields(EnhancedConfig)}
    assert set(re.findall(r"[A-Z]+(?:_[A-Z]+)+|[A-Z]{4,}", text)) <= fields


def test_what_training_brought_is_judged_against_chance() -> None:
    for n in (20, 121, 2000):
        noise = 2 * gap_standard_error(0.55, 0.60, n)
        told = "cannot tell" not in start_verdict(0.55, 0.60, n)
        assert told == (noise < 0.05)
        assert f"{100 * noise:.1f} points" in start_verdict(0.55, 0.60, n)
    assert "cannot tell" in start_verdict(0.5, 0.5, 100_000)


def test_gap_standard_error_is_that_of_two_independent_samples() -> None:
    rng = np.random.default_rng(0)
    gaps = (rng.binomial(400, 0.8, 20000) - rng.binomial(400, 0.7, 20000)) / 400
    assert gap_standard_error(0.8, 0.7, 400) == pytest.approx(gaps.std(), rel=0.03)
    assert gap_standard_error(1.0, 1.0, 20) > 0


def test_gap_within_two_standard_errors_is_no_evidence() -> None:
    for n in (20, 200, 2000):
        edge = 2 * gap_standard_error(0.9, 0.9, n)
        assert "no evidence" in gap_verdict(0.9, 0.9 - 0.9 * edge, n, classes=2)
    assert "Overfitting:" in gap_verdict(0.9, 0.7, 200, classes=2)
    assert "no evidence" in gap_verdict(0.9, 0.7, 20, classes=2)
    assert "no evidence" not in gap_verdict(0.9, 0.7, 20, classes=3)  # fewer than ten a class
