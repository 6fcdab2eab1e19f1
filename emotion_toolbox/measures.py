"""What predictions are worth (confusion, calibration, the gap), and what a range test tells."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import f1_score, precision_recall_fscore_support
from tqdm.auto import tqdm

from emotion_toolbox.errors import DivergedError
from emotion_toolbox.tables import MIKELS_CLASSES, POSITIVE_EMOTIONS

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Step = Callable[[int, float], float]  # number and rate of a training step: the loss before it
ECE_BINS = 15  # as in Guo et al. 2017
BIN_EDGES = np.linspace(0, 1, ECE_BINS + 1)
TEMPERATURES = (0.1, 10.0)  # by which logits may be divided
HEALTHY_GAP = 0.05  # a difference nobody need act on, even if it is real
LOW_TRAIN_ACCURACY = 0.6  # below this, the model has not even learnt what it was shown
FEW_STEPS = 10  # of a range test; with fewer, nothing is suggested
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


def percentile_interval(value: float, resampled: npt.ArrayLike) -> Estimate:
    """`value` between the 2.5th and the 97.5th percentile of `resampled`."""
    low, high = np.quantile(np.asarray(resampled), (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def check_probabilities(probabilities: npt.ArrayLike) -> Floats:
    """`probabilities` as float64 [N, C], or a ``ValueError`` that names the first wrong row.

    A row may miss the sum of 1 by a thousandth, for it may come from a CSV with rounded decimals.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    shares = (p >= 0).all(axis=1) & (np.abs(p.sum(axis=1) - 1) <= 1e-3)  # False for NaN
    if not shares.all():
        row = int(shares.argmin())
        raise ValueError(
            f"probabilities[{row}] must be 0 or more each and sum to 1 (apply softmax to logits "
            f"first), not {p[row].round(4).tolist()}"
        )
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
        """Mean F1 over all classes; one that does not occur counts as 0."""
        truth, answers, every = self.labels, self.predicted, range(self.probabilities.shape[1])
        return float(f1_score(truth, answers, labels=every, average="macro", zero_division=0))

    def score(self, name: str) -> float:
        """macro_f1, accuracy or loss, turned so that larger is better; -inf if anything is NaN."""
        value = -self.loss if name == "loss" else float(getattr(self, name))
        finite = math.isfinite(value) and np.isfinite(self.probabilities).all()
        return value if finite else -math.inf


def milder_estimates(
    labels: Labels, probabilities: Floats, classes: Sequence[str], resamples: int,
    rng: np.random.Generator,
) -> dict[str, Estimate]:  # fmt: skip
    """Accuracies by a milder measure, with bootstrap intervals, where it means much for `classes`.

    top2_accuracy (three classes or more): the label is among the two most probable, ties going to
    the lower index. polarity_accuracy (Mikels' eight): the summed probability of the pleasant four
    is on the label's side of one half.
    """
    found = {}
    if len(classes) > 2:
        first_two = np.argsort(-probabilities, axis=1, kind="stable")[:, :2]
        found["top2_accuracy"] = np.asarray((first_two == labels[:, None]).any(axis=1))
    if set(classes) == set(MIKELS_CLASSES):
        positive = np.array([name in POSITIVE_EMOTIONS for name in classes])
        says = probabilities[:, positive].sum(axis=1) > 0.5
        found["polarity_accuracy"] = np.asarray(says == positive[labels])
    shares, n = {name: hits.mean() for name, hits in found.items()}, len(labels)
    drawn = {name: rng.binomial(n, share, resamples) / n for name, share in shares.items()}
    return {name: percentile_interval(shares[name], drawn[name]) for name in found}


def log_losses(labels: Labels, probabilities: Floats) -> Floats:
    """The negative log-likelihood of each label [N]; 0 counts as 2.2e-16, as in scikit-learn."""
    of_label = probabilities[np.arange(len(labels)), labels]
    return np.asarray(-np.log(np.clip(of_label, np.finfo(np.float64).eps, 1)))


def apply_temperature(probabilities: Floats, temperature: float) -> Floats:
    """softmax(logits / temperature) of `probabilities` [N, C], whose logs serve as the logits.

    They differ from these by a constant a row, which softmax ignores.
    """
    logits = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    return np.asarray(softmax(logits / temperature, axis=1))


def fit_temperature(labels: Labels, probabilities: Floats) -> float:
    """The temperature (Guo et al. 2017) that gives `labels` the least negative log-likelihood.

    Of the validation split's `labels` [N] and `probabilities` [N, C]. It stays in `TEMPERATURES`,
    for it would go to 0 where every answer is right; and it is 1 where no other is better.
    """

    def loss(temperature: float) -> float:
        return float(log_losses(labels, apply_temperature(probabilities, temperature)).mean())

    found = minimize_scalar(lambda log_t: loss(math.exp(log_t)), bounds=np.log(TEMPERATURES))
    return min((1.0, *TEMPERATURES, math.exp(found.x)), key=lambda t: round(loss(t), 12))


def calibrate(predictions: Predictions, temperature: float) -> Predictions:
    """The same `predictions` with another `temperature`; the order of the classes stays."""
    p = apply_temperature(predictions.probabilities, temperature)
    return Predictions(predictions.labels, p, float(log_losses(predictions.labels, p).mean()))


def reliability_table(labels: Labels, probabilities: Floats) -> pd.DataFrame:
    """Confidence against accuracy in equal bins (lower, upper] of confidence.

    Of `labels` [N] and `probabilities` [N, C]. One row a bin: confidence and accuracy (means; NaN
    where empty), count, lower, upper.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_of = np.digitize(confidence, BIN_EDGES[1:-1], right=True)
    images = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float)})
    table = images.groupby(bin_of).mean().reindex(range(ECE_BINS))
    table["count"] = np.bincount(bin_of, minlength=ECE_BINS)
    return table.assign(lower=BIN_EDGES[:-1], upper=BIN_EDGES[1:])


def calibration_estimates(
    labels: Labels, probabilities: Floats, resamples: int, rng: np.random.Generator
) -> dict[str, Estimate]:
    """How far to trust the probabilities: "ece" and "nll", with bootstrap intervals.

    The expected calibration error (Guo et al. 2017) is the mean |accuracy - confidence| over the
    bins, weighted by their counts. Noise in the bins' accuracies biases it upwards, and resampling
    adds the same once more. Its *basic* interval mirrors the resamples about the value, and so
    takes that bias off. The negative log-likelihood is a plain mean, with a percentile interval.
    """
    confidence, n = probabilities.max(axis=1), len(labels)
    bin_of = np.digitize(confidence, BIN_EDGES[1:-1], right=True)
    excess = (probabilities.argmax(axis=1) == labels) - confidence
    losses = log_losses(labels, probabilities)

    def measure(images: npt.NDArray[np.intp]) -> tuple[float, float]:
        sums = np.bincount(bin_of[images], weights=excess[images], minlength=ECE_BINS)
        return float(np.abs(sums).sum() / n), float(losses[images].mean())

    ece, nll = measure(np.arange(n))
    resampled = [measure(rng.integers(n, size=n)) for _ in range(resamples)]
    (low, nll_low), (high, nll_high) = np.quantile(resampled, (0.025, 0.975), axis=0).tolist()
    basic = min(ece, max(0.0, 2 * ece - high)), max(ece, 2 * ece - low)
    return {"ece": Estimate(ece, *basic), "nll": Estimate(nll, nll_low, nll_high)}


def per_class_table(labels: Labels, predictions: Labels, classes: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, f1 and support (images) of every class, from class indices [N]."""
    every = range(len(classes))
    scores = precision_recall_fscore_support(labels, predictions, labels=every, zero_division=0)
    columns = dict(zip(("precision", "recall", "f1", "support"), scores, strict=True))
    return pd.DataFrame(columns, index=pd.Index(classes, name="class"))


def most_confused_pairs(
    confusion: npt.NDArray[np.integer], classes: Sequence[str], top: int = 5
) -> pd.DataFrame:
    """The `top` most frequent errors of a confusion matrix [C, C] (rows true, columns predicted).

    Columns true, predicted, count and share (of the true class's images), most frequent first.
    """
    true, predicted = np.nonzero(confusion * ~np.eye(len(classes), dtype=bool))
    names, count = np.asarray(classes), confusion[true, predicted]
    share = count / confusion.sum(axis=1)[true]
    table = pd.DataFrame({"true": names[true], "predicted": names[predicted], "count": count})
    return table.assign(share=share).nlargest(top, "count").reset_index(drop=True)


def gap_standard_error(train_accuracy: float, val_accuracy: float, n: int) -> float:
    """Standard error of the difference of two accuracies on `n` images each.

    With one success and one failure added to each side (Agresti and Caffo 2000), so that 100 % is
    not taken for exact.
    """
    shares = [(accuracy * n + 1) / (n + 2) for accuracy in (train_accuracy, val_accuracy)]
    return math.sqrt(sum(share * (1 - share) / (n + 2) for share in shares))


def gap_verdict(train_accuracy: float, val_accuracy: float, n_val: int, classes: int) -> str:
    """What the train-validation gap means, and which settings to change.

    The accuracies (0 to 1) are on `n_val` clean training images and on as many validation images,
    of so many `classes`.
    """
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
        return (
            "Overfitting: the model knows its training images better than it knows the task. Raise "
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
        return "Healthy as far as one can tell: a gap within the noise is no evidence against it."
    return "Healthy: the gap is real but too small to act on; keep the settings."


def start_verdict(start: float, best: float, n_val: int) -> str:
    """Whether accuracy on `n_val` validation images has moved from its `start` beyond chance."""
    noise = 2 * gap_standard_error(start, best, n_val)  # more than it is, for images are the same
    real = "That is more" if abs(best - start) > noise else "So these images cannot tell them apart"
    return (
        f"Validation accuracy {start:.1%} at the start, {best:.1%} at its best; with {n_val:,} "
        f"images up to {100 * noise:.1f} points may be chance. {real}."
    )


@dataclass(frozen=True)
class PairedTest:
    """The accuracy of one model minus that of another on the same images."""

    difference: Estimate
    ours_only: int  # images that only our model gets right
    other_only: int
    p_value: float  # two-sided, exact McNemar


def paired_test(
    labels: npt.ArrayLike, ours: npt.ArrayLike, other: npt.ArrayLike, *, resamples: int = 2000,
    seed: int = 0,
) -> PairedTest:  # fmt: skip
    """Compare two models' predicted classes [N] for the same images; a paired bootstrap."""
    y, a, b = (np.asarray(values) for values in (labels, ours, other))
    if not len(y) == len(a) == len(b):
        raise ValueError(f"labels, ours and other have {len(y)}, {len(a)} and {len(b)} entries")
    only, n = (int(((a == y) & (b != y)).sum()), int(((a != y) & (b == y)).sum())), len(y)
    shares = np.array([*only, n - sum(only)]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    difference = percentile_interval((only[0] - only[1]) / n, (drawn[:, 0] - drawn[:, 1]) / n)
    p_value = binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
    return PairedTest(difference, *only, float(p_value))


class RangeTest(NamedTuple):
    """What ``range_test`` measured, the rate as it is set, and the one that is suggested."""

    table: pd.DataFrame
    given: float
    suggested: float | None


def range_test(step: Step, still: Step, low: float, high: float, steps: int) -> pd.DataFrame:
    """A row a step of a learning-rate range test (Smith 2017, arXiv 1506.01186).

    The rate rises exponentially from `low` to `high`; `still` is the same training on the same
    images at rate 0. Columns: rate, loss, still, and change, their difference smoothed
    exponentially with bias correction. Ends before a loss that is not finite, and where the
    smoothed one is twice that of `still`; ``DivergedError`` if the first loss is not finite.
    """
    rows: list[tuple[float, float, float]] = []
    for number in tqdm(range(steps), "range test", leave=False):
        rate = low * (high / low) ** (number / (steps - 1))
        row = rate, step(number, rate), still(number, 0.0)
        if not np.isfinite(row).all():
            break
        rows.append(row)
        table = pd.DataFrame(rows, columns=["rate", "loss", "still"])
        smooth = table.ewm(alpha=0.2).mean()
        if smooth["loss"].iloc[-1] > 2 * smooth["still"].iloc[-1]:
            break
    if not rows:
        raise DivergedError("the first loss is not finite: look for NaN in WEIGHTS or INIT_FROM")
    return table.assign(change=smooth["loss"] - smooth["still"])


def suggest_rate(table: pd.DataFrame) -> float | None:
    """The rate of a ``range_test`` that brings half of what the best one brings.

    There a smooth curve falls most steeply; a slope is read off noise less surely. None after too
    few steps, or where the loss never falls by 1 % and by more than a step there scatters.
    """
    if len(table) < FEW_STEPS:
        return None
    change = table["change"].to_numpy()
    best = int(change.argmin())
    scatter = (table["loss"] - table["still"] - change)[max(0, best - 5) : best + 6].std()
    if -change[best] <= max(0.01 * table["still"].mean(), scatter):
        return None
    return float(table["rate"].iloc[(change <= change[best] / 2).argmax()])


def describe_rate(name: str, test: RangeTest) -> str:
    """What the range test of a setting found, in one line."""
    found = "no suggestion, for the loss falls too little in so few steps; stay below its rise"
    if test.suggested is not None:
        found = f"{test.suggested:.2g} suggested"
    return f"{name}: {test.given:.2g} is set, {found}"
