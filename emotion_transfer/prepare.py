"""``python -m emotion_transfer.prepare SOURCE``: write the data folder that the notebook reads.

SOURCE is the official EmoSet-118K folder, a tree of class folders, or a CSV. What is written is
described in ``data/README.md``: train.csv, val.csv, test.csv, label_map.json and stats.json.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from emotion_transfer.config import EnhancedConfig, project_root, resolve_path
from emotion_transfer.data import LABEL_COLUMNS, PATH_COLUMNS, SPLITS, DataError
from emotion_transfer.sample import MIKELS_CLASSES, summarise_sizes, write_split_tables

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".ppm",
        ".pgm",
    ]
)
SPLIT_ALIASES = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}
# column written -> keys it may have in an annotation file (the paper says scene type, the files scene)
ATTRIBUTES = {
    "brightness": ("brightness",),
    "colorfulness": ("colorfulness",),
    "scene_type": ("scene_type", "scene"),
    "object": ("object",),
    "facial_expression": ("facial_expression",),
    "human_action": ("human_action",),
}
SHARES = (0.80, 0.05, 0.15)  # of train, val and test; EmoSet's own
WRITTEN = ("val.csv", "test.csv", "label_map.json", "stats.json", "train.csv")  # train.csv last
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


# --- reading a source ---------------------------------------------------------------------------


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
    if source.is_file():
        hint = "unpack it first" if source.suffix.lower() in (".zip", ".tar", ".gz") else ""
        raise DataError(f"{source} is neither a folder nor a .csv file; {hint or 'give one'}")
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give a folder or a .csv file")
    if any((source / f"{name}.json").is_file() for name in ("info", *SPLITS)):
        return read_emoset(source, attributes=attributes)
    return read_class_folders(source)


def read_emoset(root: Path, *, attributes: bool = True) -> Source:
    """Read the official EmoSet-118K folder (github.com/JingyuanYY/EmoSet).

    A row of `train|val|test.json` has three fields in the published archive (label, image,
    annotation) and four in its README (label, id, image, annotation); both are read.
    """
    missing = [name for name in ("info.json", *(f"{s}.json" for s in SPLITS), "image")
               if not (root / name).exists()]  # fmt: skip
    if missing:
        raise DataError(
            f"{root} looks like EmoSet-118K but lacks {', '.join(missing)}; unpack the whole archive "
            "(info.json is also in the repository github.com/JingyuanYY/EmoSet)"
        )
    numbers = _emoset_labels(root / "info.json")
    records = []
    for split in SPLITS:
        file = root / f"{split}.json"
        rows = _load_json(file)
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{file} must hold a list of rows and has none; unpack it again")
        for number, row in enumerate(rows, start=1):
            records.append((*_emoset_row(row, f"{file} row {number}", numbers), split))
    columns = ["label", "path", "annotation", WHERE, SPLIT]
    table = pd.DataFrame(records, columns=columns)
    files, places = table.pop("annotation").tolist(), table[WHERE].tolist()
    if attributes:
        items = [(root / file, place) for file, place in zip(files, places, strict=True)]
        found = in_threads(read_attributes, items, "reading attributes")
        table[list(ATTRIBUTES)] = pd.DataFrame(found, columns=list(ATTRIBUTES), dtype=str)
    classes = tuple(sorted(numbers, key=numbers.__getitem__))
    return _checked(Source("EmoSet-118K", root, root, table, classes))


def _emoset_labels(info: Path) -> dict[str, int]:
    """The `label2idx` of the emotions in info.json."""
    content = _load_json(info)
    try:
        numbers = content["emotion"]["label2idx"]
        if sorted(numbers.values()) == list(range(len(numbers))) and len(numbers) > 1:
            return {str(name): int(number) for name, number in numbers.items()}
    except (TypeError, KeyError, AttributeError):
        pass
    raise DataError(
        f"{info} has no usable emotion.label2idx (labels numbered from 0); take info.json from "
        "github.com/JingyuanYY/EmoSet"
    )


def _emoset_row(row: Any, where: str, known: Mapping[str, int]) -> tuple[str, str, str, str]:
    """Label, image, annotation and `where` of one row, whichever order the two files come in."""
    if not isinstance(row, list) or len(row) not in (3, 4) or not all(type(f) is str for f in row):
        have = f"{len(row)} fields" if isinstance(row, list) else type(row).__name__
        raise DataError(
            f"{where} has {have}, not three (label, image, annotation) or four texts (label, id, "
            "image, annotation); correct or remove it"
        )
    label, paths = row[0], [field.replace("\\", "/") for field in row[1:]]
    if label not in known:
        raise DataError(
            f"{where} has the unknown label {label!r}; info.json knows {', '.join(known)}"
        )
    notes = [p for p in paths if p.lower().endswith(".json")]
    images = [p for p in paths if Path(p).suffix.lower() in IMAGE_SUFFIXES]
    if len(notes) != 1 or len(images) != 1:
        raise DataError(
            f"{where} should name one image and one .json annotation but has {row[1:]}; correct it"
        )
    return label, images[0], notes[0], where


def read_attributes(item: tuple[Path, str]) -> list[str]:
    """The six attributes in an annotation file as text; "" where absent, objects joined by "|"."""
    file, where = item
    try:
        content = _load_json(file)
    except DataError as error:
        raise DataError(f"{where}: {error} (or leave attributes out: --no-attributes)") from error
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


def read_class_folders(root: Path) -> Source:
    """Read `root/<class>/**` or `root/<split>/<class>/**`, whatever lies deeper in a class folder."""
    folders = visible_folders(root)
    splits = {f: SPLIT_ALIASES[f.name.lower()] for f in folders if f.name.lower() in SPLIT_ALIASES}
    if "train" not in splits.values():
        splits = {}
    if len(set(splits.values())) < len(splits):
        names = ", ".join(f.name for f in splits)
        raise DataError(f"{root} has two folders for one split ({names}); rename or merge them")
    if splits and (strays := [f for f in folders if f not in splits and any(images_under(f))]):
        raise DataError(
            f"{strays[0]} lies beside train/ but is neither val (valid, validation) nor test; move "
            "its images into one of them, or away"
        )
    records = [
        (path.relative_to(root).as_posix(), folder.name, split, str(path))
        for top, split in (splits.items() if splits else [(root, "")])
        for folder in class_folders(top)
        for path in images_under(folder)
    ]
    if not records:
        _refuse_without_images(root)
    table = pd.DataFrame(records, columns=["path", "label", SPLIT, WHERE])
    classes = order_of(table.loc[table[SPLIT].isin(["", "train"]), "label"])
    if len(classes) < 2 and (root / "train.csv").is_file():
        raise DataError(f"{root} is in the notebook's form already: set DATA_ROOT to it")
    return _checked(Source("class folders", root, root, table, classes))


def _refuse_without_images(root: Path) -> None:
    if all((root / f"{split}.csv").is_file() for split in SPLITS):
        raise DataError(f"{root} is in the notebook's form already: set DATA_ROOT to it")
    raise DataError(
        f"{root} holds no images in class folders; expected {root.name}/<class>/*.jpg, "
        f"{root.name}/train/<class>/*.jpg, or the EmoSet-118K folder (info.json, train.json, ...)"
    )


def class_folders(top: Path) -> list[Path]:
    """The class folders in `top`; images that lie beside them are an error."""
    loose = [p for p in top.iterdir() if p.is_file() and _is_image(p)]
    if loose:
        raise DataError(
            f"{min(loose)} lies in no class folder; move it into the folder of its class"
        )
    return visible_folders(top)


def visible_folders(top: Path) -> list[Path]:
    """Folders in `top`, by name, without hidden ones and the litter of archives."""
    skip = (".", "__MACOSX")
    return sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith(skip))


def images_under(top: Path) -> Iterable[Path]:
    """Every image file in `top` and below, in a fixed order."""
    for folder, below, names in os.walk(top):
        below.sort()
        yield from (p for name in sorted(names) if _is_image(p := Path(folder, name)))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_csv_source(csv: Path, base: Path) -> Source:
    """Read a CSV with a path and a label column and, if it has one, a `split` column.

    Relative paths start at `base`. Other columns are kept. Line 1 is the header, as editors count.
    """
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{csv} cannot be read as a UTF-8 CSV file: {reason}") from error
    chosen = {}
    for name, accepted in (("path", PATH_COLUMNS), ("label", LABEL_COLUMNS)):
        found = [c for c in accepted if c in table.columns]
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
    table[SPLIT] = _split_column(table)
    full = [os.path.normpath(base / path.replace("\\", "/")) for path in table["path"]]
    root = base if all(Path(f).is_relative_to(base) for f in full) else _common_folder(full)
    table["path"] = [Path(f).relative_to(root).as_posix() for f in full]
    classes = order_of(table.loc[table[SPLIT].isin(["", "train"]), "label"])
    return _checked(Source("CSV", csv, root, table, classes))


def _split_column(table: pd.DataFrame) -> pd.Series:
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
        return Path(os.path.commonpath([os.path.dirname(f) for f in files]))
    except ValueError as error:  # several drives
        raise DataError("the images lie on several drives; bring them onto one") from error


def order_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The official order where the labels are Mikels' eight, alphabetical otherwise."""
    names = set(labels)
    return MIKELS_CLASSES if names == set(MIKELS_CLASSES) else tuple(sorted(names))


def _checked(source: Source) -> Source:
    """`source`, if no path occurs twice, no label is new after training and there are two classes."""
    table = source.table
    if len(source.classes) < 2:
        have = ", ".join(source.classes) or "none"
        raise DataError(
            f"{source.origin} has fewer than two classes ({have}); give the folder whose subfolders "
            "are the classes, or a CSV with at least two labels"
        )
    unknown = table.loc[~table["label"].isin(list(source.classes))]
    if len(unknown):
        row = unknown.iloc[0]
        raise DataError(
            f"{row[WHERE]} has the label {row['label']!r}, which no training image has "
            f"({len(unknown)} such images); known: {', '.join(source.classes)}"
        )
    again = table.loc[table["path"].duplicated()]
    if len(again):
        row = again.iloc[0]
        first = table.loc[table["path"] == row["path"]].iloc[0]
        raise DataError(
            f"{row[WHERE]} lists {row['path']} again, after {first[WHERE]}; remove one of the two"
        )
    return source


# --- splitting ----------------------------------------------------------------------------------


def assign_splits(source: Source, shares: Sequence[float], seed: int) -> tuple[pd.DataFrame, str]:
    """The table with every SPLIT filled, and how that came about in words.

    A source with no split at all is divided by `shares`; where only val lacks, it is taken out of
    the training images. Both are stratified by label. Byte-identical images stay in one split.

    Raises:
        DataError: if the test split lacks, or a class is too small to be in every split.
    """
    table = source.table.copy()
    given = set(table[SPLIT])
    train, val, test = (share / sum(shares) for share in shares)
    if given == set(SPLITS):
        return table, "as given by the source"
    if given == {""}:
        table[SPLIT] = split_rows(source, table, {"test": test, "val": val}, seed)
        return (
            table,
            f"made here, stratified by label, {train:.0%}/{val:.0%}/{test:.0%}, seed {seed}",
        )
    if given == {"train", "test"}:
        rows = table.loc[table[SPLIT] == "train"]
        share = val / (train + val)
        table.loc[rows.index, SPLIT] = split_rows(source, rows, {"val": share}, seed)
        return table, f"train and test as given; {share:.1%} of train made val here, seed {seed}"
    lacking = ", ".join(sorted(set(SPLITS) - given))
    raise DataError(
        f"{source.origin} has no images for {lacking}; add them, or give one unsplit set and let it "
        "be split here"
    )


def split_rows(
    source: Source, rows: pd.DataFrame, parts: Mapping[str, float], seed: int
) -> "pd.Series[str]":
    """Take each of `parts` (name: share of all rows) out of `rows`; what is left is "train"."""
    twins = identical_images([source.images_root / path for path in rows["path"]])
    leaders = np.flatnonzero(twins == np.arange(len(rows)))
    labels = rows["label"].to_numpy(dtype=str)
    names = np.full(len(rows), "train", dtype=object)
    rest = leaders
    for part, share in parts.items():
        wanted = round(share * len(leaders))
        try:
            rest, taken = train_test_split(
                rest, test_size=wanted, stratify=labels[rest], random_state=seed
            )
        except ValueError as error:
            raise _too_few(source, labels[leaders], part, str(error)) from error
        names[taken] = part
        if absent := sorted(set(labels) - set(labels[taken])):
            raise _too_few(source, labels[leaders], part, f"none of {absent[0]} would be in {part}")
    return pd.Series(names[twins], index=rows.index)


def _too_few(source: Source, labels: Any, part: str, reason: str) -> DataError:
    smallest = pd.Series(labels).value_counts().sort_index().sort_values(kind="stable")
    return DataError(
        f"{source.origin}: too few images to split by label ({reason.rstrip('.')}). The smallest "
        f"class, {smallest.index[0]}, has {smallest.iloc[0]} distinct images; add some, remove the "
        f"class, or give {part} a larger share, e.g. --split 70 15 15"
    )


def identical_images(paths: Sequence[Path]) -> Any:
    """For each file the position of the first one with the same bytes: int array [N].

    Only files that agree in length and in their first 16 KiB are read to the end.
    """

    def first_bytes(path: Path) -> tuple[int, bytes]:
        try:
            with path.open("rb") as file:
                head = file.read(16384)
                return os.fstat(file.fileno()).st_size, hashlib.sha256(head).digest()
        except OSError:  # missing or unreadable: reported with the others, later
            return -1, str(path).encode()

    def all_bytes(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    starts = in_threads(first_bytes, paths, "looking for identical images")
    counts = pd.Series(starts).value_counts()
    shared = [i for i, start in enumerate(starts) if counts[start] > 1 and start[0] > 16384]
    ends = dict(zip(shared, in_threads(all_bytes, [paths[i] for i in shared], ""), strict=True))
    first: dict[Any, int] = {}
    keys = [(start, ends.get(i)) for i, start in enumerate(starts)]
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)


# --- looking at the images ----------------------------------------------------------------------


def in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """`function` of every item, in order, from a pool of threads; a bar where `title` says so."""
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = pool.map(function, items)
        silent = (
            None if title and len(items) > 1000 else True
        )  # None: only where there is a terminal
        return list(tqdm(results, title, len(items), unit="image", disable=silent))


def image_header(path: Path) -> tuple[int, int] | str:
    """Width and height from the file's header, else why there is none ("missing", ...)."""
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"{type(error).__name__}: {error}"


def look_at_images(
    source: Source, table: pd.DataFrame, *, sizes: bool, skip_missing: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows whose image exists, and what stats.json says of the images.

    An image that exists but has no readable header stays in: the notebook names it, and decides by
    MAX_BAD_FRACTION.

    Raises:
        DataError: if an image is missing, unless `skip_missing`.
    """
    paths = [source.images_root / path for path in table["path"]]
    if sizes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            heads = in_threads(image_header, paths, "reading image sizes")
    else:
        heads = in_threads(lambda p: "" if p.is_file() else "missing", paths, "looking for images")
    missing = [i for i, head in enumerate(heads) if head == "missing"]
    if missing and not skip_missing:
        first = missing[0]
        raise DataError(
            f"{table[WHERE].iloc[first]}: the image {paths[first]} is missing ({len(missing)} of "
            f"{len(table)} are); restore them, or leave them out with --skip-missing"
        )
    bad = [f"{p}: {h}" for p, h in zip(paths, heads, strict=True) if h and isinstance(h, str)]
    bad = [text for text in bad if not text.endswith(": missing")]
    stats: dict[str, Any] = {"left_out_missing": len(missing)}
    if sizes:
        stats["image_sizes"] = summarise_sizes([h for h in heads if isinstance(h, tuple)])
        stats["unreadable_headers"] = {"images": len(bad), "first": bad[:10]}
    keep = np.ones(len(table), dtype=bool)
    keep[missing] = False
    return table.loc[keep], stats


# --- writing ------------------------------------------------------------------------------------


def prepare(
    source: Path,
    output: Path,
    *,
    images: str = "reference",
    images_root: Path | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 42,
    attributes: bool = True,
    sizes: bool = True,
    skip_missing: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the data folder `output` from `source`, and return what its stats.json says.

    Args:
        images: "reference" leaves them where they are, "copy" and "link" (symbolic) bring them to
            `output/images`.
        shares: of train, val and test, in any unit; used only where the source is not split.

    Raises:
        DataError: naming the file, the row and the fix; `output` is then as it was.
    """
    found = read_source(source, images_root=images_root, attributes=attributes)
    output = absolute(output)
    table, how = assign_splits(found, shares, seed)
    table, seen = look_at_images(found, table, sizes=sizes, skip_missing=skip_missing)
    origins, targets, root = place_images(found, table, output, images)
    table = table.assign(path=targets)
    columns = ["path", "label", *(c for c in table if c not in ("path", "label", SPLIT, WHERE))]
    tables = {split: table.loc[table[SPLIT] == split, columns] for split in SPLITS}
    if empty := [split for split in SPLITS if tables[split].empty]:
        raise DataError(f"{found.origin} leaves no image for {', '.join(empty)}; add some")
    refuse_other_set(output, tables, images, overwrite)
    stats = {
        "source": f"{found.kind}: {found.origin}",
        "synthetic": False,
        "images": images,
        "images_root": root,
        "split": how,
        **seen,
    }
    draft = (output if output.exists() else output.parent) / f".prepare-{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        if images != "reference":
            bring_images(origins, [draft / path for path in targets], images)
        write_split_tables(draft, tables, found.classes, stats)
        put_in_place(draft, output)
        written: dict[str, Any] = json.loads((output / "stats.json").read_text(encoding="utf-8"))
        return written
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def place_images(
    found: Source, table: pd.DataFrame, output: Path, images: str
) -> tuple[list[Path], list[str], str]:
    """Where each image is, its path for the CSV, and the folder that these paths start from."""
    origins = [found.images_root / path for path in table["path"]]
    inside = found.images_root.is_relative_to(output)
    if images == "reference":
        if not inside:
            return origins, table["path"].tolist(), found.images_root.as_posix()
        return origins, [p.relative_to(output).as_posix() for p in origins], "."
    if inside or output.is_relative_to(found.images_root):
        raise DataError(
            f"--images {images}: {found.images_root} and {output} lie in one another; leave out "
            "--images, so that the images stay where they are, or choose another --output"
        )
    return origins, [f"images/{path}" for path in table["path"]], "."


def refuse_other_set(
    output: Path, tables: Mapping[str, pd.DataFrame], images: str, overwrite: bool
) -> None:
    """Raise ``DataError`` if `output` holds something that this set would replace unasked."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder as --output")
    there = [name for name in WRITTEN if (output / name).exists()]
    same = all((output / name).exists() for name in WRITTEN) and all(
        (output / f"{split}.csv").read_bytes()
        == table.to_csv(index=False, lineterminator="\n").encode()
        for split, table in tables.items()
    )
    if there and not same and not overwrite:
        raise DataError(
            f"{output} holds another data set already ({', '.join(sorted(there))}); add --overwrite "
            "to replace it, or choose another --output"
        )
    if images != "reference" and (output / "images").exists() and not _brought_here(output):
        raise DataError(
            f"{output / 'images'} was not written by this command; move it away, or choose another "
            "--output"
        )


def _brought_here(output: Path) -> bool:
    """Whether an earlier run copied or linked images into `output`."""
    try:
        stats = json.loads((output / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stats, dict) and stats.get("images") in ("copy", "link")


def bring_images(origins: Sequence[Path], targets: Sequence[Path], images: str) -> None:
    """Copy or link every image; raises ``DataError`` where the disk is too small or cannot link."""
    for folder in sorted({target.parent for target in targets}):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(origins, targets, strict=True))
    if images == "copy":
        needed = sum(in_threads(lambda path: path.stat().st_size, origins, ""))
        free = shutil.disk_usage(targets[0].parent).free
        if needed > free:
            raise DataError(
                f"the copies need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; leave out "
                "--images copy, or use --images link"
            )
        in_threads(lambda pair: shutil.copyfile(*pair), pairs, "copying images")
        return
    try:
        in_threads(lambda pair: pair[1].symlink_to(pair[0]), pairs, "linking images")
    except (OSError, NotImplementedError) as error:
        raise DataError(f"symbolic links do not work here ({error}); use --images copy") from error


def put_in_place(draft: Path, output: Path) -> None:
    """Move what was written to `output`, so that a kill at any moment leaves no mixture of two sets.

    A new folder appears at once. In one that exists train.csv goes first and comes last: without it
    the notebook refuses the folder.
    """
    if not output.exists():
        draft.rename(output)
        return
    (output / "train.csv").unlink(missing_ok=True)
    if (draft / "images").exists():
        if (output / "images").exists():
            (output / "images").rename(draft / "images-before")
        (draft / "images").rename(output / "images")
    for name in WRITTEN:
        (draft / name).replace(output / name)


# --- the command line ---------------------------------------------------------------------------


def absolute(path: Path) -> Path:
    """`path` from the root, with ``~`` expanded and symbolic links left as they are."""
    return Path(os.path.abspath(path.expanduser()))


def overrides_for(output: Path, images_root: str) -> dict[str, str]:
    """What OVERRIDES must say for the notebook to read `output`; nothing for the default folder."""
    home = project_root()

    def shown(folder: Path) -> str:
        inside = folder.is_relative_to(home)
        return (folder.relative_to(home) if inside else folder).as_posix()

    default = str(EnhancedConfig.__dataclass_fields__["DATA_ROOT"].default)
    settings = {} if output == resolve_path(default) else {"DATA_ROOT": shown(output)}
    if images_root != ".":
        settings["IMAGES_ROOT"] = shown(Path(images_root))
    return settings


def describe(stats: Mapping[str, Any], output: Path) -> str:
    """What was written, for people: counts, sizes, and the line for OVERRIDES."""
    counts = pd.DataFrame(stats["counts"])
    counts.loc["all"] = counts.sum()
    lines = [f"{output}", f"from {stats['source']}; splits {stats['split']}", "", str(counts), ""]
    if width := stats.get("image_sizes", {}).get("width"):
        height = stats["image_sizes"]["height"]
        lines.append(
            f"sizes: median {width['median']:g}x{height['median']:g}, from {width['min']} to "
            f"{width['max']} pixels wide and {height['min']} to {height['max']} high"
        )
    if stats["left_out_missing"]:
        lines.append(f"left out: {stats['left_out_missing']} missing images")
    if (bad := stats.get("unreadable_headers", {})).get("images"):
        lines.append(f"warning: {bad['images']} unreadable images, e.g. {bad['first'][0]}")
    settings = overrides_for(output, stats["images_root"])
    lines.append(
        f"In the notebook's parameters cell: OVERRIDES = {json.dumps(settings, ensure_ascii=False)}"
        if settings
        else "The notebook finds it without any setting."
    )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer.prepare",
        description="Write train.csv, val.csv, test.csv, label_map.json and stats.json for the "
        "notebook from EmoSet-118K, from class folders or from a CSV.",
    )
    default = EnhancedConfig.__dataclass_fields__["DATA_ROOT"].default
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help="the EmoSet-118K folder, a folder of class folders (split into train, val, test or "
        "not), or a CSV with a path and a label column",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder to write (default: {default})"
    )
    parser.add_argument(
        "--images", choices=("reference", "copy", "link"), default="reference",
        help="leave the images where they are (default), copy them, or link to them",
    )  # fmt: skip
    parser.add_argument(
        "--images-root", type=Path, metavar="DIR",
        help="where the paths in a CSV start (default: the folder of the CSV)",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), default=(80, 5, 15),
        help="shares for a source that is not split (default: 80 5 15)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of the split (default: 42)")
    parser.add_argument("--no-attributes", action="store_true", help="skip EmoSet's annotations")
    parser.add_argument("--no-sizes", action="store_true", help="do not read the images' headers")
    parser.add_argument("--skip-missing", action="store_true", help="leave out missing images")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the folder was written, 1 with one line on stderr if not."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if min(args.split) <= 0 or not np.isfinite(args.split).all():
        parser.error(f"--split {' '.join(map(str, args.split))}: give three numbers above 0")
    default = str(EnhancedConfig.__dataclass_fields__["DATA_ROOT"].default)
    output = absolute(args.output) if args.output else resolve_path(default)
    try:
        stats = prepare(
            args.source,
            output,
            images=args.images,
            images_root=args.images_root,
            shares=args.split,
            seed=args.seed,
            attributes=not args.no_attributes,
            sizes=not args.no_sizes,
            skip_missing=args.skip_missing,
            overwrite=args.overwrite,
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe(stats, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
