"""What predictions are worth: figures of confusion matrices, calibration, the gap."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report, f1_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from emotion_toolbox.emotions import MIKELS_CLASSES, POSITIVE_EMOTIONS

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
ECE_BINS = 15  # as in Guo et al. 2017
HEALTHY_GAP = 0.05  # a difference nobody need act on, even if it is real
LARGE_GAP = 0.15
LOW_TRAIN_ACCURACY = 0.6  # below this, the model has not even learnt what it was shown
FEW_PER_CLASS = 10  # validation images; with fewer, no epoch can be told from another


@dataclass(frozen=True)
class Estimate:
    """A measured value and the two ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self, ".3f")

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def to_json(self) -> dict[str, float]:
        """``{"value": ..., "low": ..., "high": ...}``, ready for ``json.dumps``."""
        return asdict(self)


def check_labels(name: str, values: npt.ArrayLike, classes: int | None = None) -> Labels:
    """`values` as a one-dimensional int64 array of class indices, or a ``ValueError``."""
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be one-dimensional and not empty, not {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integer class indices; their type is {array.dtype}")
    wrong = array < 0 if classes is None else (array < 0) | (array >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"{name}[{row}] is {array[row]}; a class index here is {allowed}")
    return array.astype(np.int64)


def check_probabilities(
    probabilities: npt.ArrayLike, rows: int, classes: int | None = None
) -> Floats:
    """`probabilities` as float64 [rows, C] whose rows sum to 1, or a ``ValueError``.

    They may come from a CSV with rounded decimals, so a row may miss 1 by a thousandth.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) != rows or p.shape[1] < 2:
        raise ValueError(
            f"probabilities must have one row for each of the {rows} labels and a column for each "
            f"of two or more classes; their shape is {p.shape}"
        )
    if classes is not None and p.shape[1] != classes:
        raise ValueError(f"probabilities have {p.shape[1]} columns for {classes} classes")
    problems = {
        "holds NaN or infinity": ~np.isfinite(p).all(axis=1),
        "holds a value outside 0 to 1": ((p < 0) | (p > 1 + 1e-3)).any(axis=1),
        "does not sum to 1 (apply softmax to logits first)": np.abs(p.sum(axis=1) - 1) > 1e-3,
    }
    for problem, wrong in problems.items():
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"probabilities[{row}] {problem}: {p[row].round(4).tolist()}")
    return p


def confusion_metrics(confusion: npt.NDArray[np.integer]) -> dict[str, float]:
    """Metrics of a confusion matrix [C, C] (rows true, columns predicted), each a number.

    Accuracy; F1, precision and recall as the mean of the classes (macro) or of the images
    (weighted); and Cohen's kappa (1960), how far accuracy lies above chance. A quotient without a
    denominator counts as 0, as with scikit-learn's ``zero_division=0``.
    """

    def quotient(top: npt.ArrayLike, bottom: npt.ArrayLike) -> Floats:
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(np.divide(top, bottom))

    hits, support, answers = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    total, f1 = int(support.sum()), quotient(2 * hits, support + answers)
    accuracy, chance = hits.sum() / total, (support / total * answers / total).sum()
    return {
        "accuracy": float(accuracy),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float((f1 * support).sum() / total),
        "macro_precision": float(quotient(hits, answers).mean()),
        "macro_recall": float(quotient(hits, support).mean()),
        "cohen_kappa": float(quotient(accuracy - chance, 1 - chance)),
    }


def macro_f1(labels: Labels, predicted: Labels, classes: int) -> float:
    """Mean F1 over all `classes`; one that does not occur counts as 0."""
    score = f1_score(labels, predicted, labels=range(classes), average="macro", zero_division=0)
    return float(score)


@dataclass(frozen=True)
class Predictions:
    """What a model says of N images: `labels` int64 [N], `probabilities` float64 [N, C]."""

    labels: Labels
    probabilities: Floats
    loss: float  # mean unweighted cross-entropy

    @property
    def predicted(self) -> Labels:
        """The most probable class of every image, int64 [N]."""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float((self.predicted == self.labels).mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes."""
        return macro_f1(self.labels, self.predicted, self.probabilities.shape[1])

    def score(self, name: str) -> float:
        """The figure `name` ("macro_f1", "accuracy" or "loss"), turned so that larger is better.

        -inf where it, or an answer, is not a number.
        """
        value = -self.loss if name == "loss" else float(getattr(self, name))
        finite = math.isfinite(value) and np.isfinite(self.probabilities).all()
        return value if finite else -math.inf


def hits_by_name(
    labels: Labels, probabilities: Floats, classes: Sequence[str]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which images [N] are right by a milder measure, where it means something for `classes`.

    top2_accuracy (three classes or more): the label is among the two most probable, ties going to
    the lower index. polarity_accuracy (Mikels' eight): the summed probability of the pleasant four
    is on the label's side of one half.
    """
    if len(set(classes)) != len(classes):
        raise ValueError(f"class names must be distinct, not {list(classes)}")
    found = {}
    if len(classes) > 2:
        first_two = np.argsort(-probabilities, axis=1, kind="stable")[:, :2]
        found["top2_accuracy"] = np.asarray((first_two == labels[:, None]).any(axis=1))
    if set(classes) == set(MIKELS_CLASSES):
        positive = np.array([name in POSITIVE_EMOTIONS for name in classes])
        says = probabilities[:, positive].sum(axis=1) > 0.5
        found["polarity_accuracy"] = np.asarray(says == positive[labels])
    return found


def reliability_table(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = ECE_BINS
) -> pd.DataFrame:
    """Confidence against accuracy in `bins` equal bins (lower, upper] of confidence.

    One row a bin: lower, upper, confidence and accuracy (means; NaN where empty), count. Raises
    ``ValueError`` for input that is no labels [N] and probabilities [N, C].
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least 1")
    y = check_labels("labels", labels)
    p = check_probabilities(probabilities, len(y))
    check_labels("labels", y, p.shape[1])
    edges, confidence = np.linspace(0, 1, bins + 1), p.max(axis=1)
    bin_of = np.digitize(confidence, edges[1:-1], right=True)
    images = pd.DataFrame({"confidence": confidence, "accuracy": p.argmax(axis=1) == y})
    grouped = images.astype(float).groupby(bin_of)
    table = pd.DataFrame({"lower": edges[:-1], "upper": edges[1:]})
    table[["confidence", "accuracy"]] = grouped.mean().reindex(range(bins))
    table["count"] = grouped.size().reindex(range(bins), fill_value=0)
    return table


def expected_calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean |accuracy - confidence| over the bins, weighted by their counts (Guo et al. 2017)."""
    table = reliability_table(labels, probabilities).query("count > 0")
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())


def calibration_estimate(
    labels: Labels, probabilities: Floats, resamples: int, rng: np.random.Generator
) -> Estimate:
    """The expected calibration error with its *basic* bootstrap interval.

    Noise in the bins' accuracies biases it upwards, and resampling adds the same once more. The
    basic interval mirrors the resamples about the value, and so takes that bias off.
    """
    confidence, n = probabilities.max(axis=1), len(labels)
    bin_of = np.digitize(confidence, np.linspace(0, 1, ECE_BINS + 1)[1:-1], right=True)
    excess, errors = (probabilities.argmax(axis=1) == labels) - confidence, []
    chunk = max(1, 500_000 // n)  # resamples at a time; bounds the memory
    for start in range(0, resamples, chunk):
        draws = min(chunk, resamples - start)
        image = rng.integers(n, size=(draws, n))
        cell = bin_of[image] + ECE_BINS * np.arange(draws)[:, None]
        sums = np.bincount(cell.ravel(), excess[image].ravel(), minlength=draws * ECE_BINS)
        errors.append(np.abs(sums.reshape(draws, ECE_BINS)).sum(axis=1) / n)
    value = expected_calibration_error(labels, probabilities)
    low, high = np.quantile(np.concatenate(errors), (0.025, 0.975))
    return Estimate(value, min(value, max(0.0, 2 * value - high)), max(value, 2 * value - low))


def per_class_table(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: Sequence[str]
) -> pd.DataFrame:
    """Precision, recall, f1 and support (images) of every class, by scikit-learn.

    Raises:
        ValueError: if the two are not equally long indices into `classes`.
    """
    y = check_labels("labels", labels, len(classes))
    predicted = check_labels("predictions", predictions, len(classes))
    if len(y) != len(predicted):
        raise ValueError(f"there are {len(y)} labels but {len(predicted)} predictions")
    # Numbers, not names, as keys: a class may be called "accuracy".
    report = classification_report(
        y, predicted, labels=range(len(classes)), output_dict=True, zero_division=0
    )
    rows = pd.DataFrame([report[str(i)] for i in range(len(classes))])
    rows.index = pd.Index(classes, name="class")
    return rows.rename(columns={"f1-score": "f1"}).astype({"support": int})


def most_confused_pairs(
    confusion: npt.ArrayLike, classes: Sequence[str], top: int = 5
) -> pd.DataFrame:
    """The `top` most frequent errors of a confusion matrix [C, C] (rows true, columns predicted).

    Columns true, predicted, count and share (of the true class's images), most frequent first.
    Raises ``ValueError`` if the matrix is not C x C.
    """
    cells = np.asarray(confusion)
    if cells.shape != (len(classes), len(classes)):
        raise ValueError(f"a {cells.shape} confusion matrix does not fit {len(classes)} classes")
    true, predicted = np.nonzero(cells * ~np.eye(len(classes), dtype=bool))
    table = pd.DataFrame(
        {
            "true": [classes[i] for i in true.tolist()],
            "predicted": [classes[i] for i in predicted.tolist()],
            "count": cells[true, predicted],
            "share": cells[true, predicted] / cells.sum(axis=1)[true],
        }
    )
    return table.sort_values("count", ascending=False, kind="stable", ignore_index=True).head(top)


def fit_probe(
    features: Mapping[str, npt.NDArray[np.float32]], labels: Mapping[str, Labels]
) -> tuple[Pipeline, float]:
    """Standardisation and logistic regression, with the C that is best on the validation split."""
    probes = {}
    for strength in np.logspace(-4, 0, 9):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        probes[strength] = probe.fit(features["train"], labels["train"])
    best = max(probes, key=lambda c: probes[c].score(features["val"], labels["val"]))
    return probes[best], float(best)


def gap_standard_error(train_accuracy: float, val_accuracy: float, n: int) -> float:
    """Standard error of the difference of two accuracies on `n` images each.

    With one success and one failure added to each side (Agresti and Caffo 2000), so that 100 % is
    not taken for exact.
    """
    shares = [(accuracy * n + 1) / (n + 2) for accuracy in (train_accuracy, val_accuracy)]
    return math.sqrt(sum(share * (1 - share) / (n + 2) for share in shares))


def gap_verdict(train_accuracy: float, val_accuracy: float, n_val: int, classes: int = 2) -> str:
    """What the train-validation gap means, and which settings to change.

    Args:
        train_accuracy: accuracy (0 to 1) on clean training images, as many as `n_val`.
        val_accuracy: accuracy on the validation images.
        n_val: number of validation images, of so many `classes`.

    Raises:
        ValueError: for an accuracy outside 0 to 1 or no images.
    """
    if not (0 <= train_accuracy <= 1 and 0 <= val_accuracy <= 1 and n_val > 0):
        raise ValueError(
            f"accuracies lie between 0 and 1 and n_val is positive, not {train_accuracy}, "
            f"{val_accuracy}, {n_val}"
        )
    noise = 2 * gap_standard_error(train_accuracy, val_accuracy, n_val)
    gap = train_accuracy - val_accuracy
    measured = (
        f"Train {train_accuracy:.1%}, validation {val_accuracy:.1%}: a gap of {100 * gap:+.1f} "
        f"points, give or take {100 * noise:.1f} (two standard errors, {n_val:,} images a side)."
    )
    if n_val < FEW_PER_CLASS * classes:
        return (
            f"{measured} Nothing can be concluded: with {n_val} validation images of {classes} "
            "classes, neither the gap nor the choice of the best epoch means much. Set aside more."
        )
    return f"{measured} {gap_advice(train_accuracy, gap, noise)}"


def gap_advice(train_accuracy: float, gap: float, noise: float) -> str:
    """What to change, judged from the gap and two standard errors of it."""
    real = abs(gap) > noise
    if real and gap > HEALTHY_GAP:
        degree = "Strong overfitting" if gap > LARGE_GAP else "Some overfitting"
        return (
            f"{degree}: the model knows its training images better than it knows the task. Raise "
            "MIX_PROB, DROPOUT or WEIGHT_DECAY, lower the first number of CROP_SCALE, lower "
            "LR_BACKBONE, or thaw later (THAW_EPOCHS). More images help most."
        )
    if train_accuracy < LOW_TRAIN_ACCURACY:
        return (
            "Underfitting: the gap is not the problem, the training accuracy itself is low. Raise "
            "EPOCHS or LR_BACKBONE, thaw earlier (THAW_EPOCHS), or lower DROPOUT and MIX_PROB."
        )
    if real and gap < -HEALTHY_GAP:
        return (
            "Validation is better than training: regularisation may be too strong (lower DROPOUT "
            "or MIX_PROB), or the validation images are the easier ones; look at the splits."
        )
    if not real:
        return (
            "Healthy as far as one can tell: a gap within the noise is no evidence of overfitting."
        )
    return "Healthy: the gap is real but too small to act on; keep the settings."
