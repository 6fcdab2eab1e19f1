"""How far a number can be trusted: the bootstrap."""

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

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import confusion_matrix

from emotion_toolbox.measures import (
    Estimate, calibration_estimates, check_probabilities, confusion_metrics, milder_estimates,
    percentile_interval,
)  # fmt: skip


def evaluate_predictions(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, classes: Sequence[str], *,
    resamples: int = 2000, seed: int = 0,
) -> dict[str, Estimate]:  # fmt: skip
    """All metrics of true classes [N] and probabilities [N, C], with 95 % bootstrap intervals."""
    y, p = np.asarray(labels), check_probabilities(probabilities)
    rng, n = np.random.default_rng(seed), len(y)
    confusion = confusion_matrix(y, p.argmax(1), labels=range(len(classes)))
    drawn = rng.multinomial(n, confusion.ravel() / n, resamples).reshape(-1, *confusion.shape)
    table, values = pd.DataFrame(map(confusion_metrics, drawn)), confusion_metrics(confusion)
    result = {name: percentile_interval(values[name], table[name]) for name in values}
    result |= milder_estimates(y, p, classes, resamples, rng)  # top-2, polarity
    return result | calibration_estimates(y, p, resamples, rng)
