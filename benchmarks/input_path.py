"""Part "input": images a second and core from file or cache to normalised tensor."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.measure import Row, cores, interleave, make_row, rate_for, synchronise, threads
from benchmarks.peers import PillowDataset, preset_transform, timm_loader, usual_transform
from benchmarks.pictures import cached_dataset, make_files, make_split, repeated_dataset
from benchmarks.plan import SOURCES, Plan
from benchmarks.settings import bench_config
from emotion_toolbox.backbones import IMAGENET_MEAN, IMAGENET_STD
from emotion_toolbox.batches import EmotionDataset, batch_slices, fetch_ahead
from emotion_toolbox.cache import DecodedPixels, Positions
from emotion_toolbox.draws import draw_uniforms, epoch_order
from emotion_toolbox.pixels import ColourJitter, jitter_colours
from emotion_toolbox.tables import Split
from emotion_transfer.augment import AUGMENT_DRAWS, apply_augmentation, draw_augmentation
from emotion_transfer.config import EnhancedConfig, cache_size

BATCH = 32
Work = Callable[[], int]


def endless_batches(cfg: EnhancedConfig, length: int) -> Iterator[Positions]:
    """Shuffled arrays of ``BATCH`` positions (fewer where there are fewer), epoch after epoch."""
    for epoch in count():
        order = epoch_order(cfg.SEED, epoch, length)
        yield from (b for b in batch_slices(order, BATCH) if len(b) == min(BATCH, length))


def augment(cfg: EnhancedConfig, images: Tensor, step: int, jitter: ColourJitter) -> Tensor:
    """Draw and apply the augmentation of one batch, as the training step does."""
    draws = draw_uniforms(cfg.SEED, 0, step * BATCH, len(images), AUGMENT_DRAWS)
    plan = draw_augmentation(cfg, draws)
    return apply_augmentation(images, plan, cfg.IMG_SIZE, IMAGENET_MEAN, IMAGENET_STD, jitter)


def our_work(cfg: EnhancedConfig, dataset: EmotionDataset, jitter: ColourJitter | None) -> Work:
    """A batch of ours on the CPU; without `jitter`, its gathering alone."""
    batches, steps = endless_batches(cfg, len(dataset)), count()

    def work() -> int:
        batch = dataset.batch(next(batches))
        if jitter is not None:
            augment(cfg, batch.images, next(steps), jitter)
        return len(batch.labels)

    return work


def pillow_work(dataset: PillowDataset, cfg: EnhancedConfig) -> Work:
    """A batch of a dataset that gives one image at a time, stacked."""
    batches = endless_batches(cfg, len(dataset))

    def work() -> int:
        images = torch.stack([dataset[i][0] for i in next(batches).tolist()])
        return len(images)

    return work


def timm_work(root: Path, size: int, files: int, *, recipe: bool) -> Work:
    """A batch of timm's loader."""

    def forever() -> Iterator[Any]:
        loader = timm_loader(root, size, min(BATCH, files), recipe=recipe)
        while True:
            yield from loader

    batches = forever()
    return lambda: len(next(batches)[0])


def device_work(
    cfg: EnhancedConfig, dataset: EmotionDataset, device: torch.device, jitter: ColourJitter
) -> Work:
    """An epoch of ours, fetched ahead by way of pinned memory and augmented on the device."""

    def work() -> int:
        batches = batch_slices(epoch_order(cfg.SEED, 0, len(dataset)), cfg.BATCH_SIZE)
        done = 0
        for step, batch in enumerate(fetch_ahead(dataset, batches, device)):
            done += len(augment(cfg, batch.images, step, jitter))
        synchronise(device)
        return done

    return work


def make_paths(
    cfg: EnhancedConfig, split: Split, dataset: EmotionDataset, jitter: ColourJitter
) -> dict[str, Work]:
    """Every path over the same files, named."""
    size, root = cfg.IMG_SIZE, split.images_root
    fresh = EmotionDataset(split, dataset.classes, DecodedPixels(split, cache_size(cfg), 1))
    usual = PillowDataset(split, usual_transform(cfg))
    preset = PillowDataset(split, preset_transform(size, recipe=False))
    recipe = PillowDataset(split, preset_transform(size, recipe=True))
    return {
        "usual notebook": pillow_work(usual, cfg),
        "torchvision preset": pillow_work(preset, cfg),
        "torchvision recipe": pillow_work(recipe, cfg),
        "timm loader": timm_work(root, size, len(split), recipe=False),
        "timm loader, RandAugment": timm_work(root, size, len(split), recipe=True),
        "ours, gather alone": our_work(cfg, dataset, None),
        "ours": our_work(cfg, dataset, jitter_colours),
        "ours, jitter compiled": our_work(cfg, dataset, jitter),
        "ours, CACHE=False": our_work(cfg, fresh, jitter_colours),
    }


def device_paths(
    cfg: EnhancedConfig, dataset: EmotionDataset, device: torch.device, jitter: ColourJitter
) -> dict[str, Work]:
    """Ours with the augmentation on the device, named."""
    return {
        "ours, on the device": device_work(cfg, dataset, device, jitter_colours),
        "ours, on the device, jitter compiled": device_work(cfg, dataset, device, jitter),
    }


def run(plan: Plan, device: torch.device, work: Path) -> dict[str, Any]:
    """Measure every path on one core for both kinds of sources, then the device's, where it is."""
    cfg = bench_config(plan, device, IMG_SIZE=plan.input_size)
    rows: list[Row] = []
    bytes_each: dict[str, int] = {}
    for source, size in tqdm(SOURCES.items(), desc="input", leave=False):
        split = make_split(make_files(work / source, size, plan.files))
        bytes_each[source] = sum(split.path(i).stat().st_size for i in range(len(split)))
        bytes_each[source] //= len(split)
        small = cached_dataset(split, work / f"cache-{source}", cache_size(cfg), cores())
        dataset = repeated_dataset(small, work / f"map-{source}.npy", plan.map_images)
        jitter = torch.compile(jitter_colours)
        with threads(1):
            paths = {
                name: lambda path=path: rate_for(plan.seconds, path)
                for name, path in make_paths(cfg, split, dataset, jitter).items()
            }
            for name, rates in interleave(paths, plan.repeats, source).items():
                labels = {"path": name, "source": source, "where": "one CPU core"}
                rows.append(make_row(labels, "images/s", rates))
        if device.type == "cuda":
            on_device = {
                name: lambda path=path: rate_for(plan.seconds, path)
                for name, path in device_paths(cfg, dataset, device, jitter).items()
            }
            for name, rates in interleave(on_device, plan.repeats, "device").items():
                labels = {"path": name, "source": source, "where": "the whole machine"}
                rows.append(make_row(labels, "images/s", rates))
    return {"rows": rows, "bytes_per_source": bytes_each}
