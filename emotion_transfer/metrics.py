"""What a classifier's predictions are worth, with the uncertainty of every number."""

# %% [markdown]
# #### Every number with its interval
#
# A test accuracy is measured on a *finite* set of images; on another set of the same size it would
# have come out a little different. So every metric here is an `Estimate`: the value, and a range
# made such that in about 95 of 100 repetitions it holds the value an endless test set would give.
# Decimals beyond the width of that range mean nothing.

# %%
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import (
    classification_report,
    cohen_kappa_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from emotion_transfer.sample import MIKELS_CLASSES


# %%
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


# %% [markdown]
# Four of the eight emotions are pleasant and four are not. Mistaking amusement for excitement is a
# smaller error than mistaking it for disgust; *polarity accuracy* counts only the second kind.

# %%
POSITIVE_EMOTIONS = frozenset({"amusement", "awe", "contentment", "excitement"})
INTERVAL_ENDS = (0.025, 0.975)  # 95 % in between
ECE_BINS = 15  # as in Guo et al. 2017

# %% [markdown]
# Wrong input must not become a wrong number. Labels and probabilities are checked once, here, and
# the message names the first row that is off. Probabilities may come from a CSV with rounded
# decimals, so a row may miss 1 by a thousandth.


# %%
def _checked_labels(
    name: str, values: npt.ArrayLike, classes: int | None = None
) -> npt.NDArray[np.int64]:
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


# %% [markdown]
# The same for probabilities:


# %%
def _checked_probabilities(probabilities: npt.ArrayLike, rows: int) -> npt.NDArray[np.float64]:
    """`probabilities` as float64 [rows, C] whose rows sum to 1, or a ``ValueError``."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) != rows or p.shape[1] < 2:
        raise ValueError(
            f"probabilities must have one row for each of the {rows} labels and a column for each "
            f"of two or more classes; their shape is {p.shape}"
        )
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


# %% [markdown]
# Most metrics depend on the confusion matrix alone: how many images of each true class (row) got
# each answer (column). Writing them for a whole *stack* of matrices at once is what makes thousands
# of resamples cheap.
#
# * **accuracy**: the share on the diagonal;
# * **precision** of a class: of the images given this name, how many deserve it; **recall**: of the
#   images that deserve it, how many got it; **F1**: their harmonic mean;
# * **macro** averages treat every class alike, **weighted** ones every image;
# * **Cohen's kappa** (Cohen 1960): how far accuracy lies above what chance would give a classifier
#   that answers with the same frequencies; 0 is chance, 1 is perfect.


# %%
def confusion_metrics(confusion: npt.NDArray[np.integer]) -> dict[str, npt.NDArray[np.float64]]:
    """Metrics of confusion matrices [..., C, C] (rows true, columns predicted), each [...].

    A quotient without a denominator counts as 0, as with scikit-learn's ``zero_division=0``.
    """
    cells = confusion.astype(np.float64)
    hits = np.diagonal(cells, axis1=-2, axis2=-1)
    support, answers = cells.sum(axis=-1), cells.sum(axis=-2)
    total = support.sum(axis=-1)
    f1 = _quotient(2 * hits, support + answers)
    accuracy = hits.sum(axis=-1) / total
    chance = (support * answers).sum(axis=-1) / total**2
    return {
        "accuracy": accuracy,
        "macro_f1": f1.mean(axis=-1),
        "weighted_f1": (f1 * support).sum(axis=-1) / total,
        "macro_precision": _quotient(hits, answers).mean(axis=-1),
        "macro_recall": _quotient(hits, support).mean(axis=-1),
        "cohen_kappa": _quotient(accuracy - chance, 1 - chance),
    }


# %% [markdown]
# A class that nobody predicted has no precision; it counts as 0.


# %%
def _quotient(
    numerator: npt.NDArray[np.float64], denominator: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


# %% [markdown]
# The values that are reported come from scikit-learn, which more people have checked than this
# notebook; the formulas above serve the resamples, and a test holds the two together.


# %%
def _reported_values(
    labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], classes: int
) -> dict[str, float]:
    """The metrics of ``confusion_metrics``, by scikit-learn."""

    def averages(kind: str) -> tuple[float, float, float]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predictions, labels=range(classes), average=kind, zero_division=0
        )
        return float(precision), float(recall), float(f1)

    macro_precision, macro_recall, macro_f1 = averages("macro")
    # One class, and always answered: no better than chance, where scikit-learn would warn of 0/0.
    trivial = np.unique(np.concatenate([labels, predictions])).size == 1
    kappa = 0.0 if trivial else cohen_kappa_score(labels, predictions, labels=range(classes))
    return {
        "accuracy": float((labels == predictions).mean()),
        "macro_f1": macro_f1,
        "weighted_f1": averages("weighted")[2],
        "macro_precision": macro_precision,
        "macro_recall": macro_recall,
        "cohen_kappa": float(kappa),
    }


# %% [markdown]
# ##### The bootstrap
#
# We cannot collect a thousand test sets, but we can imitate it (Efron 1979): draw as many images as
# there are, *with replacement*, from the ones we have, compute the metric, repeat, and read off
# the middle 95 %. For a metric of the confusion matrix there is a shortcut: which images were drawn
# does not matter, only how many fell into each cell, and those counts follow a multinomial
# distribution. Two thousand resamples of 17,700 images then cost milliseconds.
#
# One limit to keep in mind: if *no* test image is wrong, no resample is either, and the interval
# has no width. That is not certainty: with N images and no error, the true error rate may still be
# as high as about 3 / N.


# %%
def _bootstrap_confusion(
    confusion: npt.NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float64]]:
    """``confusion_metrics`` of `resamples` bootstrap draws from a confusion matrix [C, C]."""
    share = confusion.ravel() / confusion.sum()
    chunk = max(1, 4_000_000 // share.size)  # bounds the memory where classes are many
    parts = []
    for start in range(0, resamples, chunk):
        draws = min(chunk, resamples - start)
        counts = rng.multinomial(int(confusion.sum()), share, size=draws)
        parts.append(confusion_metrics(counts.reshape(-1, *confusion.shape)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# %% [markdown]
# From the resamples, the interval is read off:


# %%
def _percentile_estimate(value: float, resampled: npt.NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(resampled, INTERVAL_ENDS)
    return Estimate(float(value), float(low), float(high))


# %% [markdown]
# A share of images, such as *the right class is among the two most probable*, is simpler still: the
# number of hits in a resample is binomial.


# %%
def _share_estimate(
    hits: npt.NDArray[np.bool_], resamples: int, rng: np.random.Generator
) -> Estimate:
    share = float(hits.mean())
    return _percentile_estimate(share, rng.binomial(hits.size, share, resamples) / hits.size)


# %% [markdown]
# Two such shares: the right class among the two most probable, and the right polarity.


# %%
def _top_two_hits(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Whether the label is among the two most probable; ties go to the lower index."""
    first_two = np.argsort(-probabilities, axis=1, kind="stable")[:, :2]
    return np.asarray((first_two == labels[:, None]).any(axis=1))


# %%
def _polarity_hits(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], classes: Sequence[str]
) -> npt.NDArray[np.bool_]:
    """Whether the four positive classes' summed probability is on the label's side of one half."""
    positive = np.array([name in POSITIVE_EMOTIONS for name in classes])
    return np.asarray((probabilities[:, positive].sum(axis=1) > 0.5) == positive[labels])


# %% [markdown]
# ##### Can its confidence be believed?
#
# A classifier is *calibrated* if, of all the answers it gives with 80 % confidence, 80 % are right.
# The reliability table sorts the answers into bins of confidence and compares the two. Their mean
# distance, weighted by how many answers each bin holds, is the **expected calibration error**
# (Guo et al. 2017, *On Calibration of Modern Neural Networks*).


# %%
def reliability_table(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = ECE_BINS
) -> pd.DataFrame:
    """Confidence against accuracy in `bins` equal bins (lower, upper] of confidence.

    Args:
        labels: true class indices [N].
        probabilities: rows that sum to 1 [N, C].

    Returns:
        One row a bin: lower, upper, confidence and accuracy (means; NaN where empty), count.

    Raises:
        ValueError: for input that is not as described.
    """
    y = _checked_labels("labels", labels)
    p = _checked_probabilities(probabilities, len(y))
    edges, bin_of, hits, confidence = _confidence_bins(y, p, bins)
    count = np.bincount(bin_of, minlength=bins)
    filled = np.where(count > 0, count, np.nan)
    return pd.DataFrame(
        {
            "lower": edges[:-1],
            "upper": edges[1:],
            "confidence": np.bincount(bin_of, weights=confidence, minlength=bins) / filled,
            "accuracy": np.bincount(bin_of, weights=hits, minlength=bins) / filled,
            "count": count,
        }
    )


# %% [markdown]
# The sorting into bins, shared by the table and the error:


# %%
def _confidence_bins(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], bins: int
) -> tuple[
    npt.NDArray[np.float64], npt.NDArray[np.intp], npt.NDArray[np.bool_], npt.NDArray[np.float64]
]:
    """Bin edges [bins + 1], then for every image its bin, whether it is right, its confidence."""
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least 1")
    _checked_labels("labels", labels, probabilities.shape[1])
    edges = np.linspace(0, 1, bins + 1)
    confidence = probabilities.max(axis=1)
    bin_of = np.digitize(confidence, edges[1:-1], right=True)
    return edges, bin_of, probabilities.argmax(axis=1) == labels, confidence


# %% [markdown]
# And the one number that sums the table up:


# %%
def expected_calibration_error(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = ECE_BINS
) -> float:
    """Mean |accuracy - confidence| over the bins, weighted by their counts (Guo et al. 2017).

    Raises:
        ValueError: as ``reliability_table``.
    """
    table = reliability_table(labels, probabilities, bins).query("count > 0")
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())


# %% [markdown]
# The calibration error of a *finite* set is biased upwards: even a perfectly calibrated model shows
# some, because the accuracy of each bin is noisy; resampling adds the same noise once more. The
# percentile interval would therefore lie too high, at times above the value itself. So this metric
# alone uses the *basic* bootstrap interval, which mirrors the resamples about the value and so
# takes that bias off. It is still approximate: near perfect calibration it is too narrow, so read a
# small error as "small", not as a precise figure.


# %%
def _ece_estimate(
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
    resamples: int,
    rng: np.random.Generator,
) -> Estimate:
    _, bin_of, hits, confidence = _confidence_bins(labels, probabilities, ECE_BINS)
    excess, n = hits - confidence, len(labels)
    errors = []
    chunk = max(1, 500_000 // n)  # resamples at a time; bounds the memory
    for start in range(0, resamples, chunk):
        draws = min(chunk, resamples - start)
        image = rng.integers(n, size=(draws, n))
        cell = bin_of[image] + ECE_BINS * np.arange(draws)[:, None]
        sums = np.bincount(cell.ravel(), excess[image].ravel(), minlength=draws * ECE_BINS)
        errors.append(np.abs(sums.reshape(draws, ECE_BINS)).sum(axis=1) / n)
    value = expected_calibration_error(labels, probabilities)
    low, high = np.quantile(np.concatenate(errors), INTERVAL_ENDS)
    return Estimate(value, min(value, max(0.0, 2 * value - high)), max(value, 2 * value - low))


# %% [markdown]
# ##### All of it at once
#
# One call measures a set of predictions. `macro_f1` is the number to watch: unlike accuracy it
# cannot be raised by ignoring a small class.


# %%
def evaluate_predictions(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    classes: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All metrics of a set of predictions, each with its 95 % bootstrap interval.

    Args:
        labels: true class indices [N].
        probabilities: rows that sum to 1 [N, C], columns in the order of `classes`.
        classes: the C class names. Where they are the eight of Mikels' model, the result also holds
            ``polarity_accuracy``.

    Raises:
        ValueError: for shapes that disagree, NaN, rows that do not sum to 1, labels out of range.
    """
    if len(set(classes)) != len(classes) or resamples < 1:
        raise ValueError(
            f"class names must be distinct and resamples positive, not {list(classes)}, {resamples}"
        )
    y = _checked_labels("labels", labels, len(classes))
    p = _checked_probabilities(probabilities, len(y))
    if p.shape[1] != len(classes):
        raise ValueError(f"probabilities have {p.shape[1]} columns for {len(classes)} classes")
    rng = np.random.default_rng(seed)
    predictions = p.argmax(axis=1)
    values = _reported_values(y, predictions, len(classes))
    confusion = confusion_matrix(y, predictions, labels=range(len(classes)))
    resampled = _bootstrap_confusion(confusion, resamples, rng)
    result = {name: _percentile_estimate(values[name], resampled[name]) for name in values}
    result["top2_accuracy"] = _share_estimate(_top_two_hits(y, p), resamples, rng)
    if set(classes) == set(MIKELS_CLASSES):
        hits = _polarity_hits(y, p, classes)
        result["polarity_accuracy"] = _share_estimate(hits, resamples, rng)
    result["ece"] = _ece_estimate(y, p, resamples, rng)
    return result


# %% [markdown]
# ##### Is one model really better than the other?
#
# Two models tested on the *same* images must be compared image by image. Where both are right, or
# both are wrong, an image says nothing about which is better; only the *discordant* ones do, where
# just one is right. If the models were equally good, each of these would be a fair coin toss: that
# is McNemar's test (McNemar 1947, *Psychometrika* 12, 153-157), here in its exact binomial form. A
# small p-value says that a difference this large would be rare between equals, not that it is
# large: for that, read the interval of the difference.


# %%
@dataclass(frozen=True)
class PairedTest:
    """The accuracy of one model minus that of another on the same images."""

    difference: Estimate
    ours_only: int  # images that only our model gets right
    other_only: int  # images that only the other one gets right
    p_value: float  # two-sided, exact McNemar

    def __str__(self) -> str:
        return (
            f"{self.difference:+.3f}, only ours right {self.ours_only}, "
            f"only the other {self.other_only}, p = {self.p_value:.2g}"
        )

    def to_json(self) -> dict[str, object]:
        """The fields as plain numbers and one nested dictionary, ready for ``json.dumps``."""
        return asdict(self)


# %% [markdown]
# The test and the interval of the difference, together:


# %%
def paired_test(
    labels: npt.ArrayLike,
    ours: npt.ArrayLike,
    other: npt.ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedTest:
    """Compare two models' predicted classes [N] for the same images with true classes `labels` [N].

    The interval of the difference is a paired bootstrap (each image drawn with both answers); the
    p-value is McNemar's (1947), exact, and 1 where no image is discordant.

    Raises:
        ValueError: if the three are not equally long class indices.
    """
    y, a, b = (
        _checked_labels(name, values)
        for name, values in (("labels", labels), ("ours", ours), ("other", other))
    )
    if not len(y) == len(a) == len(b):
        raise ValueError(f"labels, ours and other have {len(y)}, {len(a)} and {len(b)} entries")
    ours_only = int(((a == y) & (b != y)).sum())
    other_only = int(((a != y) & (b == y)).sum())
    discordant, n = ours_only + other_only, len(y)
    share = np.array([ours_only, other_only, n - discordant]) / n
    draws = np.random.default_rng(seed).multinomial(n, share, size=resamples)
    difference = _percentile_estimate((ours_only - other_only) / n, (draws[:, 0] - draws[:, 1]) / n)
    p_value = float(binomtest(ours_only, discordant).pvalue) if discordant else 1.0
    return PairedTest(difference, ours_only, other_only, p_value)


# %% [markdown]
# ##### Where it goes wrong
#
# Two tables for a closer look: precision, recall and F1 of every class, and the pairs of classes
# that are mixed up most. The second is often the more instructive one: it shows whether the model
# errs as a person would (awe for contentment) or for some reason of its own.


# %%
def per_class_table(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: Sequence[str]
) -> pd.DataFrame:
    """Precision, recall, f1 and support (images) of every class, by scikit-learn.

    Raises:
        ValueError: if the two are not equally long indices into `classes`.
    """
    y = _checked_labels("labels", labels, len(classes))
    predicted = _checked_labels("predictions", predictions, len(classes))
    if len(y) != len(predicted):
        raise ValueError(f"there are {len(y)} labels but {len(predicted)} predictions")
    # Numbers, not names, as keys: a class may be called "accuracy".
    report = classification_report(
        y, predicted, labels=range(len(classes)), output_dict=True, zero_division=0
    )
    rows = pd.DataFrame([report[str(i)] for i in range(len(classes))])
    rows.index = pd.Index(classes, name="class")
    return rows.rename(columns={"f1-score": "f1"}).astype({"support": int})


# %% [markdown]
# Which classes are taken for which?


# %%
def most_confused_pairs(
    confusion: npt.ArrayLike, classes: Sequence[str], top: int = 5
) -> pd.DataFrame:
    """The `top` most frequent errors of a confusion matrix [C, C] (rows true, columns predicted).

    Returns:
        Columns true, predicted, count and share (of the true class's images), most frequent first;
        fewer rows where fewer pairs were confused at all.

    Raises:
        ValueError: if the matrix is not C x C.
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
    ranked = table.sort_values("count", ascending=False, kind="stable", ignore_index=True)
    return ranked.head(top)


# %% [markdown]
# ##### Overfitting, underfitting, or neither?
#
# The difference between training and validation accuracy tells, if it is measured fairly: both on
# *clean* images, without augmentation and with dropout off. (The running training accuracy is taken
# on mixed and augmented images and is often *below* the validation accuracy.) And it has noise of
# its own: with 200 images on each side, 5 points are nothing. The standard error follows Agresti
# and Caffo (2000): one success and one failure are added to each side, so that an accuracy of 100 %
# is not taken for exact.

# %%
HEALTHY_GAP = 0.05  # a difference nobody need act on, even if it is real
LARGE_GAP = 0.15
LOW_TRAIN_ACCURACY = 0.6  # below this, the model has not even learnt what it was shown


# %% [markdown]
# How far could chance alone drive the two accuracies apart?


# %%
def gap_standard_error(train_accuracy: float, val_accuracy: float, n: int) -> float:
    """Standard error of the difference of two accuracies measured on `n` images each."""
    shares = [(accuracy * n + 1) / (n + 2) for accuracy in (train_accuracy, val_accuracy)]
    return float(np.sqrt(sum(share * (1 - share) / (n + 2) for share in shares)))


# %%
def gap_verdict(train_accuracy: float, val_accuracy: float, n_val: int) -> str:
    """What the train-validation gap means, and which settings to change.

    Args:
        train_accuracy: accuracy (0 to 1) on clean training images, as many as `n_val`.
        val_accuracy: accuracy on the validation images.
        n_val: number of validation images.

    Raises:
        ValueError: for an accuracy outside 0 to 1 or no images.
    """
    if not (0 <= train_accuracy <= 1 and 0 <= val_accuracy <= 1 and n_val > 0):
        raise ValueError(
            f"accuracies lie between 0 and 1 and n_val is positive, not {train_accuracy}, "
            f"{val_accuracy}, {n_val}"
        )
    gap = train_accuracy - val_accuracy
    noise = 2 * gap_standard_error(train_accuracy, val_accuracy, n_val)
    measured = (
        f"Train {train_accuracy:.1%}, validation {val_accuracy:.1%}: a gap of {100 * gap:+.1f} "
        f"points, give or take {100 * noise:.1f} (two standard errors, {n_val:,} images a side)."
    )
    return f"{measured} {_gap_advice(train_accuracy, gap, noise)}"


# %%
def _gap_advice(train_accuracy: float, gap: float, noise: float) -> str:
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
