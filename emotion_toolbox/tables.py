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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from emotion_toolbox.errors import DataError
from emotion_toolbox.files import write_text

MIKELS_CLASSES: tuple[str, ...] = (  # in EmoSet's order, which numbers the classes
    *("amusement", "awe", "contentment", "excitement"),
    *("anger", "disgust", "fear", "sadness"),
)
POSITIVE_EMOTIONS = frozenset(MIKELS_CLASSES[:4])
SPLITS = ("train", "val", "test")
PATH_COLUMNS = (
    *("path", "image_path", "filepath", "file"),
    *("filename", "file_name", "image", "img", "image_name"),
)
LABEL_COLUMNS = ("label", "emotion", "class", "target", "category")
KNOWN_COLUMNS = frozenset({*PATH_COLUMNS, *LABEL_COLUMNS})
MISSING = ("", "?", "nan", "null", "none", "na", "n/a", "#n/a", "nil", "<na>", "missing", "unknown")
Records = Sequence[tuple[int, Sequence[str]]]  # line and values of each row, the header first


def order_of(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: EmoSet's for Mikels' eight, by value for numbers, else A to Z."""
    names = set(labels)
    if names == set(MIKELS_CLASSES):
        return MIKELS_CLASSES
    try:
        return tuple(sorted(names, key=lambda name: (Decimal(name), name)))
    except ArithmeticError:  # not all of them are numbers
        return tuple(sorted(names))


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
        kept = {"labels": self.labels[chosen], "rows": self.rows[chosen]}
        return dataclasses.replace(self, files=[self.files[i] for i in chosen], **kept)


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
        count = partial(np.bincount, minlength=len(self.classes))
        sizes = {name: count(split.labels) for name, split in self.splits.items()}
        return pd.DataFrame(sizes, index=pd.Index(self.classes, name="class"))


def load_splits(root: Path, images_root: Path | None = None) -> EmotionData:
    """Read the three splits in `root`, whose paths start at `images_root`.

    Labels that may be one and the same are warned of. Raises ``DataError`` for a missing or
    malformed file, an unknown label, an empty split, or a path that occurs twice, or a class
    without a training image.
    """
    if missing := [f"{s}.csv" for s in SPLITS if not (root / f"{s}.csv").is_file()]:
        raise DataError(
            f"{root} lacks {', '.join(missing)}. Write a data set with `python -m emotion_transfer "
            'prepare SOURCE`, which says its DATA_ROOT, or set DATASET="sample"'
        )
    stats = read_stats(root)
    images_root = images_root or root / str(stats.get("images_root", "."))
    tables = {s: read_table(root / f"{s}.csv") for s in SPLITS}
    classes = class_order(root, tables["train"])
    splits = {s: make_split(s, root, images_root, tables[s], classes) for s in SPLITS}
    refuse_repeated_paths(splits)
    refuse_untaught_classes(splits["train"], classes)
    synthetic = stats.get("synthetic") is True
    name = "synthetic sample" if synthetic else root.name
    data = EmotionData(name, root, classes, splits, synthetic)
    warn_of_spellings(data.counts().sum(axis="columns"))
    return data


def read_stats(root: Path) -> dict[str, Any]:
    """What ``write_split_tables`` wrote into stats.json; {} if none, ``DataError`` if damaged."""
    file = root / "stats.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); delete it and set IMAGES_ROOT") from error


def read_table(file: Path) -> pd.DataFrame:
    """A table as text: path, label, others that have names, row (its line); or ``DataError``."""
    return check_records(file, read_csv_records(file))


def check_records(file: Path, table_records: Records) -> pd.DataFrame:
    """What ``read_table`` gives, of the records of any kind of table; ``DataError`` likewise."""
    (top, names), *records = table_records
    header = [name.strip() for name in names]
    header = [name.lower() if name.lower() in KNOWN_COLUMNS else name for name in header]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{file} row {top} names the column {twice[0]} twice; rename one of them")
    chosen = {}
    for column, accepted in (("path", PATH_COLUMNS), ("label", LABEL_COLUMNS)):
        found = [name for name in accepted if name in header]
        if not found:
            have = ", ".join(header)
            raise DataError(f"{file} has no column {' or '.join(accepted)}; it has: {have}")
        chosen[found[0]] = column
    if not records:
        raise DataError(f"{file} lists no image; give it at least one row")
    for line, values in records:
        if len(values) != len(header):
            raise DataError(
                f"{file} row {line} has {len(values)} values where the header has {len(header)}; a "
                "value that holds the separator needs double quotes around it"
            )
    lines, content = zip(*records, strict=True)
    table = pd.DataFrame(content, columns=header, dtype=str).rename(columns=chosen)
    for column in ("path", "label"):
        check_values(file, column, zip(lines, table[column], strict=True))
    others = [name for name in table.columns if name not in ("path", "label", "row", "")]
    labels = table["label"].str.strip().str.normalize("NFC")
    return table[["path", "label", *others]].assign(label=labels, row=lines)


def check_values(file: Path, column: str, values: Iterable[tuple[int, str]]) -> None:
    """Raise ``DataError`` if a value, which has its line, is blank or swallowed the next lines."""
    for line, value in values:
        if not value.strip():
            raise DataError(f"{file} row {line} has an empty {column}; fill or remove it")
        if "\n" in value or "\r" in value:
            raise DataError(
                f"{file} row {line} has a line break in its {column}, {value[:40]!r}; is a "
                "quotation mark missing?"
            )
        if column == "path" and re.match(r"\s*[\w+.-]{2,}://", value):  # C:// is a disk
            text = "has an address for a path; save that image, and write where it is:"
            raise DataError(f"{file} row {line} {text} {value[:80]}")


def read_csv_records(file: Path) -> Records:
    """The records of a CSV, without blank ones.

    Commas, semicolons or tabs separate the values, with spaces after them or not. Raises
    ``DataError`` if the file is unreadable or empty.
    """
    records, line = [], 1
    try:
        data = file.read_bytes()
        text = re.sub(r"\A\"?sep=.\"?(?=[\r\n])", "", data.decode("utf-8-sig"))  # Excel's line
        spaced = re.search(r'[,;\t] +"', text) is not None  # else a path may begin with a space
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=find_separator(text), strict=True,
            skipinitialspace=spaced,
        )  # fmt: skip
        for values in reader:
            if "\0" in "".join(values):
                raise ValueError("NUL character; is it UTF-16?")
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
    header = text.strip().partition("\n")[0].replace('"', "").lower()
    names = {mark: {name.strip() for name in header.split(mark)} for mark in ",;\t"}
    return max(names, key=lambda mark: len(names[mark] & KNOWN_COLUMNS))


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
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    entries = content.items() if isinstance(content, dict) else ()
    numbers = {unicodedata.normalize("NFC", name): number for name, number in entries}
    clean = all(type(n) is int and name and name == name.strip() for name, n in numbers.items())
    if not clean or sorted(numbers.values()) != list(range(max(2, len(numbers)))):
        raise DataError(
            f'{file} must be {{"first class": 0, "second class": 1, ...}}, numbered from 0 without '
            "gaps, with no name that is blank or has spaces around it, and is "
            f"{json.dumps(content, ensure_ascii=False)[:200]}"
        )
    return tuple(sorted(numbers, key=numbers.__getitem__))


def make_split(
    name: str, root: Path, images_root: Path, table: pd.DataFrame, classes: Sequence[str]
) -> Split:
    """A `Split` from the table of its CSV; raises ``DataError`` for a label not in `classes`."""
    file = root / f"{name}.csv"
    labels = pd.Index(classes).get_indexer(pd.Index(table["label"])).astype(np.int64)
    unknown = table[labels < 0]
    if len(unknown):
        row, label = unknown.iloc[0][["row", "label"]]
        same = [name for name in classes if spelling_key(name) == spelling_key(label)]
        raise DataError(
            f"{file} row {row} has the unknown label {label!r} ({len(unknown)} such rows); "
            f"known: {', '.join(classes)}. Correct the row"
            + (f" to {same[0]!r}" if same else ", or add the class to label_map.json")
        )
    files = [find_image(images_root, listed) for listed in table["path"]]
    return Split(name, file, images_root, files, labels, table["row"].to_numpy(np.int64))


def find_image(root: Path, listed: str) -> str:
    """`listed`, or the spelling of it that is in `root`.

    Systems write accents in two ways, one turns slashes round, and a table may have spaces around
    its values. The disk is asked only where there is such a choice.
    """
    tidy = listed.strip().replace("\\", "/")
    forms = {listed, *(unicodedata.normalize(form, tidy) for form in ("NFC", "NFD"))}
    if len(forms) == 1 or os.path.exists(root / listed):
        return listed
    return next((form for form in forms if os.path.exists(root / form)), listed)


def spelling_key(label: str) -> str:
    """What a label has in common with other spellings of it."""
    text = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    text = "".join(filter(str.isprintable, text))  # without what has no width
    words = re.sub("[ _-]+", " ", text).strip()
    try:
        return "missing" if words in MISSING else str(float(text))
    except ValueError:
        return words


def warn_of_spellings(counts: "pd.Series[int]") -> None:
    """Warn of labels, with their numbers of images, that may be the same, or missing ones."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label, count in counts.items():
        alike[spelling_key(str(label))].append(f"{label!r} ({count} images)")
    for key, labels in alike.items():
        names = " and ".join(labels)
        if key == "missing":
            warnings.warn(f"the label {names} may stand for none; if so, remove it", stacklevel=3)
        elif len(labels) > 1:
            warnings.warn(f"{names} may be one label; if so, spell it one way", stacklevel=3)


def refuse_repeated_paths(splits: Mapping[str, Split]) -> None:
    """Raise ``DataError`` if a path occurs twice, in one split or in two."""
    seen: dict[str, tuple[Split, int]] = {}
    for split in splits.values():
        for i, listed in enumerate(split.files):
            file = posixpath.normpath(listed)  # a/./b.jpg is a/b.jpg
            other, j = seen.setdefault(file, (split, i))
            if other is not split or i != j:
                raise DataError(
                    f"{split.where(i)} is listed already in {other.where(j)}; remove one of the "
                    "two: an image in two splits is tested on what it was trained on"
                )


def refuse_untaught_classes(train: Split, classes: Sequence[str]) -> None:
    """Raise ``DataError`` if a class has no image in `train`."""
    counts = np.bincount(train.labels, minlength=len(classes))
    if absent := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise DataError(
            f"{train.csv} has no usable image of {', '.join(absent)}, which cannot be learnt then; "
            "add some, or remove the class: its rows, and its entry in label_map.json"
        )


def csv_text(table: pd.DataFrame) -> str:
    """What a CSV file of the table holds."""
    return table.to_csv(index=False, lineterminator="\n")


def write_split_tables(
    folder: Path, tables: Mapping[str, pd.DataFrame], classes: Sequence[str],
    stats: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write `<split>.csv` for each table (columns path, label, ...), label_map.json and stats.json.

    Returns what stats.json says: `stats`, the classes, and the counts by split and class. While
    files are replaced there is no train.csv, so that a mixture of two sets is never read.
    """
    counts = {
        split: table["label"].value_counts().reindex(list(classes), fill_value=0).to_dict()
        for split, table in tables.items()
    }
    written = {**stats, "classes": list(classes), "counts": counts}
    numbers = {name: number for number, name in enumerate(classes)}
    (folder / "train.csv").unlink(missing_ok=True)
    for name, content in (("label_map.json", numbers), ("stats.json", written)):
        write_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for split in reversed(SPLITS):
        write_text(folder / f"{split}.csv", csv_text(tables[split]))
    return written
