"""The splits of a data set: reading their tables strictly, and refusing what is wrong."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import posixpath
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from emotion_toolbox.emotions import order_of
from emotion_toolbox.errors import DataError

SPLITS = ("train", "val", "test")
PATH_COLUMNS = (
    *("path", "image_path", "filepath", "file"),
    *("filename", "file_name", "image", "img", "image_name"),
)
LABEL_COLUMNS = ("label", "emotion", "class", "target", "category")
KNOWN_COLUMNS = frozenset({*PATH_COLUMNS, *LABEL_COLUMNS})
MISSING = frozenset(("nan", "null", "none", "na", "n/a", "#n/a", "nil", "<na>", "missing"))
Records = list[tuple[int, list[str]]]  # the lines of a table and their values; the header first


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


def load_splits(
    root: Path,
    images_root: Path | None = None,
    *,
    name: str | None = None,
    synthetic: bool = False,
) -> EmotionData:
    """Read the three splits in `root`, whose paths start at `images_root`.

    Labels that may be one and the same are warned of.

    Raises:
        DataError: for a missing or malformed file, an unknown label, an empty split, or a path
            that occurs twice, or a class without a training image.
    """
    images_root = images_root or prepared_images_root(root)
    missing = [f"{s}.csv" for s in SPLITS if not (root / f"{s}.csv").is_file()]
    if missing:
        raise DataError(
            f"{root} lacks {', '.join(missing)}. Write it with `python -m emotion_transfer prepare "
            f'SOURCE --output {root}`, correct DATA_ROOT, or set DATASET="sample"'
        )
    tables = {s: read_table(root / f"{s}.csv") for s in SPLITS}
    classes = class_order(root, tables["train"])
    splits = {s: make_split(s, root, images_root, tables[s], classes) for s in SPLITS}
    refuse_repeated_paths(splits)
    refuse_untaught_classes(splits["train"], classes)
    data = EmotionData(name or root.name, root, classes, splits, synthetic)
    warn_of_spellings(data.counts().sum(axis="columns"))
    return data


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


def read_table(file: Path) -> pd.DataFrame:
    """A table as text: columns `path`, `label`, `row` (its line), and the others that have names.

    The one reader of the notebook and of ``prepare``. Raises ``DataError`` if it is bad.
    """
    return check_records(file, read_csv_records(file))


def read_csv_records(file: Path) -> Records:
    """What stands in a CSV, without blank lines; raises ``DataError`` if it is unreadable or empty.

    Commas, semicolons or tabs separate the values, with spaces after them or not.
    """
    records: Records = []
    line = 1
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise ValueError("NUL character; is it UTF-16?")
        spaced = re.search(r'[,;\t] +"', text) is not None  # else a path may begin with a space
        options: dict[str, Any] = {"delimiter": find_separator(text), "skipinitialspace": spaced}
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
        for values in reader:
            if len(values) > 1 or "".join(values).strip():
                records.append((line, values))
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 ({error.reason}); save it as CSV UTF-8"
        raise DataError(f"{file} row {line} {message}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} row {line} cannot be read as CSV: {error}") from error
    if not records:
        raise DataError(f"{file} is empty; its first line should be: path,label")
    return records


def find_separator(text: str) -> str:
    """The separator between the most known names in the first line of a table, else the comma."""
    header = re.split(r"[\r\n]", text.strip("\r\n "), maxsplit=1)[0].replace('"', "").lower()
    names = {mark: {name.strip() for name in header.split(mark)} for mark in ",;\t"}
    return max(names, key=lambda mark: len(names[mark] & KNOWN_COLUMNS))


def check_records(file: Path, records: Records) -> pd.DataFrame:
    """What ``read_table`` gives, of `records` from a table of any kind; ``DataError`` likewise."""
    (top, names), *rows = records
    names = [name.strip() for name in names]
    header = [low if (low := name.lower()) in KNOWN_COLUMNS else name for name in names]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{file} row {top} names the column {twice[0]} twice; rename one of them")
    chosen = []
    for accepted in (PATH_COLUMNS, LABEL_COLUMNS):
        found = [header.index(name) for name in accepted if name in header]
        if not found:
            have = ", ".join(names)
            raise DataError(f"{file} has no column {' or '.join(accepted)}; it has: {have}")
        chosen.append(found[0])
    if not rows:
        raise DataError(f"{file} lists no image; give it at least one row")
    for line, values in rows:
        if fault := fault_of(values, len(header), chosen):
            raise DataError(f"{file} row {line} {fault}")
    others = [i for i, name in enumerate(header) if i not in chosen and name not in ("", "row")]
    content = [[values[i] for i in (*chosen, *others)] for _, values in rows]
    columns = ["path", "label", *(header[i] for i in others)]
    table = pd.DataFrame(content, columns=columns, dtype=str)
    labels = table["label"].str.strip().str.normalize("NFC")
    return table.assign(label=labels, row=[line for line, _ in rows])


def fault_of(values: Sequence[str], columns: int, chosen: Sequence[int]) -> str:
    """What is wrong with a record whose path and label are the `chosen` values; "" for nothing."""
    if len(values) != columns:
        return (
            f"has {len(values)} values where the header has {columns}; a value that holds the "
            "separator needs double quotes around it"
        )
    for column, value in zip(("path", "label"), (values[i] for i in chosen), strict=True):
        if not value.strip():
            return f"has an empty {column}; fill or remove it"
        if "\n" in value or "\r" in value:
            return f"has a line break in its {column}, {value[:40]!r}; is a quotation mark missing?"
    return ""


def class_order(root: Path, train: pd.DataFrame) -> tuple[str, ...]:
    """The class names in the order of their numbers; raises ``DataError`` for a bad label map."""
    file = root / "label_map.json"
    if os.path.lexists(file):
        return read_label_map(file)
    labels = sorted(train["label"].unique())
    if len(labels) < 2:
        raise DataError(f"{root / 'train.csv'} has one class only ({labels[0]}); two are needed")
    return order_of(labels)


def read_label_map(file: Path) -> tuple[str, ...]:
    """The classes of a label map by their numbers; raises ``DataError`` where it is malformed."""
    try:
        # as pairs, because a name that stands there twice would overwrite itself
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    pairs = [p for p in content if isinstance(p, tuple)] if isinstance(content, list) else []
    names = [unicodedata.normalize("NFC", name) for name, _ in pairs]
    numbers = [number for _, number in pairs]
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


def make_split(
    name: str, root: Path, images_root: Path, table: pd.DataFrame, classes: Sequence[str]
) -> Split:
    """A `Split` from the table of its CSV; raises ``DataError`` for a label not in `classes`."""
    file = root / f"{name}.csv"
    number = {label: i for i, label in enumerate(classes)}
    unknown = table.loc[~table["label"].isin(list(number))]
    if len(unknown):
        row, label = unknown.iloc[0][["row", "label"]]
        same = [name for name in classes if spelling_key(name) == spelling_key(label)]
        raise DataError(
            f"{file} row {row} has the unknown label {label!r} ({len(unknown)} such rows); "
            f"known: {', '.join(classes)}. Correct the row"
            + (f" to {same[0]!r}" if same else ", or add the class to label_map.json")
        )
    labels = np.array([number[label] for label in table["label"]], dtype=np.int64)
    rows = np.array(table["row"], dtype=np.int64)
    files = [find_image(images_root, listed) for listed in table["path"]]
    return Split(name, file, images_root, files, labels, rows)


def find_image(root: Path, listed: str) -> str:
    """`listed`, or the spelling of it that is in `root`.

    Systems write accents in two ways, one turns slashes round, and a table may have spaces around
    its values. A path without any of these is not looked for.
    """
    plain = listed.isascii() and "\\" not in listed and listed == listed.strip()
    if plain or os.path.exists(root / listed):
        return listed
    found = ""
    for part in PurePosixPath(listed.strip().replace("\\", "/")).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        paths = [posixpath.join(found, form) for form in forms]
        found = next((path for path in paths if os.path.exists(root / path)), "")
        if not found:
            return listed
    return found


def spelling_key(label: str) -> str:
    """What a label has in common with other spellings of it."""
    text = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    text = "".join(filter(str.isprintable, text))  # without what has no width
    try:
        return "missing" if text in MISSING else str(float(text))
    except ValueError:
        return text


def warn_of_spellings(counts: "pd.Series[int]") -> None:
    """Warn of labels, with their numbers of images, that may be the same, or missing ones."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label, count in counts.items():
        alike[spelling_key(str(label))].append(f"{label!r} ({count} images)")
    for key, labels in alike.items():
        if len(labels) > 1:
            text = f"{' and '.join(labels)} may be one label; if so, give them one spelling"
            warnings.warn(text, stacklevel=3)
        elif key == "missing":
            text = f"the label {labels[0]} may stand for none; if so, remove its rows"
            warnings.warn(text, stacklevel=3)


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


def write_split_tables(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    classes: Sequence[str],
    stats: Mapping[str, Any],
) -> None:
    """Write `<split>.csv` for each table (columns path, label, ...), label_map.json and stats.json.

    `stats` is extended by the classes and by the counts by split and class.
    """
    counts = {
        split: {name: int((table["label"] == name).sum()) for name in classes}
        for split, table in tables.items()
    }
    for split, table in tables.items():
        table.to_csv(folder / f"{split}.csv", index=False, lineterminator="\n")
    texts = {
        "label_map.json": {name: number for number, name in enumerate(classes)},
        "stats.json": {**stats, "classes": list(classes), "counts": counts},
    }
    for name, content in texts.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")


def summarise_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Lowest, median and highest width and height in pixels, for stats.json."""
    table = np.array(sizes, dtype=int).reshape(-1, 2)
    summary: dict[str, Any] = {"images": len(table)}
    for name, column in zip(("width", "height"), table.T, strict=True):
        if len(column):
            low, middle, high = np.percentile(column, [0, 50, 100])
            summary[name] = {"min": int(low), "median": float(middle), "max": int(high)}
    return summary
