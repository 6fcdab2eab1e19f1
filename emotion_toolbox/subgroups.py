"""Accuracy in groups of images: intervals, and whether the groups differ by more than chance."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from tqdm.auto import tqdm

from emotion_toolbox.attributes import Attribute
from emotion_toolbox.measures import Floats, Labels, confusion_metrics, percentile_interval

FEW = 20  # images; values with fewer are pooled
KEPT, BINS = 12, 5  # so many different numbers are kept; more become so many bins
MISSING = "(missing)"
PERMUTATIONS, RESAMPLES = 10_000, 1000
LEAST = 5  # images of each class, for a macro F1
AT_ONCE = 5_000_000  # numbers
Group = npt.NDArray[np.bool_]  # [N], whether an image is in it


def name_numbers(numbers: Floats) -> tuple[list[tuple[str, ...]], list[str]]:
    """The name of each number [N] (NaN has none), and all names in order.

    Where there are many, of a bin between quantiles.
    """
    known = np.isfinite(numbers)
    edges = np.unique(numbers[known])
    if len(edges) > KEPT:
        quantiles = np.quantile(numbers[known], np.linspace(0, 1, BINS + 1))
        decimals = 2 - math.floor(math.log10(edges[-1] - edges[0]))  # hundredths of the range
        edges = np.unique(np.round(quantiles, decimals))
        inner = [f"{low:.9g} to {high:.9g}" for low, high in zip(edges, edges[1:], strict=False)]
        names, bins = inner or [f"{edges[0]:.9g}"], np.digitize(numbers, edges[1:-1])
    else:
        names, bins = [f"{edge:g}" for edge in edges], np.searchsorted(edges, numbers)
    cells = [tuple(names[b : b + yes]) for b, yes in zip(bins, known, strict=True)]
    return cells, names


def group_images(attribute: Attribute, few: int = FEW) -> dict[str, Group]:
    """The images of each value: numbers in order, else by name; then the rest, then missing ones.

    An image with several values is in several groups. Values with fewer than `few` images are one
    group together.
    """
    cells, order = attribute.cells, sorted({value for cell in attribute.cells for value in cell})
    if attribute.numbers is not None:
        cells, order = name_numbers(attribute.numbers)
    counts = Counter(value for cell in cells for value in cell)
    groups = {
        value: np.array([value in cell for cell in cells])
        for value in order if counts[value] >= few
    }  # fmt: skip
    if rare := set(order) - groups.keys():
        name = f"other ({len(rare)} value{'s' * (len(rare) > 1)})"
        groups[name] = np.array([not rare.isdisjoint(cell) for cell in cells])
    if not all(cells):
        groups[MISSING] = np.array([not cell for cell in cells])
    return groups


def expected_hits(labels: Labels, hits: Group) -> Floats:
    """The share of right answers in each image's class, [N]."""
    right, images = np.bincount(labels, hits), np.bincount(labels)
    return np.asarray(right[labels] / images[labels])


def macro_f1(
    labels: Labels, predicted: Labels, classes: int, rng: np.random.Generator
) -> dict[str, float]:
    """Macro F1 with a 95 % bootstrap interval; NaN unless each class has LEAST images or more.

    With fewer, a class would be missing in many resamples.
    """
    names = ("macro_f1", "macro_f1_low", "macro_f1_high")
    if np.bincount(labels, minlength=classes).min() < LEAST:
        return dict.fromkeys(names, float("nan"))
    confusion = confusion_matrix(labels, predicted, labels=range(classes))
    drawn = rng.multinomial(len(labels), confusion.ravel() / len(labels), RESAMPLES)
    scores = [confusion_metrics(one.reshape(confusion.shape))["macro_f1"] for one in drawn]
    found = percentile_interval(confusion_metrics(confusion)["macro_f1"], scores)
    return dict(zip(names, (found.value, found.low, found.high), strict=True))


def accuracy_by_group(
    labels: Labels, predicted: Labels, groups: Mapping[str, Group], classes: int
) -> pd.DataFrame:
    """A row a group: value, images, accuracy with its 95 % interval (Wilson 1927), expected, F1.

    Expected is the accuracy that the group would have if nothing counted but the class of each
    image. `labels` and `predicted` are numbers of so many `classes` [N].
    """
    hits, rng = labels == predicted, np.random.default_rng(0)
    expected, rows = expected_hits(labels, hits), []
    for value, chosen in groups.items():
        right, images = int(hits[chosen].sum()), int(chosen.sum())
        low, high = binomtest(right, images).proportion_ci(method="wilson")
        row = {"value": value, "images": images, "accuracy": right / images, "low": low}
        row |= {"high": high, "expected": expected[chosen].mean()}
        rows.append(row | macro_f1(labels[chosen], predicted[chosen], classes, rng))
    return pd.DataFrame(rows)


def permuted(
    hits: Group, strata: Labels, times: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.bool_]]:
    """`times` permutations of `hits` within each stratum, some at a time: [n, N]."""
    order = np.argsort(strata, kind="stable")
    ends = np.cumsum(np.bincount(strata))[:-1]
    step = max(1, AT_ONCE // len(hits))
    for first in tqdm(range(0, times, step), "permuting", unit="chunk", leave=False):
        rows = np.tile(hits[order], (min(step, times - first), 1))
        parts = [rng.permuted(part, axis=1) for part in np.split(rows, ends, axis=1)]
        drawn = np.empty_like(rows)
        drawn[:, order] = np.concatenate(parts, axis=1)
        yield drawn


def permutation_test(
    hits: Group, columns: Sequence[Mapping[str, Group]], strata: Labels, times: int = PERMUTATIONS,
    seed: int = 0,
) -> list[float]:  # fmt: skip
    """For each column of groups, p of "the share of `hits` [N] is the same in all its groups".

    The statistic is the chi-squared of Pearson; its distribution is that under permutations of the
    hits within `strata` [N], so small groups and images in several do no harm (Good 2005,
    *Permutation, Parametric and Bootstrap Tests of Hypotheses*). NaN where there is nothing to
    tell apart.
    """
    members = np.stack([g for groups in columns for g in groups.values()], axis=1).astype(float)
    expected = expected_hits(strata, hits)
    variance = (expected * (1 - expected)) @ members
    weight = np.divide(1.0, variance, out=np.zeros_like(variance), where=variance > 0)
    starts = np.cumsum([0, *(len(groups) for groups in columns)])[:-1]

    def statistics(rows: npt.NDArray[np.bool_]) -> Floats:
        return np.asarray(np.add.reduceat(((rows - expected) @ members) ** 2 * weight, starts, 1))

    found, extreme = statistics(hits[None])[0], np.zeros(len(columns))
    for rows in permuted(hits, strata, times, np.random.default_rng(seed)):
        extreme += (statistics(rows) >= found * (1 - 1e-9)).sum(axis=0)
    testable = np.add.reduceat(variance > 0, starts) * [len(groups) > 1 for groups in columns] > 0
    return [float(p) for p in np.where(testable, (1 + extreme) / (1 + times), np.nan)]


def holm(p_values: Sequence[float]) -> list[float]:
    """`p_values` adjusted for their number (Holm 1979); NaN ones stay, and do not count."""
    p = np.asarray(p_values, dtype=float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    for rank, i in enumerate(order):
        least = p[order[rank - 1]] if rank else 0.0
        p[i] = min(1.0, max(least, p[i] * (len(order) - rank)))
    return [float(value) for value in p]
