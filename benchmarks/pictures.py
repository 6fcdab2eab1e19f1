"""Photograph-like JPEG files made by code: smooth light, edges and noise at every scale."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.cache import ChosenPixels, cache_images
from emotion_toolbox.tables import Split

CLASSES = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
QUALITY = 92


def draw_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture whose spectrum falls about as 1/f, as that of photographs does, with some edges."""
    rng = np.random.default_rng([seed, *size])
    width, height = size
    pixels = np.full((height, width, 3), rng.uniform(80, 170, 3))
    pixels += rng.normal(0, 4, (height, width, 1))  # a sensor's grain
    scale = 2
    while scale < 2 * width:
        grid = rng.normal(0, 1, (max(2, scale * height // width), scale))
        octave = Image.fromarray(grid.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        tint = rng.normal(0, 0.35, 3) if scale < 64 else rng.normal(0, 0.05, 3)
        pixels += np.asarray(octave)[..., None] * (1 + tint) * 60 / scale**0.4
        scale *= 2
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    layer, mask = Image.new("RGB", size), Image.new("L", size)
    for _ in range(12):
        corners = [tuple(p) for p in rng.uniform(0, 1, (3, 2)) * size]
        ImageDraw.Draw(layer).polygon(corners, tuple(rng.integers(20, 235, 3).tolist()))
        ImageDraw.Draw(mask).polygon(corners, int(rng.integers(60, 160)))
    return Image.composite(layer, image, mask)


def make_files(root: Path, size: tuple[int, int], count: int) -> Path:
    """`count` JPEG files under one folder a class, made where they are missing."""
    for number in tqdm(range(count), desc=f"sources {size[0]}x{size[1]}", leave=False):
        file = root / CLASSES[number % len(CLASSES)] / f"{number:05d}.jpg"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_picture(size, number).save(file, quality=QUALITY)
    return root


def repeat_files(root: Path, source: Path, count: int) -> Path:
    """`count` names under `root`, hard links in turn to the files under `source`."""
    files = sorted(source.rglob("*.jpg"), key=lambda file: file.name)
    for number in range(count):
        origin = files[number % len(files)]
        file = root / origin.parent.name / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        os.link(origin, file)
    return root


def make_split(root: Path) -> Split:
    """All files under `root` as a training split, labelled by their folder."""
    files = sorted(str(f.relative_to(root)) for f in root.rglob("*.jpg"))
    labels = np.array([CLASSES.index(f.split("/")[0]) for f in files], dtype=np.int64)
    return Split("train", root / "train.csv", root, files, labels, np.arange(len(files)) + 2)


class RepeatedPixels(ChosenPixels):
    """A memory map of repeated data, too large for the processor's own cache."""

    def __init__(self, small: npt.NDArray[np.uint8], file: Path, count: int) -> None:
        array = np.lib.format.open_memmap(file, "w+", np.uint8, (count, *small.shape[1:]))
        for first in range(0, count, len(small)):
            array[first : first + len(small)] = small[: count - first]
        array.flush()
        super().__init__(np.load(file, mmap_mode="r"), np.arange(count))


def repeated_dataset(dataset: EmotionDataset, file: Path, count: int) -> EmotionDataset:
    """`count` images: those of the cached `dataset` over and over, in a map of their own."""
    rows, few = np.arange(count), dataset.pixels[np.arange(len(dataset))]
    pixels = RepeatedPixels(few, file, count)
    split = dataset.split.select(rows % len(dataset))
    return EmotionDataset(split, dataset.classes, pixels)


def cached_dataset(split: Split, folder: Path, side: int, threads: int) -> EmotionDataset:
    """The split's images from a cache that is built by the library."""
    pixels, _, _ = cache_images(split, side, threads, folder)
    return EmotionDataset(split, CLASSES, pixels)
