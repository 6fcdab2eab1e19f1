"""How far a number can be trusted: the bootstrap, and a paired test."""

# %% [markdown]
# **The bootstrap** ([Efron 1979](https://doi.org/10.1214/aos/1176344552)). We cannot collect a
# thousand test sets, but we can imitate it: draw as many pictures as there are, *with replacement*,
# from the ones we have, measure, repeat, and read off the middle 95 %. For what depends on the
# confusion matrix alone there is a shortcut: which pictures were drawn does not matter, only how
# many fell into each cell, and these counts follow a multinomial distribution. (If *no* picture is
# wrong, no resample is either, and the interval has no width. That is no certainty: the true error
# may still be as high as 3 / N.)

# %%
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from emotion_toolbox.measures import (
    Estimate, calibration_estimates, check_probabilities, confusion_metrics, hits_by_name,
)  # fmt: skip


def percentile_interval(value: float, resampled: npt.ArrayLike) -> Estimate:
    """`value` between the 2.5th and the 97.5th percentile of `resampled`."""
    low, high = np.quantile(np.asarray(resampled), (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def evaluate_predictions(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, classes: Sequence[str], *,
    resamples: int = 2000, seed: int = 0,
) -> dict[str, Estimate]:  # fmt: skip
    """All metrics of true classes [N] and probabilities [N, C], with 95 % bootstrap intervals."""
    y, p = np.asarray(labels), check_probabilities(probabilities)
    rng, n = np.random.default_rng(seed), len(y)
    confusion = confusion_matrix(y, p.argmax(1), labels=range(len(classes)))
    shares, drawn = confusion.ravel() / n, []
    for _ in range(resamples):
        counts = rng.multinomial(n, shares).reshape(confusion.shape)
        drawn.append(confusion_metrics(counts))
    table, values = pd.DataFrame(drawn), confusion_metrics(confusion)
    result = {name: percentile_interval(values[name], table[name]) for name in values}
    for name, hits in hits_by_name(y, p, classes).items():  # top-2, polarity: where they mean much
        share = hits.mean()
        result[name] = percentile_interval(share, rng.binomial(n, share, resamples) / n)
    return result | calibration_estimates(y, p, resamples, rng)


# %% [markdown]
# **Is one model really better than another?** On the *same* pictures they must be compared picture
# by picture. Where both are right, or both wrong, a picture says nothing about which is better;
# only the *discordant* ones do. If the models were equally good, each of these would be a fair coin
# toss: that is McNemar's test ([McNemar 1947](https://doi.org/10.1007/BF02295996)), here in its
# exact form. A small p-value says that a difference this large would be rare between equals, not
# that it is large: for that, read the interval of the difference.


# %%
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
    only, n = (int(((a == y) & (b != y)).sum()), int(((a != y) & (b == y)).sum())), len(y)
    shares = np.array([*only, n - sum(only)]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    difference = percentile_interval((only[0] - only[1]) / n, (drawn[:, 0] - drawn[:, 1]) / n)
    p_value = binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
    return PairedTest(difference, *only, float(p_value))
