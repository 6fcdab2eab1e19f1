"""Splits on disk: finding them, reading them, refusing what is wrong; and decoding one image."""

import dataclasses
import io
import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageOps

from emotion_transfer.config import EnhancedConfig, resolve_path
from emotion_transfer.sample import MIKELS_CLASSES, draw_sample

# %% [markdown]
# ### Where the images come from
#
# A data set is a folder with `train.csv`, `val.csv` and `test.csv`; each row is an image's path and
# its label. The training rows teach the network, the validation rows choose between epochs, and
# the test rows are looked at once, at the end. Where the default folder holds none of the three,
# the built-in sample is drawn instead. A folder that *you* named, or one with a file missing, is
# never replaced in silence.

# %%
SPLITS = ("train", "val", "test")
SAMPLE_ROOT = "data/sample"
QUICK_PROFILE: Mapping[str, Any] = {
    "EPOCHS": 8,
    "WARMUP_EPOCHS": 2,
    "THAW_EPOCHS": (2, 3),
    "MIX_OFF_EPOCHS": 2,
    "IMG_SIZE": 96,
    "LR_BACKBONE": 3e-4,
}


class DataError(ValueError):
    """Data that must not be trained on; the message names the file, the row and the fix."""


def uses_sample(cfg: EnhancedConfig) -> bool:
    """Whether `cfg` leads to the built-in synthetic sample."""
    if cfg.DATASET != "auto":
        return cfg.DATASET == "sample"
    default = EnhancedConfig.__dataclass_fields__["DATA_ROOT"].default
    present = [s for s in SPLITS if (resolve_path(cfg.DATA_ROOT) / f"{s}.csv").exists()]
    return default == cfg.DATA_ROOT and not present


# %% [markdown]
# In memory a split is a list of paths with an array of class numbers, and remembers each image's
# row in its CSV, so that every complaint can name it.


# %%
@dataclass(frozen=True)
class Split:
    """One of train, val, test: `files` (N paths as in the CSV), `labels` int64 [N], `rows` [N]."""

    name: str
    csv: Path
    images_root: Path
    files: Sequence[str]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]  # line in the CSV; its header is line 1

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """The image file at position `index`."""
        return self.images_root / self.files[index]

    def where(self, index: int) -> str:
        """File and line of position `index`, for messages."""
        return f"{self.csv} row {self.rows[index]} ({self.files[index]})"

    def select(self, keep: npt.NDArray[Any]) -> "Split":
        """The split with only the positions `keep` (int or bool array)."""
        chosen = np.arange(len(self))[keep]
        files = [self.files[i] for i in chosen]
        return dataclasses.replace(
            self, files=files, labels=self.labels[chosen], rows=self.rows[chosen]
        )


# %%
@dataclass(frozen=True)
class EmotionData:
    """Three splits and the names of their classes, in the order of the class numbers."""

    name: str
    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    synthetic: bool

    def counts(self) -> pd.DataFrame:
        """Images by class (index) and split (columns)."""
        sizes = {
            name: np.bincount(split.labels, minlength=len(self.classes))
            for name, split in self.splits.items()
        }
        return pd.DataFrame(sizes, index=pd.Index(self.classes, name="class"))


# %% [markdown]
# `load_data` is the door: it decides between your files and the sample, then reads and checks the
# three CSVs.


# %%
def load_data(cfg: EnhancedConfig) -> EmotionData:
    """Read the splits that `cfg` points to, drawing the synthetic sample where it is due.

    Raises:
        DataError: for a missing or malformed file, an unknown label, an empty split, or a path
            that occurs twice.
    """
    synthetic = uses_sample(cfg)
    root = draw_sample(resolve_path(SAMPLE_ROOT)) if synthetic else resolve_path(cfg.DATA_ROOT)
    explicit = cfg.IMAGES_ROOT is not None and not synthetic
    images_root = resolve_path(str(cfg.IMAGES_ROOT)) if explicit else root
    missing = [f"{s}.csv" for s in SPLITS if not (root / f"{s}.csv").is_file()]
    if missing:
        raise DataError(
            f"{root} lacks {', '.join(missing)}. Write it with `python -m emotion_transfer.prepare "
            f'SOURCE --output {root}`, correct DATA_ROOT, or set DATASET="sample"'
        )
    tables = {s: read_split_table(root / f"{s}.csv") for s in SPLITS}
    classes = class_order(root, tables["train"])
    splits = {s: make_split(s, root, images_root, tables[s], classes) for s in SPLITS}
    refuse_repeated_paths(splits)
    name = "synthetic sample" if synthetic else root.name
    return EmotionData(name, root, classes, splits, synthetic)


# %% [markdown]
# Column names vary between data sets, so a few spellings are accepted. Everything is read as text:
# a label called `NA` or `1` must stay what it is.

# %%
PATH_COLUMNS = ("path", "image_path", "filepath", "file")
LABEL_COLUMNS = ("label", "emotion", "class")


def read_split_table(csv: Path) -> pd.DataFrame:
    """The CSV as text in columns `path`, `label` and `row`; raises ``DataError`` if it is bad."""
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError, pd.errors.ParserError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{csv} cannot be read as a UTF-8 CSV file: {reason}") from error
    chosen = []
    for accepted in (PATH_COLUMNS, LABEL_COLUMNS):
        found = [c for c in accepted if c in table.columns]
        if not found:
            have = ", ".join(map(str, table.columns))
            raise DataError(f"{csv} has no column {' or '.join(accepted)}; it has: {have}")
        chosen.append(found[0])
    if table.empty:
        raise DataError(f"{csv} lists no image; give every split at least one row")
    values = table[chosen].set_axis(["path", "label"], axis=1)
    values["row"] = np.arange(2, len(table) + 2)
    for column in ("path", "label"):
        blank = values.loc[values[column].isna() | (values[column].str.strip() == ""), "row"]
        if len(blank):
            raise DataError(f"{csv} row {blank.iloc[0]} has an empty {column}; fill or remove it")
    return values


# %% [markdown]
# The order of the classes decides which output of the network means what. It comes from
# `label_map.json`; without one, from the official EmoSet order or, for other labels, the alphabet.
# It is never sorted again, and it travels inside every checkpoint.


# %%
def class_order(root: Path, train: pd.DataFrame) -> tuple[str, ...]:
    """The class names in the order of their numbers; raises ``DataError`` for a bad label map."""
    file = root / "label_map.json"
    labels = sorted(train["label"].unique())
    if not file.exists():
        classes = MIKELS_CLASSES if set(labels) == set(MIKELS_CLASSES) else tuple(labels)
        if len(classes) < 2:
            raise DataError(
                f"{root / 'train.csv'} has one class only ({labels[0]}); two are needed"
            )
        return classes
    try:
        label_map = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    wanted = '{"first class": 0, "second class": 1, ...}, numbered from 0 without gaps'
    if not isinstance(label_map, dict) or not all(type(v) is int for v in label_map.values()):
        raise DataError(f"{file} must be an object {wanted}")
    if sorted(label_map.values()) != list(range(len(label_map))) or len(label_map) < 2:
        raise DataError(f"{file} must be {wanted}; it has the numbers {sorted(label_map.values())}")
    return tuple(sorted(label_map, key=label_map.__getitem__))


# %%
def make_split(
    name: str, root: Path, images_root: Path, table: pd.DataFrame, classes: Sequence[str]
) -> Split:
    """A `Split` from the table of its CSV; raises ``DataError`` for a label not in `classes`."""
    csv = root / f"{name}.csv"
    number = {label: i for i, label in enumerate(classes)}
    unknown = table.loc[~table["label"].isin(list(number))]
    if len(unknown):
        row, label = unknown.iloc[0][["row", "label"]]
        raise DataError(
            f"{csv} row {row} has the unknown label {label!r} ({len(unknown)} such rows); "
            f"known: {', '.join(classes)}. Correct the row, or add the class to label_map.json"
        )
    labels = np.array([number[label] for label in table["label"]], dtype=np.int64)
    rows = np.array(table["row"], dtype=np.int64)
    return Split(name, csv, images_root, table["path"].tolist(), labels, rows)


def refuse_repeated_paths(splits: Mapping[str, Split]) -> None:
    """Raise ``DataError`` if a path occurs twice, in one split or in two."""
    seen: dict[str, tuple[Split, int]] = {}
    for split in splits.values():
        for i, file in enumerate(split.files):
            if file in seen:
                other, j = seen[file]
                raise DataError(
                    f"{split.where(i)} is listed already in {other.where(j)}; remove one of the "
                    "two: an image in two splits is tested on what it was trained on"
                )
            seen[file] = (split, i)


# %% [markdown]
# ### Decoding one image, whatever it is
#
# Real collections hold phone photographs that carry their rotation in a tag, transparent PNGs,
# printers' CMYK, 16-bit scans, half-downloaded files. Every good one becomes the same thing: a
# square of 8-bit RGB. Every bad one becomes an `ImageError` that says why. Two guards keep a
# hostile file from filling the memory: its size is read from the header before a pixel is, and the
# centre square is cut *while* resizing, so a 50,000-pixel-wide strip never becomes a larger one.

# %%
MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 100_000_000


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


def read_image_bytes(path: Path) -> bytes:
    """The bytes of an image file; raises ``ImageError`` for what is no regular, sane file."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ImageError("not a regular file")
        if info.st_size == 0:
            raise ImageError("zero bytes")
        if info.st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"{info.st_size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError("missing") from error
    except (OSError, ValueError) as error:
        raise ImageError(str(error)) from error


# %%
def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode; transparency is laid over white.

    Raises:
        ImageError: for floating-point pixels, which have no agreed range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("floating-point pixels; save it as 8- or 16-bit")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to white
        values = np.asarray(image, dtype=np.int64)
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        values = np.clip(values >> 8 if wide else values, 0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(paper, layered).convert("RGB")
    return image.convert("RGB")


# %%
def decode_image(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode `data` to its upright, antialiased centre square, uint8 [size, size, 3].

    Raises:
        ImageError: if the bytes are no usable image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ImageError(f"{width}x{height} pixels; the limit is {MAX_IMAGE_PIXELS:,}")
            image.draft("RGB", (size, size))  # lets a JPEG decode at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            upright = centre_square(upright, size)
            return np.asarray(as_rgb(upright))
    except ImageError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ImageError(f"{type(error).__name__}: {error}") from error


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of `image`, resized to `size` x `size`."""
    if image.mode in ("P", "1", "I") or image.mode.startswith("I;16"):
        image = as_rgb(image)  # these modes cannot be interpolated
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
