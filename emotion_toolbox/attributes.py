"""Attributes of pictures: columns of their table beside path and label, and what pixels tell."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm.auto import tqdm

from emotion_toolbox.cache import Pixels, PixelSource
from emotion_toolbox.errors import DataError
from emotion_toolbox.sample import SAMPLE_VERSION, paint_class, sample_plan, sample_recipe
from emotion_toolbox.tables import MIKELS_CLASSES, Split, read_table, spelling_key

Floats = npt.NDArray[np.float64]
MEASURED = ("brightness", "colorfulness")  # by ``measure_pictures``, where a table lacks them
EXTREMELY_COLOURFUL = 109.0  # by the scale of Hasler and Süsstrunk
CHUNK = 64  # pictures measured at a time


@dataclass(frozen=True)
class Attribute:
    """A column of N images: `cells` [N], the values of each (none: missing), and what they are.

    `numbers` [N] are the values where all are numbers, NaN where missing; else None.
    """

    name: str
    cells: Sequence[tuple[str, ...]]
    numbers: Floats | None

    @property
    def several(self) -> bool:
        """Whether an image may have more than one value."""
        return any(len(cell) > 1 for cell in self.cells)


def split_cell(text: str) -> tuple[str, ...]:
    """The values in a cell: one, several separated by ``|`` or ``;``, a JSON list, or none."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else re.split(r"[|;]", text)
    except (ValueError, RecursionError):
        found = [text]
    values = (" ".join(str(value).split()) for value in found)
    return tuple(dict.fromkeys(v for v in values if spelling_key(v) != "missing"))


def make_attribute(name: str, texts: Iterable[str]) -> Attribute:
    """The attribute whose cells hold these `texts`."""
    cells = [split_cell(text) for text in texts]
    single = [cell[0] if len(cell) == 1 else None if cell else "nan" for cell in cells]
    numbers = pd.to_numeric(pd.Series(single, dtype=object), errors="coerce").to_numpy(np.float64)
    known = np.array([bool(cell) for cell in cells])
    numeric = known.any() and bool(np.isfinite(numbers[known]).all())
    return Attribute(name, cells, numbers if numeric else None)


def extra_columns(split: Split) -> pd.DataFrame:
    """The columns of the split's table beside path and label, a row an image, as text.

    Of the drawn sample, whose table has none, ``drawn_attributes``.
    """
    table = read_table(split.csv).set_index("row").loc[split.rows]
    table = table.drop(columns=["path", "label"]).reset_index(drop=True)
    recipe = sample_recipe(split.csv.parent)
    if recipe is None or recipe["version"] != SAMPLE_VERSION:
        return table
    plan = sample_plan(recipe).set_index("path").loc[list(split.files)]
    drawn = map(drawn_attributes, plan["label"], plan["key"])
    return table.assign(**pd.DataFrame(list(drawn), columns=["second_class", "second_share"]))


def drawn_attributes(label: str, key: Sequence[int]) -> tuple[str, str]:
    """The class whose picture ``paint_picture`` blends into this one, and its share.

    It repeats those draws; a picture that small is drawn in no time.
    """
    rng = np.random.default_rng(key)
    rng.uniform(size=2)  # the sides
    step = rng.choice([-1, 1]) if rng.random() < 0.6 else rng.integers(1, 8)
    second = MIKELS_CLASSES[(MIKELS_CLASSES.index(label) + step) % 8]
    for name in (label, second):
        paint_class(name, rng, 2)
    return second, str(rng.uniform(0, 0.45))


def measure_pictures(pictures: Pixels) -> Floats:
    """Brightness and colourfulness [N, 2] of RGB pictures, uint8 [N, H, W, 3].

    Brightness is the mean luma (ITU-R BT.601), from 0 to 1. Colourfulness is the measure of Hasler
    and Süsstrunk 2003 ("Measuring colourfulness in natural images"), with 1 where they say
    *extremely colourful*.
    """
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread, mean = opponents.std(axis=(2, 3)), opponents.mean(axis=(2, 3))
    colour = np.hypot(*spread) + 0.3 * np.hypot(*mean)
    return np.stack([luma.mean(axis=(1, 2)) / 255, colour / EXTREMELY_COLOURFUL], axis=1)


def measure_all(pixels: PixelSource, count: int) -> pd.DataFrame:
    """The columns MEASURED of all `count` images of `pixels`, as text."""
    chunks = np.array_split(np.arange(count), max(1, -(-count // CHUNK)))
    bar = tqdm(chunks, "measuring light and colours", unit="chunk", leave=False)
    found = np.concatenate([measure_pictures(pixels[rows]) for rows in bar])
    return pd.DataFrame(found, columns=list(MEASURED)).astype(str)


def choose_columns(split: Split, names: Sequence[str] = ()) -> pd.DataFrame:
    """The columns `names` that the split's table has (none named: all), as ``extra_columns``.

    Raises ``DataError`` for one that neither is there nor can be measured.
    """
    table = extra_columns(split)
    for name in names:
        if name not in table.columns and name not in MEASURED:
            have = ", ".join(dict.fromkeys([*table.columns, *MEASURED]))
            raise DataError(f"{split.csv} has no attribute {name!r}; there are: {have}")
    return table[[name for name in dict.fromkeys(names or table.columns) if name in table.columns]]


def read_attributes(
    split: Split, pixels: PixelSource, names: Sequence[str] = ()
) -> dict[str, Attribute]:
    """The attributes `names` of a split with these `pixels`, by name, in that order.

    None named: all columns of its table, and brightness and colorfulness. These are measured where
    the table lacks them. Raises ``DataError`` for a name that there is not.
    """
    table = choose_columns(split, names)
    wanted = list(dict.fromkeys(names or [*table.columns, *MEASURED]))
    if missing := [name for name in wanted if name not in table.columns]:
        table = table.assign(**measure_all(pixels, len(split))[missing])
    return {name: make_attribute(name, table[name]) for name in wanted}
