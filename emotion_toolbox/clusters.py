"""Intervals over images that come in groups: whole groups are drawn (the cluster bootstrap)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from emotion_toolbox.measures import Estimate, confusion_metrics, percentile_interval

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def resample_groups(values: Floats, groups: Labels, resamples: int, seed: int) -> Floats:
    """Sums [resamples, K] of `values` [N, K] over groups drawn with replacement.

    As many groups are drawn as there are, and each brings all its images (Davison and Hinkley 1997,
    section 3.8). Where every image is a group of its own it is the ordinary bootstrap.
    """
    sums = pd.DataFrame(values).groupby(groups).sum().to_numpy()
    rng, count = np.random.default_rng(seed), len(sums)
    drawn = np.empty((resamples, sums.shape[1]))
    for row in drawn:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count) @ sums
    return drawn


def clustered_metrics(
    labels: Labels, predicted: Labels, groups: Labels, classes: Sequence[str], *,
    resamples: int, seed: int,
) -> dict[str, Estimate]:  # fmt: skip
    """The metrics of ``confusion_metrics`` for N images, with 95 % intervals over `groups` [N]."""
    count = len(classes)
    cells = np.eye(count**2)[labels * count + predicted]
    drawn = resample_groups(cells, groups, resamples, seed)
    value, *others = (
        confusion_metrics(row.round().astype(np.int64).reshape(count, count))
        for row in (cells.sum(axis=0), *drawn)
    )
    table = pd.DataFrame(others)
    return {name: percentile_interval(value[name], table[name]) for name in value}


def clustered_mean(values: Floats, groups: Labels, *, resamples: int, seed: int) -> Estimate:
    """The mean of `values` [N] with a 95 % interval over `groups` [N]."""
    columns = np.stack([values, np.ones(len(values))], axis=1)
    total, count = resample_groups(columns, groups, resamples, seed).T
    return percentile_interval(float(values.mean()), total / count)
