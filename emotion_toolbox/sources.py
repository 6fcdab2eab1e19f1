"""Recognise and read what ``prepare`` is given: EmoSet-118K, class folders, tables, FER2013."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emotion_toolbox.decoding import image_suffixes
from emotion_toolbox.errors import DataError
from emotion_toolbox.files import absolute, in_threads
from emotion_toolbox.prepare import SPLIT, WHERE, Source, read_class_folders, split_of
from emotion_toolbox.tables import SPLITS, read_csv_records, read_table

SPLIT_COLUMNS = ("split", "set", "subset", "usage", "partition", "fold")
FER2013 = dict(enumerate(("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")))
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
# column written -> keys in an annotation file ("scene type" in the paper, `scene` in the files)
ATTRIBUTES = {
    "brightness": ("brightness",),
    "colorfulness": ("colorfulness",),
    "scene_type": ("scene_type", "scene"),
    "object": ("object",),
    "facial_expression": ("facial_expression",),
    "human_action": ("human_action",),
}


def read_source(
    source: Path, *, images_root: Path | None = None, attributes: bool = True
) -> Source:
    """Recognise what `source` is and read it.

    Args:
        images_root: folder that the paths of a table start from (default: the table's own).
        attributes: whether to read EmoSet's annotation files.

    Raises:
        DataError: naming the file, the row and the fix.
    """
    source = absolute(source)
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv", ".txt"):
        header = [name.strip().lower() for name in read_csv_records(source)[0][1]]
        if "pixels" in header:
            return read_fer2013(source)
        return read_csv_source(source, absolute(images_root) if images_root else source.parent)
    if images_root is not None:
        raise DataError(f"--images-root is for a table, and {source} is none; leave it out")
    if source.is_file():
        advice = "; unpack the archive first" if source.suffix.lower() in ARCHIVES else ""
        raise DataError(f"{source} is neither a folder nor a .csv or .tsv file{advice}")
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a folder or a .csv file")
    lists = any((source / f"{name}.json").is_file() for name in ("info", *SPLITS))
    if lists or all((source / name).is_dir() for name in ("image", "annotation")):
        return read_emoset(source, attributes=attributes)
    refuse_near_emoset(source)
    for name in ("metadata.csv",):
        if (source / name).is_file():
            return read_csv_source(source / name, source)
    if all((source / f"{split}.csv").is_file() for split in SPLITS):
        raise DataError(f"{source} is in the notebook's form already; set DATA_ROOT to it")
    return read_class_folders(source)


def refuse_near_emoset(root: Path) -> None:
    """Point to EmoSet's own folder, which has the official splits, where `root` is just off it."""
    below = [folder for folder in root.iterdir() if folder.is_dir()]
    near = [root.parent] if root.name == "image" else sorted(below)
    if found := [f for f in near if all((f / f"{split}.json").is_file() for split in SPLITS)]:
        raise DataError(f"{root} is not EmoSet's own folder, which has the splits; give {found[0]}")


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
    table = pd.DataFrame(records, columns=["path", "label", "annotation", WHERE, SPLIT])
    refuse_repeats(table)
    notes = table.pop("annotation")
    if attributes:
        items = [(root / note, where) for note, where in zip(notes, table[WHERE], strict=True)]
        found = in_threads(read_attributes, items, "reading attributes")
        table[list(ATTRIBUTES)] = pd.DataFrame(found, columns=list(ATTRIBUTES), dtype=str)
    classes = tuple(sorted(numbers, key=numbers.__getitem__))
    return Source("EmoSet-118K", root, root, table, classes)


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
    """Image, label and annotation of one row, whichever order the two files come in."""
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
    images = [path for path in paths if Path(path).suffix.lower() in image_suffixes()]
    if len(notes) != 1 or len(images) != 1:
        raise DataError(
            f"{where} should name one image and one .json annotation and has {row[1:]}; correct it"
        )
    return images[0], label, notes[0]


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


# --- tables -------------------------------------------------------------------------------------


def read_csv_source(csv: Path, base: Path) -> Source:
    """Read a table with a path and a label column and, where it has one, a column of splits.

    Relative paths start at `base`. Other columns are kept.
    """
    table = read_table(csv)
    table[WHERE] = [f"{csv} row {line}" for line in table.pop("row")]
    table[SPLIT] = take_splits(table)
    full = [os.path.normpath(base / path.replace("\\", "/")) for path in table["path"]]
    root = base if all(Path(file).is_relative_to(base) for file in full) else common_folder(full)
    table["path"] = [Path(file).relative_to(root).as_posix() for file in full]
    refuse_repeats(table)
    return Source("CSV", csv, root, table)


def refuse_repeats(table: pd.DataFrame) -> None:
    """Raise ``DataError`` if two rows of `table` have one path, as the source has it."""
    again = table.loc[table["path"].duplicated()]
    if len(again):
        row = again.iloc[0]
        first = table.loc[table["path"] == row["path"]].iloc[0]
        raise DataError(
            f"{row[WHERE]} lists {row['path']} again, after {first[WHERE]}; remove one of the two"
        )


def take_splits(table: pd.DataFrame) -> "pd.Series[str]":
    """Take the column of splits out of the table; "" everywhere where there is none.

    It is one called so, in any case, or any whose values are all names of splits.
    """
    others = [c for c in table.columns if c not in ("path", "label", WHERE)]
    named = [c for c in others if c.lower() in SPLIT_COLUMNS]
    alike = [c for c in others if table[c].map(split_of).ne("").all()]
    if not (chosen := [*named, *alike][:1]):
        return pd.Series("", index=table.index)
    given = table.pop(chosen[0])
    splits = given.str.strip().map(split_of)
    if (bad := splits == "").any():
        raise DataError(
            f"{table.loc[bad, WHERE].iloc[0]} has the split {given[bad].iloc[0]!r} in the column "
            f"{chosen[0]}; write train, val or test, or rename the column"
        )
    return splits


def common_folder(files: Sequence[str]) -> Path:
    """The folder that all `files` lie in."""
    try:
        return Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    except ValueError as error:
        raise DataError("the images lie on several drives; bring them onto one") from error


def read_fer2013(csv: Path) -> Source:
    """Read FER2013's ``emotion,pixels[,Usage]``: 48 x 48 grey, written as PNG files beside it."""
    records = read_csv_records(csv)
    header = [name.strip().lower() for name in records.pop(0)[1]]
    try:
        columns = [header.index(name) for name in ("emotion", "pixels")]
    except ValueError as error:
        raise DataError(f"{csv} has pixels but no column emotion; it has {header}") from error
    usage = header.index("usage") if "usage" in header else None
    folder, rows = csv.with_name(f"{csv.stem}_images"), []
    for line, values in records:
        try:
            label = FER2013[int(values[columns[0]])]
            pixels = np.array(values[columns[1]].split(), dtype=np.uint8).reshape(48, 48)
            split = "" if usage is None else values[usage]
        except (ValueError, LookupError, OverflowError) as error:
            raise DataError(f"{csv} row {line} is no emotion 0 to 6 with 48 x 48 pixels") from error
        path = f"{label}/{line:05d}.png"
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / path)
        rows.append((path, label, split, f"{csv} row {line}"))
    table = pd.DataFrame(rows, columns=["path", "label", "usage", WHERE])
    if usage is None:
        del table["usage"]
    table[SPLIT] = take_splits(table)
    return Source("FER2013", csv, folder, table)
