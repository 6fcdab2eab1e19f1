"""Splits on disk: finding them, reading them, refusing what is wrong; and decoding one image."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import posixpath
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import ExifTags, Image, UnidentifiedImageError

from emotion_transfer.config import EnhancedConfig, resolve_path
from emotion_transfer.sample import MIKELS_CLASSES, draw_sample

# %% [markdown]
# #### Where the images come from
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
    root = resolve_path(cfg.DATA_ROOT)
    # lexists: a link to a disk that is not mounted is a data set somebody meant
    absent = not os.path.lexists(root) or root.is_dir()
    present = [s for s in SPLITS if os.path.lexists(root / f"{s}.csv")]
    return default == cfg.DATA_ROOT and absent and not present


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

    def fingerprint(self, content: str = "") -> str:
        """Sixteen hex digits that change with the names, the labels, or the digest `content`."""
        digest = hashlib.sha256("\n".join([content, *self.files]).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def select(self, keep: npt.NDArray[Any]) -> "Split":
        """The split with only the positions `keep` (int or bool array)."""
        chosen = np.arange(len(self))[keep]
        files = [self.files[i] for i in chosen]
        return dataclasses.replace(
            self, files=files, labels=self.labels[chosen], rows=self.rows[chosen]
        )


# %% [markdown]
# The three splits belong together, with the names of the classes they share.


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
            that occurs twice, or a class without a training image.
    """
    synthetic = uses_sample(cfg)
    root = draw_sample(resolve_path(SAMPLE_ROOT)) if synthetic else resolve_path(cfg.DATA_ROOT)
    images_root = prepared_images_root(root)
    if cfg.IMAGES_ROOT is not None and not synthetic:
        images_root = resolve_path(cfg.IMAGES_ROOT)
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
    refuse_untaught_classes(splits["train"], classes)
    name = "synthetic sample" if synthetic else root.name
    return EmotionData(name, root, classes, splits, synthetic)


# %% [markdown]
# The paths in the CSVs start at `IMAGES_ROOT`; where you give none, at the folder that `prepare`
# noted in `stats.json`, or else at the folder of the CSVs.


# %%
def prepared_images_root(root: Path) -> Path:
    """Where the paths of the CSVs in `root` start, according to its ``stats.json`` if it has one.

    Raises:
        DataError: if that file is there and is not what ``prepare`` writes.
    """
    file = root / "stats.json"
    if not file.is_file():
        return root
    try:
        return root / Path(json.loads(file.read_text(encoding="utf-8")).get("images_root", "."))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); delete it and set IMAGES_ROOT") from error


# %% [markdown]
# Column names vary between data sets, so a few spellings are accepted. Everything is read as text:
# a label called `NA` or `1` must stay what it is. Every record remembers the line it starts on, and
# one with a value too many or too few is refused: from there on, columns would be shifted.

# %%
PATH_COLUMNS = ("path", "image_path", "filepath", "file")
LABEL_COLUMNS = ("label", "emotion", "class")


def read_csv_records(file: Path) -> list[tuple[int, list[str]]]:
    """Line and values of every record that is not blank; raises ``DataError`` if unreadable."""
    records, line = [], 1
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise ValueError("NUL character; is it UTF-16?")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for values in reader:
            if len(values) > 1 or "".join(values).strip():
                records.append((line, values))
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file} row {line} is not UTF-8: {error.reason}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} row {line} cannot be read as CSV: {error}") from error
    return records


# %%
def read_split_table(file: Path) -> pd.DataFrame:
    """The CSV as text in columns `path`, `label` and `row`; raises ``DataError`` if it is bad."""
    records = read_csv_records(file)
    if not records:
        raise DataError(f"{file} is empty; its first line should be: path,label")
    header = [name.strip() for name in records.pop(0)[1]]
    chosen = [find_column(file, header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS)]
    if not records:
        raise DataError(f"{file} lists no image; give every split at least one row")
    rows = []
    for line, values in records:
        if len(values) != len(header):
            raise DataError(
                f"{file} row {line} has {len(values)} values where the header has {len(header)}; "
                "a value that holds a comma needs double quotes around it"
            )
        path, label = (values[i] for i in chosen)
        for column, value in (("path", path), ("label", label)):
            if not value.strip():
                raise DataError(f"{file} row {line} has an empty {column}; fill or remove it")
            if "\n" in value or "\r" in value:
                raise DataError(
                    f"{file} row {line} has a line break in its {column}, {value[:40]!r}; is a "
                    "quotation mark missing?"
                )
        rows.append((path, label.strip(), line))
    return pd.DataFrame(rows, columns=["path", "label", "row"])


def find_column(file: Path, header: Sequence[str], accepted: Sequence[str]) -> int:
    """Position in `header` of the first of the `accepted` names; ``DataError`` if none is there."""
    found = [name for name in accepted if name in header]
    if not found:
        have = ", ".join(header)
        raise DataError(f"{file} has no column {' or '.join(accepted)}; it has: {have}")
    if header.count(found[0]) > 1:
        raise DataError(f"{file} row 1 names the column {found[0]} twice; rename one of them")
    return header.index(found[0])


# %% [markdown]
# The order of the classes decides which output of the network means what. It comes from
# `label_map.json`; without one, from the official EmoSet order or, for other labels, the alphabet.
# It is never sorted again, and it travels inside every checkpoint.


# %%
def class_order(root: Path, train: pd.DataFrame) -> tuple[str, ...]:
    """The class names in the order of their numbers; raises ``DataError`` for a bad label map."""
    file = root / "label_map.json"
    if os.path.lexists(file):
        return read_label_map(file)
    labels = sorted(train["label"].unique())
    if len(labels) < 2:
        raise DataError(f"{root / 'train.csv'} has one class only ({labels[0]}); two are needed")
    return MIKELS_CLASSES if set(labels) == set(MIKELS_CLASSES) else tuple(labels)


def read_label_map(file: Path) -> tuple[str, ...]:
    """The classes of a label map by their numbers; raises ``DataError`` where it is malformed."""
    try:
        # as pairs, because a name that stands there twice would overwrite itself
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    pairs = [p for p in content if isinstance(p, tuple)] if isinstance(content, list) else []
    names, numbers = [name for name, _ in pairs], [number for _, number in pairs]
    wanted = '{"first class": 0, "second class": 1, ...}, numbered from 0 without gaps'
    if not pairs or len(pairs) < len(content) or any(type(n) is not int for n in numbers):
        raise DataError(f"{file} must be an object {wanted}")
    if sorted(numbers) != list(range(len(numbers))) or len(numbers) < 2:
        raise DataError(f"{file} must be {wanted}; it has the numbers {sorted(numbers)}")
    odd = [name for name in names if name != name.strip() or not name or names.count(name) > 1]
    if odd:
        raise DataError(
            f"{file} has the class name {odd[0]!r}, which is blank, twice there, or has spaces "
            "around it; correct it"
        )
    return tuple(name for _, name in sorted(zip(numbers, names, strict=True)))


# %% [markdown]
# A label that is not among the classes, a path that is listed twice, a class that training never
# sees: each is an error that names the row.


# %%
def make_split(
    name: str, root: Path, images_root: Path, table: pd.DataFrame, classes: Sequence[str]
) -> Split:
    """A `Split` from the table of its CSV; raises ``DataError`` for a label not in `classes`."""
    file = root / f"{name}.csv"
    number = {label: i for i, label in enumerate(classes)}
    unknown = table.loc[~table["label"].isin(list(number))]
    if len(unknown):
        row, label = unknown.iloc[0][["row", "label"]]
        raise DataError(
            f"{file} row {row} has the unknown label {label!r} ({len(unknown)} such rows); "
            f"known: {', '.join(classes)}. Correct the row, or add the class to label_map.json"
        )
    labels = np.array([number[label] for label in table["label"]], dtype=np.int64)
    rows = np.array(table["row"], dtype=np.int64)
    return Split(name, file, images_root, table["path"].tolist(), labels, rows)


def refuse_repeated_paths(splits: Mapping[str, Split]) -> None:
    """Raise ``DataError`` if a path occurs twice, in one split or in two."""
    seen: dict[str, tuple[Split, int]] = {}
    for split in splits.values():
        for i, listed in enumerate(split.files):
            file = posixpath.normpath(listed)  # a/./b.jpg is a/b.jpg
            if file in seen:
                other, j = seen[file]
                raise DataError(
                    f"{split.where(i)} is listed already in {other.where(j)}; remove one of the "
                    "two: an image in two splits is tested on what it was trained on"
                )
            seen[file] = (split, i)


def refuse_untaught_classes(train: Split, classes: Sequence[str]) -> None:
    """Raise ``DataError`` if a class has no image in `train`."""
    counts = np.bincount(train.labels, minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        raise DataError(
            f"{train.csv} has no usable image of {', '.join(absent)}, which cannot be learnt then; "
            "add some, or remove the class: its rows, and its entry in label_map.json"
        )


# %% [markdown]
# #### Decoding one image, whatever it is
#
# Real collections hold phone photographs that carry their rotation in a tag, transparent PNGs,
# printers' CMYK, 16-bit scans, half-downloaded files. Every good one becomes the same thing: a
# square of 8-bit RGB. Every bad one becomes an `ImageError` that says why. The content decides what
# a file is, not its name, and only formats that photographs come in are tried: Pillow also knows
# some that run other programs, and some that almost any bytes could pass for. The limits on bytes
# and pixels bound what an honest image takes to decode, to 2.5 GB; one made to deceive can take
# more.

# %%
MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
DECODER_VERSION = 1  # raise it whenever the pixels change: older caches are then left alone
IMAGE_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"),
    "HEIF",  # if a plug-in for it is registered
)


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
        raise ImageError(getattr(error, "strerror", None) or str(error)) from error


# %% [markdown]
# Pillow notices most damage by itself, with two exceptions that leave the right length and a wrong
# picture, as an interrupted download into reserved space does: it skips the checksums of a PNG's
# pixels, and a JPEG decoder takes a tail of zero bytes for pixels. So both are looked for.


# %%
def refuse_damage(data: bytes, image: Image.Image) -> None:
    """Raise for damage to the bytes of an opened PNG or JPEG that decoding would not notice."""
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
            again.verify()
    if image.format in ("JPEG", "MPO") and data.endswith(b"\0\0"):
        start = data.rfind(b"\xff\xda")  # the last scan; "\xff\xd9" ends the image
        if data.find(b"\xff\xd9", start) < 0:
            raise ImageError("truncated: it ends in zero bytes instead of the end of the image")


# %% [markdown]
# The colours: 16-bit greyscale needs care, because Pillow's own conversion turns nearly all of it
# white; transparency is laid over white paper, as a browser does.


# %%
def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode; transparency is laid over white.

    Raises:
        ImageError: for pixels that have no agreed range (floating-point, 32-bit integers).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("floating-point pixels; save it as 8- or 16-bit")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageError("32-bit pixels; save it as 8- or 16-bit")
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        grey = (values >> 8 if wide else values).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(paper, layered).convert("RGB")
    return image.convert("RGB")


# %% [markdown]
# The geometry. Two guards keep a hostile file from filling the memory: its size is read from the
# header before a pixel is, and the centre square is cut *while* resizing, so a 50,000-pixel-wide
# strip never becomes a larger one. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, though
# never below 1.5 times the size wanted: twice as fast, and within one grey level on average.


# %%
def decode_image(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode `data` to its upright, antialiased centre square, uint8 [size, size, 3].

    Raises:
        ImageError: if the bytes are no usable image.
    """
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ImageError(f"{width}x{height} pixels; the limit is {MAX_IMAGE_PIXELS:,}")
            refuse_damage(data, image)
            reduced = image.draft("RGB", (size * 3 // 2, size * 3 // 2))
            image.load()
            # a fraction of 307 pixels ends inside the last pixel: 38.4 of 39
            extent = reduced[1][2:] if reduced else image.size
            square = centre_square(image, extent, size)
            return np.asarray(turn_upright(as_rgb(square), image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of no format that is read here") from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ImageError(f"{type(error).__name__}: {error}") from error


def centre_square(image: Image.Image, extent: tuple[float, float], size: int) -> Image.Image:
    """The largest centred square of the first `extent` pixels, resized to `size` x `size`."""
    if image.mode not in ("RGB", "L", "RGBA", "LA") or "transparency" in image.info:
        image = as_rgb(image)  # what is left can be interpolated, alpha included
    side = min(extent)
    left, top = (extent[0] - side) / 2, (extent[1] - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


# %%
UPRIGHT_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(square: Image.Image, source: Image.Image) -> Image.Image:
    """`square` as the EXIF orientation of `source` wants it seen; unreadable EXIF turns nothing.

    ``ImageOps.exif_transpose`` would copy whole images and fail on broken EXIF data.
    """
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the picture itself is good
        return square
    turn = UPRIGHT_TURNS.get(orientation) if isinstance(orientation, int) else None
    return square if turn is None else square.transpose(turn)
