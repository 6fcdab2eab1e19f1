"""From stored images to batches: gathered by index, fetched ahead of the device."""

import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emotion_transfer.cache import CheckedData, ImageStore, worker_count
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.data import DataError, ImageError, Split, decode_image, read_image_bytes
from emotion_transfer.seeding import balanced_order, epoch_order

# %% [markdown]
# #### A dataset that hands out whole batches
#
# PyTorch's `DataLoader` usually asks a dataset for one image at a time, in worker processes, and
# copies each through a pipe. When the pixels are already decoded that traffic is the slowest part.
# `EmotionDataset` therefore also answers `__getitems__`: one indexing operation on the memory map
# yields the batch, in the main process. There are no workers to start, to seed or to pickle.


# %%
class Batch(NamedTuple):
    """`images` uint8 [B, 3, S, S], `labels` int64 [B], `positions` int64 [B] in the dataset."""

    images: Tensor
    labels: Tensor
    positions: Tensor


class PixelSource(Protocol):
    """Anything that turns positions into decoded images, uint8 [B, S, S, 3]."""

    def gather(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]: ...


# %% [markdown]
# There are two sources. The memory map of the cache is the fast one. Without a cache, images are
# decoded when they are needed, by a pool of threads.


# %%
class MappedPixels:
    """Images from the cache of one split; `kept` are the positions of the usable ones."""

    def __init__(self, store: ImageStore, kept: npt.NDArray[np.int64]) -> None:
        self.array, self.kept = store.pixels(), kept

    def gather(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self.array[self.kept[index]]


class DecodedPixels:
    """Images decoded on the fly, in `threads` threads."""

    def __init__(self, split: Split, side: int, threads: int) -> None:
        self.split, self.side = split, side
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def gather(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return np.stack(list(self.pool.map(self._decode, index.tolist())))

    def _decode(self, position: int) -> npt.NDArray[np.uint8]:
        try:
            return decode_image(read_image_bytes(self.split.path(position)), self.side)
        except ImageError as error:
            raise DataError(f"{self.split.where(position)} has become unusable: {error}") from error


# %% [markdown]
# The dataset itself then is short: it turns positions into a batch.


# %%
class EmotionDataset(Dataset[Batch]):
    """One split as a PyTorch dataset; indexing with a list gives the whole batch at once.

    `digest` stands for the content of its image files.
    """

    def __init__(
        self, split: Split, classes: Sequence[str], pixels: PixelSource, digest: str = ""
    ) -> None:
        self.split, self.classes, self.pixels = split, tuple(classes), pixels
        self.digest = digest

    def __len__(self) -> int:
        return len(self.split)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with the images, their names or their labels."""
        return self.split.fingerprint(self.digest)

    def __getitems__(self, index: Sequence[int]) -> Batch:
        rows = np.asarray(index, dtype=np.int64)
        # [B, S, S, 3] seen as [B, 3, S, S] is channels_last: no copy here, none on the device
        images = torch.from_numpy(self.pixels.gather(rows)).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(self.split.labels[rows]), torch.from_numpy(rows))

    def __getitem__(self, index: int) -> Batch:
        images, labels, rows = self.__getitems__([index])
        return Batch(images[0], labels[0], rows[0])


def make_datasets(cfg: EnhancedConfig, checked: CheckedData) -> dict[str, EmotionDataset]:
    """The train, val and test datasets over the usable images of `checked`."""
    datasets = {}
    for name, split in checked.data.splits.items():
        store = checked.stores[name]
        pixels: PixelSource
        if cfg.CACHE:
            pixels = MappedPixels(store, checked.kept[name])
        else:
            pixels = DecodedPixels(split, store.side, worker_count(cfg))
        datasets[name] = EmotionDataset(split, checked.data.classes, pixels, checked.digests[name])
    return datasets


# %% [markdown]
# #### Order without memory
#
# Which images make up step 117 of epoch 9 is a function of the seed, the epoch and the step, not of
# what happened before. That is what lets a run that was killed go on in the middle of an epoch as
# if nothing had been. A last incomplete batch is dropped in training: the head's BatchNorm cannot
# work on a single image.


# %%
def training_order(
    cfg: EnhancedConfig, labels: npt.NDArray[np.int64], epoch: int
) -> npt.NDArray[np.int64]:
    """The images of one training epoch in order, cut to whole batches."""
    n = len(labels)
    if cfg.BALANCE == "sampler":
        order = balanced_order(cfg.SEED, epoch, labels, n)
    else:
        order = epoch_order(cfg.SEED, epoch, n)
    return order[: steps_per_epoch(cfg, n) * cfg.BATCH_SIZE]


def steps_per_epoch(cfg: EnhancedConfig, n: int) -> int:
    """Whole batches in `n` training images; two at most with ``DEBUG``.

    Raises:
        DataError: where there is not even one.
    """
    steps = n // cfg.BATCH_SIZE
    if steps == 0:
        raise DataError(
            f"{n} training images do not fill one batch; set BATCH_SIZE to {max(2, n)} or less"
        )
    return min(steps, 2) if cfg.DEBUG else steps


# %% [markdown]
# From an order to batches is simple arithmetic; a run that resumes at step 117 slices from there.


# %%
def batch_slices(
    order: npt.NDArray[np.int64], batch_size: int, first_step: int = 0
) -> list[list[int]]:
    """`order` cut into lists of `batch_size` (the last may be shorter), from `first_step` on."""
    starts = range(first_step * batch_size, len(order), batch_size)
    return [order[start : start + batch_size].tolist() for start in starts]


def make_loader(
    dataset: EmotionDataset, batches: list[list[int]], *, pin: bool
) -> DataLoader[Batch]:
    """A `DataLoader` over the given lists of indices; `pin` makes copies to a GPU asynchronous."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=keep_batch,
        pin_memory=pin,
        generator=torch.Generator(),  # else it draws a seed from the global one, in a thread
    )


def keep_batch(batch: Any) -> Any:
    """The collate function of a dataset that already returns whole batches."""
    return batch


# %% [markdown]
# While the device works on one batch, a thread gathers and copies the next two. A slow disk or a
# slow decoder thus costs time only where it is slower than the training step itself.


# %%
def fetch_ahead(
    loader: Iterable[Batch], device: torch.device, depth: int = 2
) -> Generator[Batch, None, None]:
    """Yield the batches of `loader` on `device`, prepared by a thread `depth` batches ahead.

    An exception of the loader is raised here, where its batch was due.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in loader:
                images, labels = (t.to(device, non_blocking=True) for t in batch[:2])
                put(Batch(images, labels, batch.positions))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="fetch-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
