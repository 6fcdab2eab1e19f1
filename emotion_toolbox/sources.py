"""Recognise and read what ``prepare`` is given: folders, tables, archives, EmoSet, FER2013."""

import importlib
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emotion_toolbox.decoding import image_suffixes
from emotion_toolbox.errors import DataError
from emotion_toolbox.files import absolute, in_threads
from emotion_toolbox.prepare import (
    SPLIT,
    SPLIT_WORDS,
    WHERE,
    Source,
    is_litter,
    read_class_folders,
    split_of,
)
from emotion_toolbox.tables import SPLITS, Records, check_records, find_image, read_csv_records

SPLIT_COLUMNS = {"split", "set", "subset", "usage", "partition", "fold", "phase", "stage"}
YES, NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
CSVS = (".csv", ".tsv", ".txt")
HUGGING_FACE = (".csv", ".jsonl", ".parquet")
TABLES = (*CSVS, ".jsonl", ".ndjson", ".parquet")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
MAX_UNPACKED = 500 * 10**9  # bytes
MAX_RATIO = 100  # unpacked to packed, from SMALL on; photographs have about 1
SMALL = 10**8  # bytes
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
Entry = tuple[str, int, str, Callable[[], Any]]  # name, bytes, what is wrong, opens it
Rows = Iterator[tuple[int, dict[str, Any]]]  # line or number, and content
FER2013 = dict(enumerate(("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")))
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
    source: Path, images: Path, *, images_root: Path | None = None, attributes: bool = True
) -> Source:
    """Recognise what `source` is and read it.

    Args:
        images: folder to make for images that are in a table or an archive, not in files.
        images_root: folder that the paths of a table start from (default: the table's own).
        attributes: whether to read EmoSet's annotation files.

    Raises:
        DataError: naming the file, the row and the fix.
    """
    source = absolute(source)
    if source.is_file() and source.suffix.lower() in TABLES:
        if source.suffix.lower() in CSVS and has_pixels(records := read_csv_records(source)):
            return read_fer2013(source, records, images)
        return read_tables({source: absolute(images_root or source.parent)}, images)
    if images_root is not None:
        raise DataError(f"--images-root is for a table, and {source} is none; leave it out")
    if source.is_file() and source.name.lower().endswith(ARCHIVES):
        return read_archive(source, images, attributes=attributes)
    if source.is_file():
        raise DataError(
            f"{source} is neither a folder nor a table ({', '.join(TABLES)}) nor an archive "
            f"({', '.join(ARCHIVES)}); if it is another archive, unpack it first"
        )
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a folder, a table or an archive")
    if is_emoset(source):
        return read_emoset(source, attributes=attributes)
    refuse_near_emoset(source)
    if tables := find_tables(source):
        return read_tables({table: table.parent for table in tables}, images)
    if all((source / f"{split}.csv").is_file() for split in SPLITS):
        raise DataError(f"{source} is in the notebook's form already; set DATA_ROOT to it")
    return read_class_folders(source)


def is_emoset(root: Path) -> bool:
    """Whether `root` looks like the official EmoSet-118K folder."""
    lists = any((root / f"{name}.json").is_file() for name in ("info", *SPLITS))
    return lists or all((root / name).is_dir() for name in ("image", "annotation"))


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


def find_tables(root: Path) -> list[Path]:
    """The tables in `root` that Hugging Face's names say list its images, the splits apart or not.

    See huggingface.co/docs/datasets, ImageFolder and "Structure your repository".
    """
    for pattern in ("metadata.*", "*/metadata.*", "*.parquet", "data/*.parquet"):
        files = [file for file in sorted(root.glob(pattern)) if file.suffix in HUGGING_FACE]
        if pattern.startswith("*/"):
            files = [file for file in files if split_of(file.parent.name)]
        if files:
            return files
    return []


def read_tables(starts: Mapping[Path, Path], images: Path) -> Source:
    """Read tables with a path and a label column, and give all their rows.

    Args:
        starts: the tables, and where the paths in each start. One of several may be called after
            its split, or lie in a folder that is; else it may have a column that says it.
        images: folder to make for images that are in the tables.
    """
    parts = []
    for file, start in starts.items():
        table = check_records(file, read_records(file, images / file.stem))
        table[WHERE] = [f"{file} row {line}" for line in table.pop("row")]
        named = split_of(file.stem) or split_of(file.parent.name)
        table[SPLIT] = take_splits(table) or (named if len(starts) > 1 else "") or "train"
        found = [start / find_image(start, path) for path in table["path"]]
        table["path"] = [os.path.normpath(path) for path in found]
        parts.append(table)
    table = pd.concat(parts, ignore_index=True).fillna("")
    for root in (images, Path(os.path.commonpath(starts.values()))):
        if all(Path(path).is_relative_to(root) for path in table["path"]):
            break
    else:
        root = common_folder(table["path"].tolist())
    table["path"] = [Path(path).relative_to(root).as_posix() for path in table["path"]]
    refuse_repeats(table)
    return Source("table", next(iter(starts)), root, table)


def read_records(file: Path, images: Path) -> Records:
    """The records of a table of any kind; images in it are written into the folder `images`."""
    if file.suffix.lower() in CSVS:
        return read_csv_records(file)
    rows = read_parquet(file) if file.suffix.lower() == ".parquet" else read_jsonl(file)
    texts = [
        (line, {name: as_text(value, images / f"{line:07d}") for name, value in row.items()})
        for line, row in rows
    ]
    names = list(dict.fromkeys(name for _, row in texts for name in row))
    return [(1, names), *((line, [row.get(name, "") for name in names]) for line, row in texts)]


def as_text(value: Any, image: Path) -> str:
    """`value` as it would stand in a CSV; an image, {bytes, path}, is written to `image`."""
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        data, value = value["bytes"], value["path"]
        if isinstance(data, bytes):
            suffix = PurePosixPath(value or "").suffix.lower()
            value = image.with_suffix(suffix if suffix in image_suffixes() else "")
            value.parent.mkdir(parents=True, exist_ok=True)
            value.write_bytes(data)
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def read_jsonl(file: Path) -> Rows:
    """Line and content of each row of JSON lines; raises ``DataError`` for what is no object."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{file} row {number} is not a JSON object ({error}); correct or remove it"
                ) from error
            yield number, row


def read_parquet(file: Path) -> Rows:
    """Number and content of each row; Hugging Face's numbers of classes become their names.

    Raises:
        DataError: without pyarrow, or if the file is damaged.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet").ParquetFile(file)
        notes = json.loads((parquet.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
        names = {
            name: dict(enumerate(kind["names"]))
            for name, kind in notes.get("info", {}).get("features", {}).items()
            if isinstance(kind, dict) and "names" in kind
        }
        rows = (row for batch in parquet.iter_batches(256) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, row | {name: known.get(row.get(name)) for name, known in names.items()}
    except ImportError as error:
        raise DataError(f"{file} needs pyarrow: pip install pyarrow") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def refuse_repeats(table: pd.DataFrame) -> None:
    """Raise ``DataError`` if two rows of `table` have one path, as the source has it."""
    again = table.loc[table["path"].duplicated()]
    if len(again):
        row = again.iloc[0]
        first = table.loc[table["path"] == row["path"]].iloc[0]
        raise DataError(
            f"{row[WHERE]} lists {row['path']} again, after {first[WHERE]}; remove one of the two"
        )


def take_splits(table: pd.DataFrame) -> list[str] | None:
    """The split of every row, whose columns are taken out of the table; None if it has none.

    They are one whose name says so, in any case; flags as `is_train`, 1 or 0; or one with names of
    splits. Raises ``DataError`` if such a column says it of some rows only.
    """
    others = [c for c in table.columns if c not in ("path", "label", WHERE)]
    values = {c: table[c].str.strip().str.lower() for c in others}
    flags = [c for c in others if flag_of(c) and set(values[c]) <= YES | NO]
    if not (chosen := [c for c in others if SPLIT_COLUMNS & set(re.findall("[a-z]+", c.lower()))]):
        chosen = [c for c in others if values[c].map(SPLIT_WORDS).nunique() > 1]
    if not (chosen := chosen or [c for c in others if table[c].map(split_of).ne("").all()]):
        return flag_splits(table, flags) if flags else None
    given = table.pop(chosen[0])
    splits = given.map(split_of)
    if (bad := splits == "").any():
        raise DataError(
            f"{table.loc[bad, WHERE].iloc[0]} has the split {given[bad].iloc[0]!r} in the column "
            f"{chosen[0]}; write train, val or test, or rename the column"
        )
    return splits.tolist()


def flag_of(column: str) -> str:
    """The split that a flag called `column` marks: train for `train` or `is_train`; else ""."""
    name = column.lower()
    return "" if name == "valid" else SPLIT_WORDS.get(re.sub("^(is|in)_?", "", name), "")


def flag_splits(table: pd.DataFrame, flags: Sequence[str]) -> list[str]:
    """The splits that columns such as `is_train` and `is_test`, 1 or 0, say; taken out of `table`.

    Rows with 0 are in the test split, or in train where a column says what is in test.
    """
    named = {flag_of(c): table.pop(c).str.strip().str.lower().isin(YES) for c in flags}
    rest = next((split for split in ("train", "test", "val") if split not in named), "")
    splits = []
    for where, *row in zip(table[WHERE], *named.values(), strict=True):
        found = [split for split, yes in zip(named, row, strict=True) if yes] or [rest]
        if len(found) > 1 or not found[0]:
            raise DataError(
                f"{where} is in {' and '.join(filter(None, found)) or 'no split'}, by "
                f"{', '.join(flags)}; mark one"
            )
        splits += found
    return splits


def common_folder(files: Sequence[str]) -> Path:
    """The folder that all `files` lie in."""
    try:
        return Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    except ValueError as error:
        raise DataError("the images lie on several drives; bring them onto one") from error


def has_pixels(records: Records) -> bool:
    """Whether a table holds its images as numbers, as FER2013 does."""
    return "pixels" in (name.strip().lower() for name in records[0][1])


def read_fer2013(csv: Path, records: Records, images: Path) -> Source:
    """Read FER2013's ``emotion,pixels[,Usage]``: 48 x 48 grey, written into `images` as PNG.

    Goodfellow et al., "Challenges in Representation Learning", 2013, arxiv.org/abs/1307.0414.
    """
    header = [name.strip().lower() for name in records[0][1]]
    if "emotion" not in header:
        raise DataError(f"{csv} has pixels but no column emotion; it has {', '.join(header)}")
    rows = []
    for line, values in records[1:]:
        try:
            row = dict(zip(header, values, strict=True))
            label = FER2013[int(row["emotion"])]
            pixels = np.array(row["pixels"].split(), dtype=np.uint8).reshape(48, 48)
        except (ValueError, LookupError, OverflowError) as error:
            raise DataError(f"{csv} row {line} is no emotion 0 to 6 with 48 x 48 pixels") from error
        path = f"{label}/{line:05d}.png"
        (images / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(images / path)
        rows.append(row | {"path": path, "label": label, WHERE: f"{csv} row {line}"})
    table = pd.DataFrame(rows).drop(columns=["emotion", "pixels"])
    table[SPLIT] = take_splits(table) or "train"
    return Source("FER2013", csv, images, table)


# --- archives -----------------------------------------------------------------------------------


def read_archive(archive: Path, images: Path, *, attributes: bool) -> Source:
    """Unpack `archive` into `images` and read that as any folder; messages name the archive."""
    unpack(archive, images)
    inner = images
    while len(below := [p for p in inner.iterdir() if not is_litter(p.name)]) == 1:
        if not below[0].is_dir():
            break
        inner = below[0]
    try:
        source = read_source(inner, images, attributes=attributes)
    except DataError as error:
        raise DataError(str(error).replace(str(images), str(archive))) from error
    where = source.table[WHERE].str.replace(str(images), str(archive), regex=False)
    return replace(source, origin=archive, table=source.table.assign(**{WHERE: where}))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar file, compressed or not, into the new `folder`.

    Raises:
        DataError: for a damaged file, one that needs a password, a path that leads out of the
            folder, a link or a device, and for more than MAX_UNPACKED or MAX_RATIO allow.
    """
    entries = zip_entries if archive.suffix.lower() == ".zip" else tar_entries
    limit = min(MAX_UNPACKED, max(SMALL, MAX_RATIO * archive.stat().st_size))
    size = 0
    folder.mkdir(parents=True)
    try:
        for name, length, fault, read in entries(archive):
            path, size = PureWindowsPath(name), size + length  # it knows both kinds of slashes
            if path.anchor or ".." in path.parts:
                fault = "leads out of its folder"
            if size > limit:
                fault = f"makes it more than {limit / 1e9:g} GB, as a decompression bomb would"
            if fault:
                raise DataError(f"{archive}: {name!r} {fault}; nothing is unpacked")
            target = folder.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with read() as packed, target.open("xb") as file:
                shutil.copyfileobj(packed, file)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, *BROKEN) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); is it whole?") from error


def zip_entries(archive: Path) -> Iterator[Entry]:
    """The files in a .zip."""
    with zipfile.ZipFile(archive) as packed:
        for entry in packed.infolist():
            fault = "needs a password; unpack it first" if entry.flag_bits & 1 else ""
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                fault = "is a link or a device"
            if fault or not entry.is_dir():
                yield entry.filename, entry.file_size, fault, partial(packed.open, entry)


def tar_entries(archive: Path) -> Iterator[Entry]:
    """The files in a .tar, compressed or not."""
    with tarfile.open(archive) as packed:
        for entry in packed:
            fault = "" if entry.isreg() else "is a link or a device"
            if not entry.isdir():
                yield entry.name, entry.size, fault, partial(packed.extractfile, entry)
