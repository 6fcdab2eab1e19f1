"""The synthetic sample: a data set drawn by code, so that everything runs without a download."""

import colorsys
import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from tqdm.auto import tqdm

from emotion_toolbox.emotions import MIKELS_CLASSES
from emotion_toolbox.files import resolve_path
from emotion_toolbox.tables import (
    SPLITS,
    EmotionData,
    load_splits,
    summarise_sizes,
    write_split_tables,
)

Rng = np.random.Generator


def _tint(rng: Rng, hue: float, saturation: float, value: float) -> str:
    """A random colour (`#rrggbb`) near the given hue, saturation and value, all from 0 to 1."""
    s, v = np.clip(rng.normal([saturation, value], 0.09), 0, 1)
    rgb = colorsys.hsv_to_rgb(rng.normal(hue, 0.05) % 1, s, v)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in rgb)


def _gradient(size: tuple[int, int], *stops: str) -> Image.Image:
    """An image of `size` (width, height) that runs from the first colour down to the last."""
    column = Image.new("RGB", (1, len(stops)))
    for row, stop in enumerate(stops):
        column.paste(stop, (0, row, 1, row + 1))
    return column.resize(size, Image.Resampling.BICUBIC)


def _disc(
    rng: Rng,
    image: Image.Image,
    colour: str,
    radii: tuple[float, float],
    low: float = 1.0,
) -> None:
    """Draw a disc somewhere above `low` (1: the lower edge); `radii` are shares of the width."""
    x, y = rng.uniform(0, image.width), rng.uniform(0, low * image.height)
    r = rng.uniform(*radii) * image.width
    ImageDraw.Draw(image).ellipse([x - r, y - r, x + r, y + r], colour)


def _ridge(rng: Rng, image: Image.Image, colour: str, top: float, rough: bool) -> None:
    """Draw mountains (rough) or hills whose mean height is `top` (0: the upper edge)."""
    x = np.linspace(0, 1, 29)
    y = top + sum(
        rng.normal(0, 0.06 / k) * np.sin(2 * np.pi * (k * x + rng.random())) for k in (1, 2)
    )
    if rough:
        y = y + np.interp(x, np.sort(rng.random(11)), rng.uniform(-0.17, 0.1, 11))
    outline = np.stack([x * image.width, y * image.height], 1).tolist()
    corners = [(image.width, image.height), (0, image.height)]
    ImageDraw.Draw(image).polygon([*map(tuple, outline), *corners], colour)


def _paint_amusement(rng: Rng, size: tuple[int, int]) -> Image.Image:
    ground = rng.choice([0.25, 0.9, 0.95])  # a party by night or by day
    image = _gradient(size, *(_tint(rng, rng.random(), 0.3, ground) for _ in range(2)))
    for _ in range(rng.integers(2, 7)):  # streamers
        box = np.sort(rng.uniform(-0.3, 1.3, (2, 2)), axis=0) * size
        start = rng.uniform(0, 360)
        ImageDraw.Draw(image).arc(
            [*box.ravel()],
            start,
            start + rng.uniform(60, 200),
            _tint(rng, rng.random(), 0.7, 0.9),
            6,
        )
    for _ in range(rng.integers(14, 60)):
        _disc(rng, image, _tint(rng, rng.random(), 0.7, 0.9), (0.015, 0.07))
    return image


def _paint_excitement(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, vivid, rays = rng.random(), rng.choice([0.45, 0.8]), 2 * rng.integers(6, 14)
    image = _gradient(size, _tint(rng, hue, vivid, 0.9), _tint(rng, hue + 0.05, vivid, 0.7))
    colour = _tint(rng, hue + rng.uniform(0.05, 0.3), vivid, rng.choice([0.5, 0.9]))
    centre = rng.uniform(0.2, 0.8, 2) * size
    edges = rng.random() * 6.3 + np.cumsum(rng.uniform(0.6, 1.4, rays)) * 2 * math.pi / rays
    ends = centre + 2 * max(size) * np.stack([np.cos(edges), np.sin(edges)], 1)
    for one, two in ends.reshape(-1, 2, 2):
        ImageDraw.Draw(image).polygon([*centre, *one, *two], colour)
    return image


def _paint_awe(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, layers = rng.choice([0.58, 0.66, 0.8, 0.05]), rng.integers(2, 5)
    light = rng.choice([0.55, 0.8, 1.0])  # from night to day
    sky = (hue, 0.6, 0.6), (hue + 0.15, 0.5, 0.8), (0.08, 0.45, 0.95)
    image = _gradient(size, *(_tint(rng, h, s, v * light) for h, s, v in sky))
    for _ in range(rng.integers(0, 40)):  # stars
        _disc(rng, image, "#f5f0e1", (0.003, 0.006), 0.5)
    _disc(rng, image, _tint(rng, 0.13, 0.3, 0.97), (0.03, 0.1), 0.5)
    for k in range(layers):
        shade = _tint(rng, hue, 0.45, light * (0.75 - 0.5 * k / layers))
        _ridge(rng, image, shade, 0.5 + 0.4 * k / layers, rough=True)
    return image


def _paint_contentment(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, layers, light = rng.uniform(0.08, 0.62), rng.integers(2, 5), rng.choice([0.75, 1.0])
    image = _gradient(
        size, _tint(rng, 0.55, 0.3, 0.9 * light), _tint(rng, 0.12, 0.25, 0.95 * light)
    )
    _disc(rng, image, _tint(rng, 0.13, 0.25, 0.95), (0.04, 0.1), 0.4)
    for k in range(layers):
        shade = _tint(rng, hue, 0.4, light * (0.8 - 0.3 * k / layers))
        _ridge(rng, image, shade, 0.5 + 0.4 * k / layers, rough=False)
    return image.filter(ImageFilter.GaussianBlur(2))


def _paint_anger(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, ground = rng.choice([0.0, 0.02, 0.06, 0.94]), rng.choice([0.25, 0.5, 0.85])
    image = _gradient(size, _tint(rng, hue, 0.6, ground), _tint(rng, hue, 0.8, ground))
    for _ in range(rng.integers(9, 24)):
        corners = rng.integers(3, 8)
        turns = np.sort(rng.random(corners)) * 2 * math.pi
        reach = rng.uniform(0.03, 0.4, (corners, 1)) * min(size)
        points = rng.random(2) * size + reach * np.stack([np.cos(turns), np.sin(turns)], 1)
        shade = _tint(rng, hue, 0.75, rng.choice([0.1, 0.45, 0.75, 0.85]))
        ImageDraw.Draw(image).polygon([*points.ravel()], shade)
    return image


def _paint_disgust(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, cells = rng.uniform(0.05, 0.4), rng.integers(6, 14)
    noise = Image.fromarray(rng.normal(128, 130, (cells, cells)).clip(0, 255).astype(np.uint8))
    noise = noise.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(10))
    dark = Image.new("RGB", size, _tint(rng, hue, 0.55, rng.choice([0.25, 0.4])))
    light = Image.new("RGB", size, _tint(rng, hue, 0.55, rng.choice([0.55, 0.85])))
    image = Image.composite(dark, light, noise)
    for _ in range(rng.integers(4, 22)):
        _disc(rng, image, _tint(rng, hue, 0.6, rng.choice([0.3, 0.65])), (0.01, 0.06))
    return image


def _paint_fear(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, (width, height) = rng.choice([0.6, 0.75, 0.4, 0.05]), size
    night, bark = rng.choice([[0.2, 0.6], [0.15, 0.5], [0.6, 0.15]])  # the last: dark in the fog
    image = _gradient(size, _tint(rng, hue, 0.35, night), _tint(rng, hue, 0.4, 0.5 * night))
    draw, pale = ImageDraw.Draw(image), _tint(rng, hue, 0.15, bark)
    tips = [
        (rng.uniform(0.1, 0.9) * width, float(height), -1.6, 0.3) for _ in range(rng.integers(1, 4))
    ]
    while tips:
        x, y, turn, length = tips.pop()
        end = x + length * height * math.cos(turn), y + length * height * math.sin(turn)
        draw.line([(x, y), end], pale, max(2, round(20 * length)))
        if length > 0.06:
            turns = rng.normal(turn, 0.6, 2)
            tips += [(*end, t, length * rng.uniform(0.5, 0.85)) for t in turns]
    for x, y in rng.uniform(0, 0.8, (rng.integers(0, 3), 2)) * size:
        for eye in (x, x + 0.07 * width):
            draw.ellipse([eye, y, eye + 0.04 * width, y + 0.03 * width], _tint(rng, 0.14, 0.4, 0.9))
    return image


def _paint_sadness(rng: Rng, size: tuple[int, int]) -> Image.Image:
    hue, light = rng.choice([0.1, 0.55, 0.6, 0.65]), rng.uniform(0.25, 0.75)
    slant, drop = rng.uniform(-0.35, 0.35), _tint(rng, hue, 0.15, light + 0.25)
    image = _gradient(size, _tint(rng, hue, 0.25, light), _tint(rng, hue, 0.3, 0.7 * light))
    for _ in range(rng.integers(0, 7)):
        _disc(rng, image, _tint(rng, rng.choice([hue, 0.1]), 0.3, light + 0.2), (0.04, 0.13))
    image = image.filter(ImageFilter.GaussianBlur(6))
    for x, y in rng.uniform(-0.1, 1, (rng.integers(40, 140), 2)) * size:
        fall = rng.uniform(0.04, 0.16) * size[1]
        ImageDraw.Draw(image).line([x, y, x + slant * fall, y + fall], drop, 2)
    return image


PAINTERS = {
    "amusement": _paint_amusement,
    "awe": _paint_awe,
    "contentment": _paint_contentment,
    "excitement": _paint_excitement,
    "anger": _paint_anger,
    "disgust": _paint_disgust,
    "fear": _paint_fear,
    "sadness": _paint_sadness,
}


def paint_picture(label: str, key: Sequence[int], size: int) -> Image.Image:
    """Draw an RGB picture of class `label`, seeded by `key`; its shorter side is about `size`."""
    rng, own = np.random.default_rng(key), MIKELS_CLASSES.index(label)
    short = size * rng.uniform(0.9, 1.1)
    sides = round(short), round(short * rng.uniform(1, 1.45))
    width, height = sides if rng.random() < 0.4 else sides[::-1]
    step = rng.choice([-1, 1]) if rng.random() < 0.6 else rng.integers(1, 8)
    names = label, MIKELS_CLASSES[(own + step) % len(MIKELS_CLASSES)]
    # painted twice as large, then halved: that smooths the edges
    first, second = (PAINTERS[name](rng, (2 * width, 2 * height)).reduce(2) for name in names)
    share, tilt = rng.uniform(0, 0.4), rng.uniform(-0.25, 0.25, 2)  # of the second; it varies
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]  # over the picture
    mask = (share + min(1, 3 * share) * (tilt[0] * x + tilt[1] * y)).clip(0, 1)
    image = Image.composite(second, first, Image.fromarray((255 * mask).astype(np.uint8)))
    image = ImageEnhance.Brightness(image).enhance(rng.lognormal(0, 0.22))
    image = ImageEnhance.Color(image).enhance(rng.lognormal(0, 0.35))
    cast = Image.new("RGB", image.size, _tint(rng, rng.random(), 0.6, 0.6))
    return Image.blend(image, cast, rng.uniform(0, 0.18))


SAMPLE_ROOT = "data/sample"
DEFAULT_ROOT = "data/processed/EmoSet_splits"
SAMPLE_VERSION = 1  # raise it whenever the pictures change: older samples are then drawn again
SAMPLE_COUNTS = {"train": 60, "val": 15, "test": 30}  # pictures a class, on average
EMOSET_BALANCE = (1.32, 1.02, 1.11, 1.34, 0.72, 0.72, 0.91, 0.86)  # of the mean class, as above
SAMPLE_SOURCE = "synthetic sample: drawn by emotion_transfer/sample.py, not photographs"


def _sample_plan(recipe: Mapping[str, Any]) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Split, path, label and seeding key of every picture."""
    even = (1.0,) * len(MIKELS_CLASSES)
    return [
        (split, f"{split}/{label}/{label}_{i:04d}.jpg", label, (recipe["seed"], s, c, i))
        for s, split in enumerate(SAMPLE_COUNTS)
        for c, label in enumerate(MIKELS_CLASSES)
        for i in range(
            max(1, round(recipe["counts"][split] * (EMOSET_BALANCE if s == 0 else even)[c]))
        )
    ]


def _draw_into(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Draw every picture of the recipe into `folder` and write its tables."""
    plan, sizes = _sample_plan(recipe), []
    for _, path, label, key in tqdm(plan, "drawing the sample", unit="image"):
        image = paint_picture(label, key, recipe["size"])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / path, quality=90)
        sizes.append(image.size)
    rows = pd.DataFrame(plan, columns=["split", "path", "label", "key"])
    tables = {split: rows.loc[rows["split"] == split, ["path", "label"]] for split in SAMPLE_COUNTS}
    stats = {"source": SAMPLE_SOURCE, "synthetic": True, "recipe": recipe, "images_root": "."}
    stats["image_sizes"] = summarise_sizes(sizes)
    write_split_tables(folder, tables, MIKELS_CLASSES, stats)


def _recipe_of(root: Path) -> Any:
    """The recipe of the sample in `root`, or None if there is no sample."""
    try:
        stats = json.loads((root / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stats.get("recipe") if isinstance(stats, dict) and stats.get("synthetic") else None


def _sample_complete(root: Path, recipe: Mapping[str, Any]) -> bool:
    if _recipe_of(root) != recipe:
        return False
    tables = [f"{split}.csv" for split in SAMPLE_COUNTS]
    files = ["label_map.json", *tables, *(path for _, path, _, _ in _sample_plan(recipe))]
    return all((root / name).is_file() for name in files)


def _put_in_place(draft: Path, root: Path, recipe: Mapping[str, Any]) -> None:
    """Rename `draft` to `root`; an older sample there goes, a finished one of this recipe stays."""
    old = draft.with_name(draft.name + "-old")
    try:
        if not _sample_complete(root, recipe):
            with contextlib.suppress(FileNotFoundError):
                root.rename(old)
            draft.rename(root)
    except OSError:  # another process may just have put its own there
        if not _sample_complete(root, recipe):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def draw_sample(
    root: Path, *, seed: int = 7, counts: Mapping[str, int] = SAMPLE_COUNTS, size: int = 160
) -> Path:
    """Draw the synthetic sample into the folder `root`, unless it is there already, and return it.

    Args:
        counts: pictures a class in "train", "val" and "test" (the mean, where classes differ).
        size: about the length of the shorter side in pixels.

    Raises:
        ValueError: if a count or the size is impossible.
        FileExistsError: if `root` holds anything but a sample; nothing of it is touched.
    """
    if set(counts) != set(SAMPLE_COUNTS) or min(counts.values()) < 1 or size < 16:
        raise ValueError(
            f"counts={dict(counts)}, size={size}: give at least 1 picture a class for each of "
            f"{', '.join(SAMPLE_COUNTS)}, and at least 16 pixels"
        )
    recipe = {"version": SAMPLE_VERSION, "seed": seed, "size": size, "counts": dict(counts)}
    if _sample_complete(root, recipe):
        return root
    if root.exists() and _recipe_of(root) is None and (root.is_file() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} holds something else than the synthetic sample (no stats.json there says "
            "it does); choose another folder, or delete this one"
        )
    draft = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        _draw_into(draft, recipe)
        _put_in_place(draft, root, recipe)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def uses_sample(dataset: str, data_root: str) -> bool:
    """Whether these settings lead to the built-in synthetic sample."""
    if dataset != "auto":
        return dataset == "sample"
    root = resolve_path(data_root)
    absent = not os.path.lexists(root) or root.is_dir()
    present = [s for s in SPLITS if os.path.lexists(root / f"{s}.csv")]
    return data_root == DEFAULT_ROOT and absent and not present


def load_data(dataset: str, data_root: str, images_root: str | None = None) -> EmotionData:
    """The splits that these settings point to, drawing the sample where it is due."""
    if uses_sample(dataset, data_root):
        root = draw_sample(resolve_path(SAMPLE_ROOT))
        return load_splits(root, name="synthetic sample", synthetic=True)
    images = None if images_root is None else resolve_path(images_root)
    return load_splits(resolve_path(data_root), images)
