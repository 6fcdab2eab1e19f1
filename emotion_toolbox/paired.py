"""Several runs over the same images: right or wrong of each image, and intervals over both."""

import numpy as np
import numpy.typing as npt

from emotion_toolbox.measures import Estimate, percentile_interval

Hits = npt.NDArray[np.float64]
RESAMPLES = 10_000


def pack_hits(hits: npt.ArrayLike) -> str:
    """Right or wrong for each of N images, as hexadecimal digits of eight images a byte."""
    return np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()


def unpack_hits(text: str, count: int) -> npt.NDArray[np.bool_]:
    """The `count` values that ``pack_hits`` packed."""
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


def resample_mean(values: Hits, seed: int = 0) -> Estimate:
    """Mean of `values` [seeds, images] with a 95 % interval over both.

    The bootstrap draws seeds and images with replacement, independently of each other ("pigeonhole
    bootstrap", Owen 2007, arXiv 0712.1111): images differ in difficulty for all seeds alike. A
    single seed says nothing of the spread over seeds, and then the images alone are drawn.
    """
    rng, (seeds, images) = np.random.default_rng(seed), values.shape
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    drawn = np.empty(RESAMPLES)
    for part in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * images // 10**7)):
        columns = rng.multinomial(images, np.full(images, 1 / images), len(part))
        drawn[part] = ((rows[part] @ values) * columns).sum(axis=1) / (seeds * images)
    return percentile_interval(float(values.mean()), drawn)
