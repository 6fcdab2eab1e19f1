"""The synthetic sample: a data set drawn by code, so that everything runs without a download."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from filelock import FileLock
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from tqdm.auto import tqdm

from emotion_toolbox.errors import DataError
from emotion_toolbox.files import resolve_path
from emotion_toolbox.tables import MIKELS_CLASSES, EmotionData, load_splits, write_split_tables

SAMPLE_ROOT, DEFAULT_ROOT = "data/sample", "data/processed/EmoSet_splits"
SAMPLE_VERSION = 2  # raise it whenever the pictures change: older samples are then drawn again
SAMPLE_COUNTS = {"train": 60, "val": 15, "test": 30}  # pictures a class, on average
EMOSET_BALANCE = (1.32, 1.02, 1.11, 1.34, 0.72, 0.72, 0.91, 0.86)  # of the mean; in training only

Rng = np.random.Generator
Points = npt.NDArray[np.float64]
Shapes = list[tuple[Points, str]]  # outlines [K, 2], from (0, 0) to (1, 1), and their colours


def tint(rng: Rng, hue: float, saturation: float, value: float) -> str:
    """A random colour near the given hue, saturation and value, all from 0 to 1."""
    s, v = np.clip(rng.normal((saturation, value), 0.09), 0, 1)
    return f"hsv({360 * rng.normal(hue, 0.05) % 360:.0f},{s:.0%},{v:.0%})"


def fan(centre: npt.ArrayLike, reach: float, turns: npt.ArrayLike) -> Points:
    """Points [K, 2] at a distance of `reach` from the centre, in the directions `turns` [K]."""
    return np.asarray(centre) + reach * np.stack([np.cos(turns), np.sin(turns)], 1)


def discs(rng: Rng, hues: npt.ArrayLike, value: float, least: float, most: float) -> Shapes:
    """A disc of each hue, anywhere, with a radius from `least` to `most`."""
    circle, places = np.linspace(0, 2 * np.pi, 30), []
    for hue in np.atleast_1d(hues):
        outline = fan(rng.random(2), rng.uniform(least, most), circle)
        places.append((outline, tint(rng, hue, 0.65, value)))
    return places


def _confetti(rng: Rng, hue: float, value: float) -> Shapes:
    return discs(rng, rng.random(rng.integers(14, 60)), 0.9, 0.015, 0.07)


def _hills(rng: Rng, hue: float, value: float, rough: float = 0) -> Shapes:
    shapes, x = discs(rng, 0.13, 0.95, 0.04, 0.1), np.linspace(0, 1, 30)
    for top in np.linspace(0.5, 0.9, rng.integers(2, 5), endpoint=False):
        y = top + 0.05 * np.sin(rng.uniform(4, 12) * x + 6 * rng.random())
        y += rough * np.interp(x, np.sort(rng.random(11)), rng.uniform(-0.17, 0.1, 11))
        outline = np.array([(0, 1), *zip(x, y, strict=True), (1, 1)])
        shapes.append((outline, tint(rng, hue, 0.45, value * (1.2 - top))))
    return shapes


def _mountains(rng: Rng, hue: float, value: float) -> Shapes:
    stars = discs(rng, np.full(rng.integers(0, 40), 0.15), 1, 0.002, 0.005)
    return stars + _hills(rng, hue, value, rough=1)


def _rays(rng: Rng, hue: float, value: float) -> Shapes:
    centre, edges = rng.uniform(0.2, 0.8, 2), np.cumsum(rng.uniform(0.1, 0.4, 24)).reshape(-1, 2)
    colour = tint(rng, hue + rng.uniform(0.05, 0.3), 0.6, rng.choice([0.5, 0.9]))
    return [(np.vstack([centre, fan(centre, 3, pair)]), colour) for pair in edges]


def _shards(rng: Rng, hue: float, value: float) -> Shapes:
    centres = rng.random((rng.integers(12, 30), 2))
    outlines = [centre + rng.normal(0, 0.15, (3, 2)) for centre in centres]
    return [(one, tint(rng, hue, 0.75, rng.choice([0.1, 0.45, 0.8]))) for one in outlines]


def _mould(rng: Rng, hue: float, value: float) -> Shapes:
    large = discs(rng, np.full(rng.integers(30, 80), hue), 0.9 - value, 0.02, 0.12)
    return large + discs(rng, np.full(rng.integers(10, 40), hue), value, 0.01, 0.05)


def _branches(rng: Rng, hue: float, value: float) -> Shapes:
    bark, shapes = tint(rng, hue, 0.15, 0.7 - value), Shapes()
    tips = [(x, 1.0, -1.6, 0.3) for x in rng.random(rng.integers(1, 4))]
    for x, y, turn, length in tips:  # and those that grow from them
        (end,) = fan((x, y), length, [turn])
        across = fan((0, 0), length / 30, [turn - 1.6, turn + 1.6])
        shapes.append((np.vstack([(x, y) + across, end - across]), bark))
        if length > 0.06:
            tips += [(*end, t, length * rng.uniform(0.5, 0.85)) for t in rng.normal(turn, 0.6, 2)]
    return shapes


def _rain(rng: Rng, hue: float, value: float) -> Shapes:
    drop, slant = tint(rng, hue, 0.15, value + 0.25), rng.uniform(-0.35, 0.35)
    fall, places = np.array([(0, 0), (slant, 1), (0.05, 0)]), rng.uniform(-0.1, 1, (100, 2))
    return [(place + rng.uniform(0.04, 0.16) * fall, drop) for place in places]


# of each class: hues, saturation and values of the ground, what is drawn on it, and its blur
CLASSES: dict[str, tuple[Sequence[float], float, Sequence[float], Callable[..., Shapes], float]] = {
    "amusement": ((0.1, 0.3, 0.5, 0.7, 0.9), 0.3, (0.25, 0.9), _confetti, 0),
    "awe": ((0.05, 0.58, 0.66, 0.8), 0.5, (0.5, 0.75, 0.95), _mountains, 0),
    "contentment": ((0.1, 0.25, 0.4, 0.55), 0.4, (0.7, 0.95), _hills, 2),
    "excitement": ((0.0, 0.2, 0.4, 0.6, 0.8), 0.6, (0.7, 0.9), _rays, 0),
    "anger": ((0.0, 0.05, 0.9), 0.7, (0.25, 0.5, 0.85), _shards, 0),
    "disgust": ((0.1, 0.2, 0.35), 0.5, (0.25, 0.4, 0.6), _mould, 6),
    "fear": ((0.05, 0.4, 0.6, 0.75), 0.35, (0.15, 0.6), _branches, 0),
    "sadness": ((0.1, 0.57, 0.65), 0.25, (0.2, 0.4, 0.65), _rain, 0),
}


def paint_class(label: str, rng: Rng, side: int) -> Image.Image:
    """A square picture of one class alone."""
    hues, saturation, values, draw_shapes, blur = CLASSES[label]
    hue, value = rng.choice(hues), rng.choice(values)
    top = tint(rng, hue, saturation, value)
    bottom = tint(rng, hue + rng.uniform(-0.1, 0.1), saturation, value)
    image = ImageOps.colorize(Image.linear_gradient("L").resize((side, side)), top, bottom)
    draw = ImageDraw.Draw(image)
    for outline, colour in draw_shapes(rng, hue, value):
        draw.polygon((side * outline).ravel().tolist(), colour)
    return image.filter(ImageFilter.BoxBlur(blur))


def paint_picture(label: str, key: Sequence[int], size: int) -> Image.Image:
    """Draw an RGB picture of class `label`, seeded by `key`; its shorter side is about `size`.

    Feelings are rarely pure: up to almost half of it is a picture of another class, mostly of a
    neighbour, and its light and colourfulness are drawn at random.
    """
    rng = np.random.default_rng(key)
    short = round(size * rng.uniform(0.9, 1.1))
    sides = short, round(short * rng.uniform(1, 1.45))
    step = rng.choice([-1, 1]) if rng.random() < 0.6 else rng.integers(1, 8)
    names = label, MIKELS_CLASSES[(MIKELS_CLASSES.index(label) + step) % 8]
    # painted twice as large, then halved: that smooths the edges
    first, second = (paint_class(name, rng, 2 * short) for name in names)
    image = Image.blend(first, second, rng.uniform(0, 0.45))
    image = ImageOps.fit(image, sides if rng.random() < 0.4 else sides[::-1])
    image = ImageEnhance.Brightness(image).enhance(rng.lognormal(0, 0.25))
    return ImageEnhance.Color(image).enhance(rng.lognormal(0, 0.35))


def sample_plan(recipe: Mapping[str, Any]) -> pd.DataFrame:
    """Split, path, label and seeding key of every picture."""
    rows = [
        (split, f"{split}/{label}/{label}_{i:04d}.jpg", label, (recipe["seed"], s, c, i))
        for s, (split, mean) in enumerate(recipe["counts"].items())
        for c, label in enumerate(MIKELS_CLASSES)
        for i in range(max(1, round(mean * (EMOSET_BALANCE[c] if split == "train" else 1))))
    ]
    return pd.DataFrame(rows, columns=["split", "path", "label", "key"])


def draw_into(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Draw every picture of the recipe into `folder` and write its tables."""
    plan = sample_plan(recipe)
    for row in tqdm(plan.to_dict("records"), "drawing the sample", unit="image"):
        image = paint_picture(row["label"], row["key"], recipe["size"])
        (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / row["path"], quality=90)
    tables = {str(split): rows[["path", "label"]] for split, rows in plan.groupby("split")}
    source = "synthetic sample: drawn by emotion_toolbox/sample.py, not photographs"
    stats = {"source": source, "synthetic": True, "recipe": recipe, "images_root": "."}
    write_split_tables(folder, tables, MIKELS_CLASSES, stats)


def sample_recipe(root: Path) -> Any:
    """The recipe of the sample in `root`, or None if there is no sample."""
    try:
        stats = json.loads((root / "stats.json").read_text(encoding="utf-8"))
        return stats["recipe"] if stats["synthetic"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def sample_complete(root: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether `root` holds every file of this recipe's sample."""
    if sample_recipe(root) != recipe:
        return False
    files = ["label_map.json", *(f"{s}.csv" for s in SAMPLE_COUNTS), *sample_plan(recipe)["path"]]
    return all((root / name).is_file() for name in files)


def draw_sample(
    root: Path, *, seed: int = 7, counts: Mapping[str, int] = SAMPLE_COUNTS, size: int = 160
) -> Path:
    """Draw the synthetic sample into the folder `root`, unless it is there already, and return it.

    `counts` are pictures a class (in training, the mean), and `size` is about the shorter side in
    pixels. A drawing that is stopped leaves nothing that looks complete. Raises ``DataError`` if
    `root` holds anything but a sample (it is not touched) or cannot be written.
    """
    recipe = {"version": SAMPLE_VERSION, "seed": seed, "size": size, "counts": dict(counts)}
    if sample_complete(root, recipe):
        return root
    if root.is_file() or (root.is_dir() and any(root.iterdir()) and not sample_recipe(root)):
        raise DataError(
            f"{root} holds something else than the synthetic sample (no stats.json there says it "
            "does); choose another folder, or delete this one"
        )
    draft = root.with_name(f".{root.name}.partial")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not sample_complete(root, recipe):  # another process may just have drawn it
                shutil.rmtree(draft, ignore_errors=True)  # of a drawing that was stopped
                draw_into(draft, recipe)
                shutil.rmtree(root, ignore_errors=True)
                draft.rename(root)
    except OSError as error:
        raise DataError(
            f"the sample cannot be drawn into {root}: {error}; start Jupyter in a folder where you "
            "may write, or set DATA_ROOT to a data set of your own"
        ) from error
    return root


def uses_sample(dataset: str, data_root: str) -> bool:
    """Whether these settings lead to the built-in synthetic sample."""
    if dataset != "auto":
        return dataset == "sample"
    root = resolve_path(data_root)
    # lexists: a link to a disk that is not mounted is a data set somebody meant
    absent = root.is_dir() or not os.path.lexists(root)
    present = any(os.path.lexists(root / f"{split}.csv") for split in SAMPLE_COUNTS)
    return data_root == DEFAULT_ROOT and absent and not present


def load_data(dataset: str, data_root: str, images_root: str | None = None) -> EmotionData:
    """The splits that these settings point to, drawing the sample where it is due."""
    if uses_sample(dataset, data_root):
        return load_splits(draw_sample(resolve_path(SAMPLE_ROOT)))
    images = None if images_root is None else resolve_path(images_root)
    return load_splits(resolve_path(data_root), images)
