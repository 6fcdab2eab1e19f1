"""Some images of a data set, or those of several, as one; nothing is decoded again."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.cache import ChosenPixels, PixelSource, Positions
from emotion_toolbox.tables import Split


class JoinedPixels:
    """The images of several sources, which hold so many each, one after the other."""

    def __init__(self, sources: Sequence[PixelSource], counts: Sequence[int]) -> None:
        self.sources, self.starts = sources, np.cumsum([0, *counts])

    def __getitem__(self, index: Positions, /) -> npt.NDArray[np.uint8]:
        which = np.searchsorted(self.starts, index, side="right") - 1
        order = np.argsort(which, kind="stable")
        parts = [self.sources[i][index[which == i] - self.starts[i]] for i in np.unique(which)]
        return np.asarray(np.concatenate(parts)[np.argsort(order)])


def join_datasets(datasets: Sequence[EmotionDataset]) -> EmotionDataset:
    """The images of all `datasets`, which have the same classes, in their order."""
    splits, first = [data.split for data in datasets], datasets[0]
    joined = Split(
        "+".join(split.name for split in splits),
        first.split.csv.parent,
        first.split.images_root,
        [file for split in splits for file in split.files],
        np.concatenate([split.labels for split in splits]),
        np.concatenate([split.rows for split in splits]),
    )
    pixels = JoinedPixels([data.pixels for data in datasets], [len(data) for data in datasets])
    return EmotionDataset(joined, first.classes, pixels, "-".join(d.digest for d in datasets))


def choose_images(dataset: EmotionDataset, positions: Positions) -> EmotionDataset:
    """The images at `positions` of `dataset`, in that order."""
    pixels = ChosenPixels(dataset.pixels, positions)
    return EmotionDataset(dataset.split.select(positions), dataset.classes, pixels, dataset.digest)
