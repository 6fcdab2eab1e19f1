"""Recognise and read what ``prepare`` is given: EmoSet-118K, class folders, or a CSV."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from tqdm.auto import tqdm

from emotion_transfer.data import LABEL_COLUMNS, PATH_COLUMNS, SPLITS, DataError
from emotion_transfer.sample import MIKELS_CLASSES

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
)
SPLIT_ALIASES = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}
# column written -> keys in an annotation file ("scene type" in the paper, `scene` in the files)
ATTRIBUTES = {
    "brightness": ("brightness",),
    "colorfulness": ("colorfulness",),
    "scene_type": ("scene_type", "scene"),
    "object": ("object",),
    "facial_expression": ("facial_expression",),
    "human_action": ("human_action",),
}
SPLIT, WHERE = "__split", "__where"  # columns used on the way, never written

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Source:
    """Images and labels as found, before anything is decided or written.

    `table` has one row an image: `path` (POSIX, relative to `images_root`), `label`, any extra
    columns, SPLIT ("" where the source does not say) and WHERE (file and row, for messages).
    """

    kind: str
    origin: Path
    images_root: Path
    table: pd.DataFrame
    classes: tuple[str, ...]


def read_source(
    source: Path, *, images_root: Path | None = None, attributes: bool = True
) -> Source:
    """Recognise what `source` is and read it.

    Args:
        images_root: folder that the paths of a CSV start from (default: the CSV's own).
        attributes: whether to read EmoSet's annotation files.

    Raises:
        DataError: naming the file, the row and the fix.
    """
    source = absolute(source)
    if source.is_file() and source.suffix.lower() == ".csv":
        return read_csv_source(source, absolute(images_root) if images_root else source.parent)
    if images_root is not None:
        raise DataError(f"--images-root is for a CSV, and {source} is none; leave it out")
    if source.is_file():
        raise DataError(f"{source} is neither a folder nor a .csv file; unpack an archive first")
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a folder or a .csv file")
    lists = any((source / f"{name}.json").is_file() for name in ("info", *SPLITS))
    if lists or all((source / name).is_dir() for name in ("image", "annotation")):
        return read_emoset(source, attributes=attributes)
    return read_class_folders(source)


# --- the official EmoSet-118K folder ------------------------------------------------------------


def read_emoset(root: Path, *, attributes: bool = True) -> Source:
    """Read the official EmoSet-118K folder (github.com/JingyuanYY/EmoSet).

    A row of `train|val|test.json` has three fields in the published archive (label, image,
    annotation) and four in the repository's README (label, id, image, annotation); both are read.
    """
    needed = ("info.json", *(f"{split}.json" for split in SPLITS), "image")
    if missing := [name for name in needed if not (root / name).exists()]:
        raise DataError(
            f"{root} looks like EmoSet-118K but lacks {', '.join(missing)}; unpack the whole "
            "archive (info.json is also in the repository github.com/JingyuanYY/EmoSet)"
        )
    numbers = _emoset_labels(root / "info.json")
    records = []
    for split in SPLITS:
        file = root / f"{split}.json"
        rows = _load_json(file)
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{file} must hold a list of rows and has none; unpack it again")
        for number, row in enumerate(rows, start=1):
            where = f"{file} row {number}"
            records.append((*_emoset_row(row, where, numbers), where, split))
    table = pd.DataFrame(records, columns=["label", "path", "annotation", WHERE, SPLIT])
    notes = table.pop("annotation")
    if attributes:
        items = [(root / note, where) for note, where in zip(notes, table[WHERE], strict=True)]
        found = in_threads(read_attributes, items, "reading attributes")
        table[list(ATTRIBUTES)] = pd.DataFrame(found, columns=list(ATTRIBUTES), dtype=str)
    classes = tuple(sorted(numbers, key=numbers.__getitem__))
    return _checked(Source("EmoSet-118K", root, root, table, classes))


def _emoset_labels(info: Path) -> dict[str, int]:
    """The `label2idx` of the emotions in info.json."""
    content = _load_json(info)
    try:
        numbers = content["emotion"]["label2idx"]
        if sorted(numbers.values()) == list(range(len(numbers))):
            return {str(name): int(number) for name, number in numbers.items()}
    except (TypeError, KeyError, AttributeError):
        pass
    raise DataError(
        f"{info} has no usable emotion.label2idx (labels numbered from 0); take info.json from "
        "github.com/JingyuanYY/EmoSet"
    )


def _emoset_row(row: Any, where: str, known: Mapping[str, int]) -> tuple[str, str, str]:
    """Label, image and annotation of one row, whichever order the two files come in."""
    if not isinstance(row, list) or len(row) not in (3, 4) or not all(type(f) is str for f in row):
        raise DataError(
            f"{where} should be three texts (label, image, annotation) or four (label, id, image, "
            f"annotation) and is {str(row)[:120]}; correct or remove it"
        )
    label, paths = row[0], [field.replace("\\", "/") for field in row[1:]]
    if label not in known:
        raise DataError(
            f"{where} has the unknown label {label!r}; info.json knows {', '.join(known)}"
        )
    notes = [path for path in paths if path.lower().endswith(".json")]
    images = [path for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES]
    if len(notes) != 1 or len(images) != 1:
        raise DataError(
            f"{where} should name one image and one .json annotation and has {row[1:]}; correct it"
        )
    return label, images[0], notes[0]


def read_attributes(item: tuple[Path, str]) -> list[str]:
    """The six attributes in an annotation file as text; "" where absent, objects joined by "|"."""
    file, where = item
    try:
        content = _load_json(file)
    except DataError as error:
        raise DataError(f"{where}: {error} (or do without: --no-attributes)") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: {file} is not a JSON object; unpack it again")
    values = []
    for keys in ATTRIBUTES.values():
        value = next((content[key] for key in keys if content.get(key) is not None), "")
        values.append("|".join(map(str, value)) if isinstance(value, list) else str(value))
    return values


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; unpack the archive again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}); unpack it again") from error


# --- class folders ------------------------------------------------------------------------------


def read_class_folders(root: Path) -> Source:
    """Read `root/<class>/**` or `root/<split>/<class>/**`, however deep the images lie."""
    _refuse_near_emoset(root)
    folders = visible_folders(root)
    splits = {f: SPLIT_ALIASES[f.name.lower()] for f in folders if f.name.lower() in SPLIT_ALIASES}
    if "train" not in splits.values():
        splits = {}  # then they are classes that happen to be called so
    if double := [f.name for f in splits if list(splits.values()).count(splits[f]) > 1]:
        names = ", ".join(double)
        raise DataError(f"{root} has two folders for one split ({names}); rename or merge them")
    if splits and (strays := [f for f in folders if f not in splits and any(images_under(f))]):
        raise DataError(
            f"{strays[0]} lies beside train/ but is neither val (valid, validation) nor test; move "
            "its images into one of them, or away"
        )
    records = [
        (path.relative_to(root).as_posix(), folder.name, split, str(path))
        for top, split in (splits or {root: ""}).items()
        for folder in class_folders(top)
        for path in images_under(folder)
    ]
    table = pd.DataFrame(records, columns=["path", "label", SPLIT, WHERE])
    source = Source("class folders", root, root, table, order_of(_taught(table)))
    if len(source.classes) < 2 and all((root / f"{split}.csv").is_file() for split in SPLITS):
        raise DataError(f"{root} is in the notebook's form already; set DATA_ROOT to it")
    if table.empty:
        raise DataError(
            f"{root} holds no images in class folders; expected {root.name}/<class>/*.jpg or "
            f"{root.name}/train/<class>/*.jpg, or EmoSet-118K with its info.json"
        )
    return _checked(source)


def _refuse_near_emoset(root: Path) -> None:
    """Point to EmoSet's own folder, which has the official splits, where `root` is just off it."""
    near = [root.parent] if root.name == "image" else visible_folders(root)
    if found := [f for f in near if all((f / f"{split}.json").is_file() for split in SPLITS)]:
        raise DataError(f"{root} is not EmoSet's own folder, which has the splits; give {found[0]}")


def class_folders(top: Path) -> list[Path]:
    """The class folders in `top`; images that lie beside them are an error."""
    loose = [path for path in top.iterdir() if _is_image(path) and path.is_file()]
    if loose:
        raise DataError(
            f"{min(loose)} lies in no class folder; move it into the folder of its class"
        )
    return visible_folders(top)


def visible_folders(top: Path) -> list[Path]:
    """Folders in `top`, by name, without hidden ones and the litter of archives."""
    litter = (".", "__MACOSX")
    return sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith(litter))


def images_under(top: Path) -> Iterable[Path]:
    """Every image file in `top` and below, in a fixed order."""
    for folder, below, names in os.walk(top):
        below.sort()
        yield from (path for name in sorted(names) if _is_image(path := Path(folder, name)))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


# --- a CSV --------------------------------------------------------------------------------------


def read_csv_source(csv: Path, base: Path) -> Source:
    """Read a CSV with a path and a label column and, if it has one, a `split` column.

    Relative paths start at `base`. Other columns are kept. Row 1 is the header, as editors count.
    """
    try:
        table = pd.read_csv(
            csv, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{csv} cannot be read as a UTF-8 CSV file: {reason}") from error
    chosen = {}
    for name, accepted in (("path", PATH_COLUMNS), ("label", LABEL_COLUMNS)):
        found = [column for column in accepted if column in table.columns]
        if not found:
            have = ", ".join(map(str, table.columns))
            raise DataError(f"{csv} has no column {' or '.join(accepted)}; it has: {have}")
        chosen[found[0]] = name
    if table.empty:
        raise DataError(f"{csv} lists no image; give it at least a few rows a class")
    table = table.rename(columns=chosen)
    table[WHERE] = [f"{csv} row {line}" for line in range(2, len(table) + 2)]
    for column in ("path", "label"):
        if (blank := table[column].isna() | (table[column].str.strip() == "")).any():
            raise DataError(f"{table.loc[blank, WHERE].iloc[0]} has no {column}; fill or remove it")
    table[SPLIT] = _take_splits(table)
    full = [os.path.normpath(base / path.replace("\\", "/")) for path in table["path"]]
    root = base if all(Path(file).is_relative_to(base) for file in full) else _common_folder(full)
    table["path"] = [Path(file).relative_to(root).as_posix() for file in full]
    return _checked(Source("CSV", csv, root, table, order_of(_taught(table))))


def _take_splits(table: pd.DataFrame) -> "pd.Series[str]":
    """Take `split` out of the table as train, val or test; "" everywhere where there is none."""
    if "split" not in table.columns:
        return pd.Series("", index=table.index)
    given = table.pop("split")
    splits = given.str.strip().str.lower().map(SPLIT_ALIASES)
    if (bad := splits.isna()).any():
        raise DataError(
            f"{table.loc[bad, WHERE].iloc[0]} has the split {given[bad].iloc[0]!r}; "
            "write train, val or test"
        )
    return splits


def _common_folder(files: Sequence[str]) -> Path:
    try:
        return Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    except ValueError as error:
        raise DataError("the images lie on several drives; bring them onto one") from error


# --- what every source must be ------------------------------------------------------------------


def order_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The official order where the labels are Mikels' eight, alphabetical otherwise."""
    names = set(labels)
    return MIKELS_CLASSES if names == set(MIKELS_CLASSES) else tuple(sorted(names))


def _taught(table: pd.DataFrame) -> "pd.Series[str]":
    """Labels of the rows that are, or may become, training images."""
    return table.loc[table[SPLIT].isin(["", "train"]), "label"]


def _checked(source: Source) -> Source:
    """`source`, if it has two classes, no label that training lacks, and no path twice."""
    table = source.table
    if len(source.classes) < 2:
        have = ", ".join(source.classes) or "none"
        raise DataError(
            f"{source.origin} has fewer than two classes to train on ({have}); give the folder "
            "whose subfolders are the classes, or a CSV with at least two labels"
        )
    unknown = table.loc[~table["label"].isin(list(source.classes))]
    if len(unknown):
        row = unknown.iloc[0]
        raise DataError(
            f"{row[WHERE]} has the unknown label {row['label']!r}, which no training image has "
            f"({len(unknown)} such rows); known: {', '.join(source.classes)}. Correct or remove it"
        )
    again = table.loc[table["path"].duplicated()]
    if len(again):
        row = again.iloc[0]
        first = table.loc[table["path"] == row["path"]].iloc[0]
        raise DataError(
            f"{row[WHERE]} lists {row['path']} again, after {first[WHERE]}; remove one of the two"
        )
    return source


# --- shared with prepare ------------------------------------------------------------------------


def absolute(path: Path) -> Path:
    """`path` from the root, with ``~`` expanded and symbolic links left as they are."""
    return Path(os.path.abspath(path.expanduser()))


def in_threads(function: Callable[[T], R], items: Sequence[T], title: str = "") -> list[R]:
    """`function` of every item, in order, from a pool of threads; with a bar for long work."""
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = pool.map(function, items)
        hidden = None if title and len(items) > 1000 else True  # None: shown on a terminal only
        return list(tqdm(results, title, len(items), unit="image", disable=hidden))
