"""From decoded images to batches: gathered by index, in an order without memory, fetched ahead."""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from emotion_toolbox.cache import (
    ChosenPixels, DecodedData, PixelSource, Positions, decode_data, refuse_bad_images,
    refuse_leaks, work_ahead,
)  # fmt: skip
from emotion_toolbox.draws import balanced_order, epoch_order
from emotion_toolbox.errors import DataError
from emotion_toolbox.files import count_threads, resolve_path
from emotion_toolbox.tables import EmotionData, Split


class Batch(NamedTuple):
    """`images` uint8 [B, 3, S, S], `labels` int64 [B], `positions` int64 [B] in the dataset."""

    images: Tensor
    labels: Tensor
    positions: Tensor


class EmotionDataset(Dataset[tuple[Tensor, Tensor]]):
    """One split as a PyTorch dataset of (image, label), which also hands out whole batches."""

    def __init__(
        self, split: Split, classes: Sequence[str], pixels: PixelSource, digest: str = ""
    ) -> None:
        self.split, self.classes, self.pixels = split, tuple(classes), pixels
        self.digest = digest  # of the content of its image files

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels, _ = self.batch([index])
        return images[0], labels[0]

    def batch(self, positions: Sequence[int] | Positions) -> Batch:
        """The images and labels at `positions`, from one indexing operation."""
        rows = np.asarray(positions, dtype=np.int64)
        # [B, S, S, 3] seen as [B, 3, S, S] is channels_last: no copy here, none on the device
        images = torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(self.split.labels[rows]), torch.from_numpy(rows))

    def pictures(self, positions: Sequence[int] | Positions) -> npt.NDArray[np.uint8]:
        """The images at `positions` for people to look at, uint8 [N, S, S, 3]."""
        return self.pixels[np.asarray(positions, dtype=np.int64)]

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with the images, their names or their labels."""
        return self.split.fingerprint(self.digest)


def open_datasets(
    listed: EmotionData, side: int, fit: str = "crop", *, cache_dir: str | None,
    threads: int | None = None, max_bad_fraction: float = 0.0, allow_duplicates: bool = False,
    most: int | None = None,
) -> tuple[DecodedData, dict[str, EmotionDataset]]:  # fmt: skip
    """Decode every image once to `side` pixels, refuse too many bad ones, and make the datasets."""
    folder = resolve_path(cache_dir) if cache_dir else None
    decoded = decode_data(listed, side, fit, cache_dir=folder, threads=count_threads(threads))
    refuse_bad_images(decoded, max_bad_fraction)
    refuse_leaks(decoded, allow_duplicates)
    return decoded, make_datasets(decoded, most)


def make_datasets(decoded: DecodedData, most: int | None = None) -> dict[str, EmotionDataset]:
    """Datasets of the usable images of `decoded`, at most `most` each, from all over the split."""
    datasets = {}
    for name, split in decoded.data.splits.items():
        pixels, count = decoded.pixels[name], len(split)
        if most is not None and most < count:
            chosen = np.linspace(0, count - 1, most).round().astype(np.int64)
            split, pixels = split.select(chosen), ChosenPixels(pixels, chosen)
        classes, digest = decoded.data.classes, decoded.digests[name]
        datasets[name] = EmotionDataset(split, classes, pixels, digest)
    return datasets


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in so many training `images`; ``DataError`` where there is not even one."""
    steps = images // batch_size
    if steps == 0:
        raise DataError(
            f"{images} training images do not fill one batch; set BATCH_SIZE to {max(2, images)} "
            "or less"
        )
    return steps


def training_order(
    labels: npt.NDArray[np.int64], batch_size: int, *, seed: int, epoch: int, balanced: bool = False
) -> Positions:
    """The images of one epoch in order, int64 [steps * batch_size]; `balanced` by class.

    A last incomplete batch is dropped, for BatchNorm cannot work on a single image. Raises
    ``DataError`` where there is no whole batch.
    """
    count = len(labels)
    whole = steps_per_epoch(count, batch_size) * batch_size
    if balanced:
        return balanced_order(seed, epoch, labels, count)[:whole]
    return epoch_order(seed, epoch, count)[:whole]


def batch_slices(order: Positions, batch_size: int, first_step: int = 0) -> list[Positions]:
    """`order` cut into arrays of `batch_size` (the last may be shorter), from `first_step` on."""
    starts = range(first_step * batch_size, len(order), batch_size)
    return [order[start : start + batch_size] for start in starts]


def fetch_ahead(
    dataset: EmotionDataset, slices: Sequence[Positions], device: torch.device, depth: int = 2
) -> Generator[Batch, None, None]:
    """The batches of `slices` on `device`, each prepared by a thread while `depth` are waiting.

    An exception is raised where its batch was due. The thread starts with the first batch that is
    asked for, and ends with the generator.
    """

    def fetch(positions: Positions) -> Batch:
        images, labels, rows = dataset.batch(positions)
        if device.type == "cuda":  # from pinned memory a copy need not wait for the device
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
        return Batch(images, labels, rows)

    return work_ahead(fetch, slices, threads=1, depth=depth, name="fetch-ahead")
